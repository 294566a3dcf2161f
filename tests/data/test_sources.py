"""Tar shards, tables, datasets of Hugging Face, mixtures: what others write is read as it is."""

import collections
import io
import itertools
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from written import WRITERS, flat, hf_dataset, pairs, records, tar

from cascade.commands import data as command
from cascade.data import (
    Filters,
    FolderData,
    HFData,
    Mixture,
    TableData,
    TarData,
    TFDSData,
    batches,
    pipeline,
    uri,
)
from cascade.data import tar as tar_module
from cascade.data.pictures import PictureData
from cascade.data.tar import shards_of
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData


def examples(data, resolution=8):
    source = data.open(resolution)
    return [source[i] for i in range(len(source))]


def captions(data):
    return [example["caption"] for example in examples(data)]


def seen(data, count, **options):
    """The numbers of the pictures in the first `count` examples."""
    options = {"batch_size": 1, "seed": 1, "tokenizer": None, **options}
    found = batches(data.open(8), **options)
    taken = list(itertools.islice(found, count))
    found.close()
    return [int(x[0, 0, 0]) // 10 for batch in taken for x in batch["image"]]


@pytest.mark.parametrize("kind", WRITERS)
def test_what_each_writer_writes_is_read_in_its_order(kind, tmp_path):
    found = examples(WRITERS[kind](tmp_path / "d", records(10)))
    assert [e["caption"] for e in found] == [str(i) for i in range(10)]
    assert all((e["image"] == 10 * i).all() for i, e in enumerate(found))


# Tar shards.


def test_webdataset_itself_reads_the_same_shards(tmp_path):
    import webdataset

    data = tar(tmp_path, records(6))
    read = webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)
    assert [sample["txt"].decode() for sample in read] == captions(data)


def test_braces_stand_for_numbers_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MOST_SHARDS", 10)
    assert [str(p) for p in shards_of("a/{08..11}.{x,y}")] == [
        f"a/{n}.{end}" for n in ("08", "09", "10", "11") for end in "xy"
    ]
    tar(tmp_path, records(6))
    assert captions(TarData(path=str(tmp_path))) == [str(i) for i in range(6)]
    for name, message in {
        "{3..1}.tar": "counts down",
        "{a}.tar": "braces hold numbers",
        "{0..9999999}.tar": "more than 10 shards",
        "{0..1}.tar": "no such file",
        "absent": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            TarData(path=str(tmp_path / name)).open(8)


def test_the_caption_may_be_a_column_of_the_json_and_several(tmp_path):
    found = [(k, p, t, {"alt": [f"{t} a", f"{t} b"]}) for k, p, t, _ in records(3)]
    data = tar(tmp_path, found)
    (first, *_) = examples(TarData(path=data.path, caption_column="alt"))
    assert first["caption"] == "0 a" and first["captions"] == ("0 a", "0 b")
    source = TarData(path=data.path, caption_column="none").open(8)
    with pytest.raises(UserError, match="has no caption"):
        source[0]


def test_an_index_in_a_folder_is_used_until_the_shard_changes(tmp_path, monkeypatch):
    data = tar(tmp_path / "d", records(4))
    kept, known = TarData(path=data.path, index=str(tmp_path / "index")), captions(data)
    assert captions(kept) == known
    gone = []
    original = tar_module._gone_through
    monkeypatch.setattr(tar_module, "_gone_through", lambda *a: gone.append(1) or original(*a))
    assert captions(kept) == known and not gone
    tar(tmp_path / "d", records(3))
    assert len(captions(kept)) == 3 and gone
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    assert len(captions(kept)) == 3
    gone.clear()
    assert len(captions(kept)) == 3 and not gone
    monkeypatch.setattr(tar_module, "_VERSION", tar_module._VERSION + 1)  # of another meaning
    assert len(captions(kept)) == 3 and gone
    assert not list((tmp_path / "d").glob("*.npz"))


def test_shards_of_one_name_have_an_index_each(tmp_path):
    for name, count in (("a", 3), ("b", 2)):
        data = tar(tmp_path / name, records(count))
        TarData(path=data.path, index=str(tmp_path / "index")).open(8)
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_an_index_of_a_shard_takes_little_memory_for_each_example(tmp_path):
    import webdataset

    per = 300
    for shard in range(4):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(per):
                key = f"{shard}{i:08d}"
                writer.write({"__key__": key, "jpg": b"x" * 9, "txt": "y" * 99, "json": {"i": i}})
    TarData(path=str(tmp_path / "0.tar")).open(8)  # what is imported and cached at first
    tracemalloc.start()
    source = TarData(path=f"{tmp_path}/{{0..3}}.tar").open(8)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 4 * per
    assert kept < 60 * len(source) + 20_000 and peak < 1e6


# Tables.


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path):
    for kind in ("csv", "tsv", "parquet"):
        data = WRITERS[kind](tmp_path / kind, records(2))
        with pytest.raises(UserError, match="no column 'words'; its columns are file_name, text"):
            TableData(path=data.path, file_column="file_name", caption_column="words").open(8)
    data = WRITERS["jsonl"](tmp_path / "j", records(2))
    with pytest.raises(UserError, match="no column 'words'; its columns are caption, file, number"):
        TableData(path=data.path, caption_column="words").open(8)
    for kind in ("hf", "hf parquet"):
        data = WRITERS[kind](tmp_path / kind, records(4))
        with pytest.raises(UserError, match="no column 'words'; its columns are image, text"):
            HFData(path=data.path, caption_column="words").open(8)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_takes_little_memory_for_each_row(kind, tmp_path):
    def opened(count):
        rows = [{"file": f"{i}.png", "caption": "x" * 99} for i in range(count)]
        lines = [json.dumps(row) for row in rows]
        if kind == "csv":
            lines = ["file,caption", *(f"{row['file']},{row['caption']}" for row in rows)]
        (tmp_path / f"list.{kind}").write_text("\n".join(lines))
        return TableData(path=str(tmp_path / f"list.{kind}")).open(8)

    opened(10)
    tracemalloc.start()
    source = opened(6000)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 6000 and kept < 60 * len(source)  # a caption has 99


