"""A look at a dataset: a contact sheet, histograms, statistics of its captions and pictures."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade import config, images
from cascade.data import duplicates
from cascade.data.folder import FolderData
from cascade.data.pictures import PictureSource, encoded
from cascade.data.source import BadRecord, Data, Example, Source
from cascade.data.tfds import TFDSData
from cascade.errors import UserError
from cascade.storage import paths


def inspect(
    data: Data,
    out: Path,
    *,
    count: int = 20,
    resolution: int = 128,
    sample: int = 500,
    text_encoder: str | None = None,
    tokens: int = 128,
) -> dict[str, Any]:
    """Write a contact sheet PNG of `count` examples, spread over the dataset, with their captions.

    Beside it comes OUT_histograms.png: sides, aspects and lengths of captions.
    out: the file to write, which may be in object storage. resolution: side of a picture in pixels.
    sample: of so many examples, spread likewise, are the statistics.
    text_encoder: whose tokens captions are counted in, as cascade.text has it; None counts none.
    tokens: captions of more are cut.

    Returns the statistics as JSON values, with the examples among them that cannot be read, counted
    by reason, and duplicates: pictures whose files are the same, or that look nearly alike. Raises
    UserError where a file to be written exists or its folder does not, for a number that is not
    positive, where no example can be read, and for a dataset as `Data.open` does.
    """
    sheet = paths.path(out)
    drawn = sheet.with_name(f"{sheet.stem}_histograms.png")
    for file in (sheet, drawn):
        if file.exists():
            raise UserError(f"{file} exists already; name another file")
    if not paths.is_remote(sheet) and not sheet.parent.is_dir():
        raise UserError(f"{out}: no folder {out.parent}; make it first")
    if min(count, resolution, sample, tokens) < 1:
        raise UserError(
            "count, resolution, sample and tokens must be positive, got "
            f"{count}, {resolution}, {sample} and {tokens}"
        )
    counted = None
    if text_encoder is not None:
        from cascade.text.t5 import read_tokenizer

        counted = read_tokenizer(text_encoder, tokens)
    source = data.open(resolution)
    seen, bad = _read(source, sample)
    shown = [example for example in _examples(source, count)]
    cells = images.captioned([e["image"] for e in shown], [e["caption"] for e in shown])
    images.save_png(sheet, images.grid(cells, gap=8))
    captions = [one.caption for one in seen]
    lengths = [len(_words(caption)) for caption in captions]
    words = collections.Counter(w for caption in captions for w in _words(caption))
    sides = [min(one.size) for one in seen]
    aspects = [one.size[0] / one.size[1] for one in seen]
    pieces = [] if counted is None else [len(counted.pieces(text)) + 1 for text in captions]
    _draw(drawn, sides, aspects, [len(caption) for caption in captions], pieces)
    report = {
        "source": config.to_json(data),
        "examples": len(source),
        "sampled": len(seen),
        "bad_records": _by_reason([*source.left_out, *bad]),
        "filtered": dict(source.filtered),
        "shorter_side": _spread_of(sides),
        "width_over_height": _spread_of(aspects),
        "words_per_caption": {"mean": round(float(np.mean(lengths)), 2), "max": max(lengths)},
        "empty_captions": sum(length == 0 for length in lengths),
        "distinct_captions": len(set(captions)),
        "distinct_words": len(words),
        "commonest_words": dict(words.most_common(20)),
        "mean_rgb": [round(float(m), 1) for m in np.mean([one.hash[1] for one in seen], axis=0)],
        "same_pictures": _named(duplicates.grouped([one.digest for one in seen]), seen),
        "near_duplicates": _named(duplicates.near([one.hash for one in seen]), seen),
        "sheet": str(sheet),
        "histograms": str(drawn),
    }
    if isinstance(data, FolderData):
        report["captions_without_picture"] = _lonely(data)
    if counted is not None:
        report["tokens_per_caption"] = {
            **_spread_of(pieces),
            "cut": sum(n > counted.max_tokens for n in pieces),
            "most": counted.max_tokens,
        }
    return report


def dataset_in(source: str) -> Data:
    """The configuration that reads a folder: TFDSData if it holds a TFDS dataset, else FolderData.

    Raises UserError where the folder holds several
    TFDS datasets, or lies inside one.
    """
    folder = paths.path(source)
    # Up to NAME/CONFIG/VERSION; without **, which object storage does not have.
    patterns = ("*/" * depth + "dataset_info.json" for depth in range(4))
    infos = sorted(found for pattern in patterns for found in folder.glob(pattern))
    if not infos:
        return FolderData(path=source)
    inside = any(info.parent == folder for info in infos)  # this is the folder of a version
    names = [] if inside else [i.parent.parent.relative_to(folder).as_posix() for i in infos]
    if inside or len(set(names)) > 1 or names[0] == ".":
        raise UserError(
            f"{folder}: give the folder that holds one dataset as NAME/VERSION/dataset_info.json, "
            f"found {', '.join(str(info.relative_to(folder)) for info in infos)}"
        )
    return TFDSData(name=names[0], data_dir=source)


class _Seen(NamedTuple):
    """What is kept of an example."""

    key: str
    caption: str
    size: tuple[int, int]
    """Width and height of its picture in pixels, as the file's head has them."""
    digest: bytes
    """A checksum of the picture's file, or of its pixels where it has none."""
    hash: tuple[int, tuple[float, ...]]


