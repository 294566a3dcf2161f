"""Datasets of pictures as others write them: WebDataset, Hugging Face, pandas, and by hand."""

import io
import json

from PIL import Image

from cascade.data import FolderData, HFData, Mixture, TableData, TarData


def flat(level, side=8):
    """A PNG of one grey level."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def records(count=10):
    """(key, PNG, caption, columns): picture i has level 10 i, caption "i" and column number i."""
    return [(f"{i:03d}", flat(10 * i), str(i), {"number": i}) for i in range(count)]


def files(folder, found):
    folder.mkdir(exist_ok=True)
    for key, picture, _, _ in found:
        (folder / f"{key}.png").write_bytes(picture)


def pairs(folder, found):
    files(folder, found)
    for key, _, caption, _ in found:
        (folder / f"{key}.txt").write_text(caption)
    return FolderData(path=str(folder))


def jsonl(folder, found):
    files(folder, found)
    rows = [{"file": f"{key}.png", "caption": text, **more} for key, _, text, more in found]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TableData(path=str(folder))


def frame(folder, found):
    import pandas

    files(folder, found)
    return pandas.DataFrame(
        [{"file_name": f"{key}.png", "text": text, **more} for key, _, text, more in found]
    )


def table_of(kind):
    def write(folder, found):
        rows, file = frame(folder, found), folder / f"metadata.{kind}"
        if kind == "parquet":
            rows.to_parquet(file)
        else:
            rows.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
        return TableData(path=str(file), file_column="file_name", caption_column="text")

    return write


def tar(folder, found, per_shard=4):
    import webdataset

    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=per_shard, verbose=0) as writer:
        for key, picture, caption, more in found:
            writer.write({"__key__": key, "png": picture, "txt": caption, "json": more})
    return TarData(path=f"{folder}/{{00000..{(len(found) - 1) // per_shard:05d}}}.tar")


def hf_dataset(found):
    import datasets

    datasets.disable_progress_bars()
    columns = {
        "image": [{"bytes": picture, "path": f"{key}.png"} for key, picture, _, _ in found],
        "text": [text for _, _, text, _ in found],
        "number": [more["number"] for *_, more in found],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def hf(folder, found):
    hf_dataset(found).save_to_disk(str(folder), num_shards=2)
    return HFData(path=str(folder))


def parquet(folder, found):
    folder.mkdir(exist_ok=True)
    half = len(found) // 2
    for number, part in enumerate((found[:half], found[half:])):
        hf_dataset(part).to_parquet(folder / f"train-{number:05d}-of-00002.parquet", batch_size=3)
    return HFData(path=str(folder))


def mixed(folder, found):
    folder.mkdir(exist_ok=True)
    half = len(found) // 2
    first, second = pairs(folder / "a", found[:half]), tar(folder / "b", found[half:])
    return Mixture(sources=(first, second))


WRITERS = {
    "pairs": pairs,
    "jsonl": jsonl,
    **{kind: table_of(kind) for kind in ("csv", "tsv", "parquet")},
    "tar": tar,
    "hf": hf,
    "hf parquet": parquet,
    "mixed": mixed,
}