def test_a_csv_may_have_commas_quotes_and_newlines_in_captions(tmp_path):
    texts = ['a "red", round', "two\nlines", "ümlaut, 語"]
    found = [(k, p, text, m) for (k, p, _, m), text in zip(records(3), texts, strict=True)]
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        assert captions(WRITERS[kind](tmp_path / kind, found)) == texts


def test_a_folder_with_two_tables_asks_which(tmp_path):
    WRITERS["csv"](tmp_path, records(2))
    WRITERS["jsonl"](tmp_path, records(2))
    with pytest.raises(UserError, match="found list.jsonl, metadata.csv; name the file"):
        TableData(path=str(tmp_path)).open(8)


def test_one_of_several_captions_is_drawn_each_time_and_is_the_same_again(tmp_path):
    (tmp_path / "a.png").write_bytes(flat(0))
    rows = {"file": "a.png", "caption": ["one", "two", "three"]}
    (tmp_path / "list.jsonl").write_text(json.dumps(rows))
    import pandas

    pandas.DataFrame([rows]).to_parquet(tmp_path / "list.parquet")
    for name in ("list.jsonl", "list.parquet"):
        source = TableData(path=str(tmp_path / name)).open(8)
        assert source[0]["captions"] == ("one", "two", "three")
        drawn = [source.drawn(0, np.random.default_rng(i))["caption"] for i in range(30)]
        again = [source.drawn(0, np.random.default_rng(i))["caption"] for i in range(30)]
        assert drawn == again and set(drawn) == {"one", "two", "three"}
        found = batches(source, batch_size=2, seed=0, tokenizer=None)
        assert set(next(found)) == {"image"}
        found.close()


# Hugging Face.