def _read(source: Source, count: int) -> tuple[list[_Seen], list[BadRecord]]:
    """At most `count` examples spread over the source, those that can be read and those that
    cannot; UserError where none can."""
    readable, bad = [], []
    for index in _spread(len(source), count):
        try:
            readable.append(_seen(source, index))
        except BadRecord as e:
            bad.append(e)
    if not readable:
        raise UserError(f"none of {len(bad)} examples can be read, the first: {bad[0]}")
    return readable, bad


def _seen(source: Source, index: int) -> _Seen:
    example = source[index]
    image = example["image"]
    key, content, size = f"example {index}", image.tobytes(), (image.shape[1], image.shape[0])
    if isinstance(source, PictureSource):
        found = source.found(index)
        content, key = encoded(found), found.key
        with contextlib.suppress(images.Unreadable):  # it was read just now
            size = images.size_of(io.BytesIO(content))
    digest = hashlib.sha256(content).digest()
    return _Seen(key, example["caption"], size, digest, duplicates.perceptual_hash(image))


def _examples(source: Source, count: int) -> Iterator[Example]:
    for index in _spread(len(source), count):
        with contextlib.suppress(BadRecord):
            yield source[index]


def _named(groups: Sequence[Sequence[int]], seen: Sequence[_Seen]) -> dict[str, Any]:
    """How many pictures could go, and the keys of the first groups."""
    first = [[seen[number].key for number in group[:5]] for group in groups[:20]]
    return {"count": sum(len(group) - 1 for group in groups), "first": first}


def _spread_of(values: Sequence[Any]) -> dict[str, float]:
    low, middle, high = (float(x) for x in np.quantile(values, [0, 0.5, 1]))
    return {"min": round(low, 3), "median": round(middle, 3), "max": round(high, 3)}


def _lonely(data: FolderData) -> dict[str, Any]:
    """The text files of a folder of pairs that lie beside no picture."""
    folder = paths.path(data.path)
    if paths.is_remote(folder) or (folder / "captions.jsonl").exists():
        return {"count": 0, "first": []}
    texts = [file for file in Path(folder).rglob("*.txt") if not file.name.startswith(".")]
    pictures = {str(f.with_suffix("")) for f in Path(folder).rglob("*") if f.suffix != ".txt"}
    lonely = sorted(str(f) for f in texts if str(f.with_suffix("")) not in pictures)
    return {"count": len(lonely), "first": lonely[:20]}


def _draw(
    file: paths.Path,
    sides: Sequence[int],
    aspects: Sequence[float],
    letters: Sequence[int],
    pieces: Sequence[int],
) -> None:
    """Histograms of those numbers, as a PNG."""
    from matplotlib.figure import Figure

    kinds = [
        (sides, "shorter side in pixels"),
        (aspects, "width / height"),
        (letters, "characters of a caption"),
        *([(pieces, "tokens of a caption")] if pieces else []),
    ]
    figure = Figure(figsize=(4 * len(kinds), 3), layout="constrained")
    for axes, (values, name) in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        axes.hist(values, bins=min(40, max(5, len(set(values)))))
        axes.set(xlabel=name, ylabel="examples")
    with paths.writing(file) as written:
        figure.savefig(written, dpi=100, format="png")


def _by_reason(records: Sequence[BadRecord]) -> dict[str, dict[str, Any]]:
    """How many records are bad for each reason, and the keys of the first of them."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        of = found.setdefault(record.reason, {"count": 0, "first": []})
        of["count"] += 1
        of["first"] += [record.key] * (len(of["first"]) < 20)
    return found


def _spread(length: int, count: int) -> list[int]:
    """At most `count` indices in 0..length - 1, spread evenly."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _words(caption: str) -> list[str]:
    return re.findall(r"[\w'-]+", caption.lower())
