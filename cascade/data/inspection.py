"""A look at a dataset: a contact sheet, and statistics of its captions and pictures."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade import config, images
from cascade.data.folder import FolderData
from cascade.data.source import BadRecord, Data, Example, Source
from cascade.data.tfds import TFDSData
from cascade.errors import UserError
from cascade.storage import paths


def inspect(data: Data, out: Path, *, count: int = 20, resolution: int = 128) -> dict[str, Any]:
    """Write a contact sheet PNG of `count` examples, spread over the dataset, with their captions.

    out: the file to write, which may be in object storage. resolution: side of a picture in pixels.
    Returns statistics of up to 500 examples, spread likewise, as JSON values, with the examples
    among them that cannot be read, counted by reason. Raises UserError where `out` exists or its
    folder does not, for a number that is not positive, where no example can be read, and for a
    dataset as `Data.open` does.
    """
    sheet = paths.path(out)
    if sheet.exists():
        raise UserError(f"{out} exists already; name another file")
    if not paths.is_remote(sheet) and not sheet.parent.is_dir():
        raise UserError(f"{out}: no folder {out.parent}; make it first")
    if count < 1 or resolution < 1:
        raise UserError(f"count and resolution must be positive, got {count} and {resolution}")
    source = data.open(resolution)
    readable, bad = _read(source, 500)
    shown = _read(source, count)[0]
    cells = images.captioned([e["image"] for e in shown], [e["caption"] for e in shown])
    images.save_png(sheet, images.grid(cells, gap=8))
    lengths = [len(_words(example["caption"])) for example in readable]
    words = collections.Counter(w for e in readable for w in _words(e["caption"]))
    mean = np.mean([example["image"].mean(axis=(0, 1)) for example in readable], axis=0)
    return {
        "source": config.to_json(data),
        "examples": len(source),
        "sampled": len(readable),
        "bad_records": _by_reason([*source.left_out, *bad]),
        "words_per_caption": {"mean": round(float(np.mean(lengths)), 2), "max": max(lengths)},
        "empty_captions": sum(length == 0 for length in lengths),
        "distinct_captions": len({example["caption"] for example in readable}),
        "distinct_words": len(words),
        "commonest_words": dict(words.most_common(20)),
        "mean_rgb": [round(float(value), 1) for value in mean],
        "sheet": str(sheet),
    }


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


def _read(source: Source, count: int) -> tuple[list[Example], list[BadRecord]]:
    """At most `count` examples spread over the source, those that can be read and those that
    cannot; UserError where none can."""
    readable, bad = [], []
    for index in _spread(len(source), count):
        try:
            readable.append(source[index])
        except BadRecord as e:
            bad.append(e)
    if not readable:
        raise UserError(f"none of {len(bad)} examples can be read, the first: {bad[0]}")
    return readable, bad


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