def test_a_folder_of_several_splits_asks_for_one(tmp_path):
    import datasets

    parts = {"train": hf_dataset(records(3)), "test": hf_dataset(records(2))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert len(captions(HFData(path=str(tmp_path / "d")))) == 3
    assert len(captions(HFData(path=str(tmp_path / "d"), split="test"))) == 2
    with pytest.raises(UserError, match="no split 'dev'; its splits are train, test"):
        HFData(path=str(tmp_path / "d"), split="dev").open(8)


def test_datasets_itself_is_not_needed_to_read(tmp_path):
    data = WRITERS["hf"](tmp_path / "d", records(4))
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        f"from cascade.data import HFData; s = HFData(path={data.path!r}).open(8)\n"
        "print([s[i]['caption'] for i in range(len(s))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['0', '1', '2', '3']"


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    data = WRITERS["hf"](tmp_path / "d", records(4))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'cascade-diffusion\[data\]'"):
        data.open(8)


# Mixtures.


def test_a_mixture_keeps_its_weights_in_every_stretch(tmp_path):
    found = records(10)
    parts = pairs(tmp_path / "a", found[:2]), tar(tmp_path / "b", found[2:])
    order = seen(Mixture(sources=parts, weights=(3.0, 1.0)), 80)
    for start in range(0, 80, 20):
        assert sum(i < 2 for i in order[start : start + 20]) == 15
    counts = collections.Counter(order)
    assert all(counts[i] == 30 for i in (0, 1)) and {counts[i] for i in range(2, 10)} <= {2, 3}


def test_what_stands_in_for_a_bad_example_is_of_the_same_part(tmp_path):
    found = records(8)
    parts = pairs(tmp_path / "a", found[:2]), pairs(tmp_path / "b", found[2:])
    (tmp_path / "a" / "001.png").write_bytes(b"damaged")
    order = seen(Mixture(sources=parts, weights=(1.0, 1.0)), 40)
    assert order.count(0) == 20 and 1 not in order


def test_a_mixture_of_mixtures_has_the_products_of_the_weights(tmp_path):
    parts = [
        pairs(tmp_path / key, [record])
        for key, *_ in records(3)
        for record in records(3)
        if record[0] == key
    ]
    inner = Mixture(sources=tuple(parts[:2]), weights=(1.0, 3.0))
    order = seen(Mixture(sources=(inner, parts[2]), weights=(4.0, 4.0)), 80)
    assert [order.count(i) for i in range(3)] == [10, 30, 40]


@pytest.mark.parametrize(
    "weights,message", [((1.0,), "one for each of the 2"), ((1.0, 0.0), "above 0")]
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources=(FolderData(path="a"), FolderData(path="b")), weights=weights)
    with pytest.raises(ValueError, match="at least one dataset"):
        Mixture(sources=())


# Names on the command line.


def test_a_word_names_a_dataset_of_every_kind():
    for word, data in {
        "folder:a/b": FolderData(path="a/b"),
        "table:a:b.csv": TableData(path="a:b.csv"),
        "tar:gs://B/{00000..00999}.tar": TarData(path="gs://B/{00000..00999}.tar"),
        "parquet:p": HFData(path="p"),
        "hf:p": HFData(path="p"),
        "tfds:birds/small@d": TFDSData(name="birds/small", data_dir="d"),
        "hf:p?split=test&caption_column=a b": HFData(path="p", split="test", caption_column="a b"),
        "tar:p?x/{0..9}.tar?index=i": TarData(path="p?x/{0..9}.tar", index="i"),
        "scenes:": ScenesData(),
        "scenes": ScenesData(),
        "scenes:long": ScenesData(split="long"),
    }.items():
        assert command.dataset(word) == data
    assert command.dataset("hf:p", "test") == HFData(path="p", split="test")
    with pytest.raises(UserError, match="'zip' is no kind .* folder:, table:, tar:, .* scenes:"):
        command.dataset("zip:p")
    with pytest.raises(UserError, match="HFData has no field 'flip' .*; it has path, split, image"):
        command.dataset("hf:p?flip=1")
    with pytest.raises(UserError, match="write tfds:NAME@DIR"):
        uri.parse("tfds:birds")


def test_a_run_may_be_given_its_data_in_a_word(capsys):
    from cascade.commands.train import read_job

    words = ["--data", "tar:x.tar", "--data.crop", "random", "--data.filters.least-side", "64"]
    job = read_job("configs/imagen/base64_mini.py", words, prog="x")
    assert job.data == TarData(path="x.tar", crop="random", filters=Filters(least_side=64))
    with pytest.raises(UserError, match="--data tar:x.tar"):
        read_job("configs/scenes/gpu/base64.py", ["--data", "tar:x.tar"], prog="x")
    with pytest.raises(UserError, match="is for stages"):
        read_job("configs/scenes/text_encoder.py", ["--data", "tar:x.tar"], prog="x")


# What is random.


def wide():
    """A picture whose left half is black and whose right half is white."""
    levels = np.zeros((8, 16, 3), np.uint8)
    levels[:, 8:] = 255
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def test_a_random_crop_lies_anywhere_along_the_longer_side(tmp_path):
    data = pairs(tmp_path, [("a", wide(), "a wall", {})])
    middle = data.open(8)
    assert all(
        (middle.drawn(0, np.random.default_rng(i))["image"][:, :4] == 0).all() for i in (1, 2)
    )
    source = FolderData(path=data.path, crop="random").open(8)
    light = [source.drawn(0, np.random.default_rng(i))["image"].mean() for i in range(200)]
    assert min(light) < 40 and max(light) > 215 and abs(np.mean(light) - 127) < 15
    np.testing.assert_array_equal(source[0]["image"], middle[0]["image"])


@pytest.mark.parametrize("caption", ["a ball left of a box", "RIGHT", "the leftmost one"])
def test_half_are_mirrored_but_none_that_tells_left_from_right(caption, tmp_path):
    data = pairs(tmp_path, [("a", wide(), "a bright wall", {}), ("b", wide(), caption, {})])
    source = FolderData(path=data.path, flip=True).open(8)

    def mirrored(index):
        drawn = [source.drawn(index, np.random.default_rng(i))["image"] for i in range(100)]
        return sum(int(image[0, 0, 0] == 255) for image in drawn)

    assert 30 < mirrored(0) < 70 and mirrored(1) == 0


# Filters.


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "mixed"])
def test_what_filters_take_out_is_counted_by_reason(kind, tmp_path, capsys):
    data = WRITERS[kind](tmp_path / "d", records(12))
    fields = {} if kind == "pairs" else {"columns": ("number >= 2",)}
    filters = Filters(caption_length=(1, 1), caption_regex="[^5]", **fields)
    source = type(data)(**{**vars(data), "filters": filters}).open(8)
    kept = [source[i]["caption"] for i in range(len(source))]
    low = 0 if kind == "pairs" else 2
    assert kept == [str(i) for i in range(low, 10) if i != 5]
    by_reason = {
        "filtered: caption not of 1 to 1 characters": 2,
        "filtered: caption without [^5]": 1,
    }
    assert source.filtered == by_reason | (
        {} if kind == "pairs" else {"filtered: not number >= 2": 2}
    )
    assert not source.left_out
    assert "1 filtered: caption without [^5]" in capsys.readouterr().err


