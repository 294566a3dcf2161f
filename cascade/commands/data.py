"""`cascade data make` and `cascade data inspect`: write a dataset, look at one."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import re
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from cascade import config, images
from cascade.data.sources import DataConfig, FolderData, ScenesData, TFDSData, open_source
from cascade.errors import UserError
from cascade.scenes.spec import Split
from cascade.storage import paths

USAGE = """usage: cascade data make DIR ...      render scenes into DIR as a TFDS dataset
       cascade data inspect SOURCE ...  draw a contact sheet of a dataset and print its statistics

`cascade data make --help` and `cascade data inspect --help` show what each takes."""


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """Render scenes with captions into DIR, as the TFDS dataset "scenes" in ArrayRecord files.

    DIR must be new or empty; gs:// and s3:// names are understood. Prints what was written as JSON.
    """

    dir: Annotated[Path, tyro.conf.Positional]
    count: int = 1000
    """Examples."""
    resolution: int = 64
    """Side of the pictures in pixels."""
    split: Split = "train"
    """train, seen (the same distribution), unseen (held-out pairs of shape and colour), long."""
    seed: int = 0
    """Which endless list of scenes."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Draw a contact sheet of a dataset with its captions, and print its statistics as JSON.

    SOURCE: `scenes` (rendered now), a folder of pictures with captions, or a folder of a TFDS
    dataset.
    """

    source: Annotated[str, tyro.conf.Positional]
    out: Path
    """The PNG to write; refuses to replace a file."""
    split: str = "train"
    """Of scenes and TFDS datasets."""
    seed: int = 0
    """Of scenes."""
    count: int = 20
    """Pictures on the sheet."""
    resolution: int = 128
    """Side of a picture on the sheet in pixels."""


def main(argv: Sequence[str]) -> None:
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "make":
        options = config.parse(MakeOptions, argv[1:], prog="cascade data make")
        data = _scenes_config(options.split, options.seed)
        report = make(data, options.dir, count=options.count, resolution=options.resolution)
        print(json.dumps(report))
    elif argv[0] == "inspect":
        options = config.parse(InspectOptions, argv[1:], prog="cascade data inspect")
        data = _found(options.source, options.split, options.seed)
        report = inspect(data, options.out, count=options.count, resolution=options.resolution)
        print(json.dumps(report))
    else:
        raise UserError(f"cascade data {argv[0]}: no such command; there are make and inspect")


def make(data: ScenesData, out: Path, *, count: int, resolution: int) -> dict[str, Any]:
    """Write scenes 0..count-1 of `data` under `out`, as the TFDS dataset "scenes".

    Its only split is data.split: TFDSData(name="scenes", data_dir=out, split=data.split) reads it.
    `out` must be new or empty, and appears whole or not at all; it may be in object storage
    (gs://BUCKET/NAME, s3://BUCKET/NAME). Returns what was written, as JSON values.
    """
    if count < 1 or resolution < 1:
        raise UserError(f"count and resolution must be positive, got {count} and {resolution}")
    from cascade.storage.paths import WholeFolder

    # TFDS prints where the data lie before they are moved to `out`.
    with WholeFolder(out) as folder, contextlib.redirect_stdout(io.StringIO()):
        import tensorflow_datasets as tfds

        from cascade.scenes.tfds_builder import Scenes

        builder = Scenes(
            data_dir=str(folder),
            file_format="array_record",
            resolution=resolution,
            seed=data.seed,
            counts={data.split: count},
        )
        with tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        size = sum(path.stat().st_size for path in files)
    return {
        "dataset": "scenes",
        "data_dir": str(paths.path(out)),
        "split": data.split,
        "examples": count,
        "resolution": resolution,
        "bytes": size,
        "files": names,
    }


def inspect(
    data: DataConfig, out: Path, *, count: int = 20, resolution: int = 128
) -> dict[str, Any]:
    """Write a contact sheet PNG of `count` examples, spread over the dataset, with their captions.

    `out` may be in object storage. Returns statistics, of up to 500 examples spread likewise, as
    JSON values. UserError where `out` exists.
    """
    sheet = paths.path(out)
    if sheet.exists():
        raise UserError(f"{out} exists already; name another --out")
    if not paths.is_remote(sheet) and not sheet.parent.is_dir():
        raise UserError(f"--out {out}: no folder {out.parent}; make it first")
    if count < 1 or resolution < 1:
        raise UserError(f"count and resolution must be positive, got {count} and {resolution}")
    source = open_source(data, resolution)
    shown = [source[i] for i in _spread(len(source), count)]
    cells = [_cell(example["image"], example["caption"]) for example in shown]
    height = max(len(cell) for cell in cells)
    cells = [
        np.pad(cell, ((0, height - len(cell)), (0, 0), (0, 0)), constant_values=255)
        for cell in cells
    ]
    images.save_png(sheet, images.grid(cells, gap=8))
    sampled = [source[i] for i in _spread(len(source), 500)]
    lengths = [len(_words(example["caption"])) for example in sampled]
    words = collections.Counter(w for e in sampled for w in _words(e["caption"]))
    mean = np.mean([example["image"].mean(axis=(0, 1)) for example in sampled], axis=0)
    return {
        "source": config.to_json(data),
        "examples": len(source),
        "sampled": len(sampled),
        "words_per_caption": {"mean": round(float(np.mean(lengths)), 2), "max": max(lengths)},
        "empty_captions": sum(length == 0 for length in lengths),
        "distinct_captions": len({example["caption"] for example in sampled}),
        "distinct_words": len(words),
        "commonest_words": dict(words.most_common(20)),
        "mean_rgb": [round(float(value), 1) for value in mean],
        "sheet": str(sheet),
    }


def _scenes_config(split: Any, seed: int) -> ScenesData:
    try:
        return ScenesData(split=split, seed=seed)
    except ValueError as e:
        raise UserError(str(e)) from None


def _found(source: str, split: str, seed: int) -> DataConfig:
    """What a SOURCE on the command line means."""
    if source == "scenes" and not Path(source).is_dir():
        return _scenes_config(split, seed)
    folder = paths.path(source)
    # Up to NAME/CONFIG/VERSION; without **, which object storage has not.
    patterns = ("*/" * depth + "dataset_info.json" for depth in range(4))
    infos = sorted(found for pattern in patterns for found in folder.glob(pattern))
    if not infos:
        return FolderData(path=source)
    names = sorted({info.parent.parent.relative_to(folder).as_posix() for info in infos})
    if len(names) > 1 or names[0] == ".":
        raise UserError(
            f"{folder}: give the folder that holds one dataset as NAME/VERSION/dataset_info.json, "
            f"found {', '.join(str(info.relative_to(folder)) for info in infos)}"
        )
    return TFDSData(name=names[0], data_dir=source, split=split)


def _spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over the whole."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _words(caption: str) -> list[str]:
    return re.findall(r"[\w'-]+", caption.lower())


def _cell(image: np.ndarray, caption: str) -> np.ndarray:
    """The picture with its caption under it."""
    side = image.shape[1]
    font = ImageFont.load_default()
    letter = font.getlength("abcdefghij") / 10
    lines = textwrap.wrap(caption, max(int(side / letter), 8)) or [""]
    canvas = Image.new("RGB", (side, len(image) + 12 * len(lines) + 4), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((0, len(image) + 2 + 12 * number), line, fill="black", font=font)
    return np.asarray(canvas)