def test_filters_that_leave_nothing_are_told(tmp_path):
    data = tar(tmp_path, records(3))
    with pytest.raises(UserError, match="the filters leave no picture: 3 filtered: no number in"):
        TarData(path=data.path, filters=Filters(columns=("score > 1",))).open(8)


def test_sizes_are_looked_at_in_columns_and_when_a_picture_is_read(tmp_path, monkeypatch):
    found = [
        ("a", flat(0, 8), "0", {}),
        ("b", flat(10, 32), "1", {"width": 32, "height": 32}),
        ("c", flat(20, 8), "2", {"width": 8, "height": 8}),
        ("d", wide(), "3", {}),
    ]
    data = tar(tmp_path, found)
    source = TarData(path=data.path, filters=Filters(least_side=16)).open(8)
    assert len(source) == 3 and source.filtered == {"filtered: side below 16": 1}
    with pytest.raises(UserError, match="side below 16"):
        source[0]
    assert set(seen(TarData(path=data.path, filters=Filters(least_side=16)), 20)) == {1}
    monkeypatch.setattr(pipeline, "_ENOUGH_TO_JUDGE", 10)
    loaded = batches(source, batch_size=4, seed=0, tokenizer=None, most_bad=0.0)
    for _ in range(10):  # what a person takes out is no damage, and ends no run
        next(loaded)
    loaded.close()
    assert {reason for _, reason in loaded.bad_records} == {"filtered: side below 16"}
    source = TarData(path=data.path, filters=Filters(most_aspect=1.5)).open(8)
    with pytest.raises(UserError, match="aspect above 1.5"):
        source[3]


@pytest.mark.parametrize(
    "field,value",
    [
        ("least_side", -1),
        ("most_aspect", 0.5),
        ("caption_length", (5, 1)),
        ("caption_regex", "("),
        ("columns", ("score",)),
        ("columns", ("score > high",)),
    ],
)
def test_filters_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"Filters.{field} must be"):
        Filters(**{field: value})


def test_every_kind_of_data_takes_filters_crop_and_flip():
    for kind in (FolderData, TableData, TarData, HFData, TFDSData):
        assert issubclass(kind, PictureData)
