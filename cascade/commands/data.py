"""Make, inspect, convert or embed a dataset."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cascade import config
from cascade.data import Data, Filters, Mixture
from cascade.data.conversion import Format, convert
from cascade.data.inspection import inspect
from cascade.devices import distributed, xla_flags
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make
from cascade.scenes.spec import Split
from cascade.scenes.words import dataset, scenes
from cascade.training.embed import EmbedOptions, embed

USAGE = """usage: cascade data make DIR ...      render scenes into DIR as a TFDS dataset
       cascade data inspect SOURCE ...  draw a contact sheet of a dataset and print its statistics
       cascade data convert SRC DST ... write a dataset as tar shards or as ArrayRecord
       cascade data embed SOURCE ...    embed its captions once, for training without text encoder

`cascade data VERB --help` shows what each takes."""


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """Render scenes with captions into DIR, as the TFDS dataset "scenes" in ArrayRecord files.

    DIR must be new or empty; gs:// and s3:// names are understood. Prints what was written as JSON.
    """

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder to write."""
    count: int = 1000
    """Number of examples."""
    resolution: int = 64
    """Side of the pictures in pixels."""
    split: Split = "train"
    """The kind of scenes: train, seen (the same distribution), unseen (held-out pairs of shape and
    colour) or long (three or four objects)."""
    seed: int = 0
    """Which endless list of scenes, 0 or more."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Draw a contact sheet of a dataset with its captions, and print its statistics as JSON.

    Beside OUT comes OUT_histograms.png. Sides, aspects, captions, what cannot be read, pictures
    that are there twice or nearly so, and captions without one are counted.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset: KIND:PLACE, where KIND is folder, table, tar, parquet, hf, tfds (NAME@DIR),
    samples (of `cascade sample`) or scenes (rendered now); a folder of pictures with captions, or
    of a TFDS dataset; or a mixture, "3*KIND:PLACE + 1*KIND:PLACE"."""
    out: Path
    """The PNG to write, which must not exist yet."""
    split: str = "train"
    """The split of the scenes, or of a dataset that has splits."""
    seed: int = 0
    """Which endless list of scenes, 0 or more."""
    count: int = 20
    """Number of pictures on the sheet."""
    resolution: int = 128
    """Side of a picture on the sheet in pixels."""
    sample: int = 500
    """Examples, spread over the dataset, that the statistics are of."""
    text_encoder: str | None = None
    """A text encoder, as for training, whose tokens captions are counted in."""
    tokens: int = 128
    """Captions of more tokens are cut."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    """Which of the pictures are taken."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a dataset as tar shards, or as a TFDS dataset in ArrayRecord files.

    DST must be new or empty, and appears whole or not at all; gs:// and s3:// names are understood.
    What cannot be read is left out and listed in DST/skipped.jsonl. All captions and all columns
    are kept, but for values that JSON has not, such as dates, bytes and NaN, lists of more than
    10,000 values, and the columns of a mixture. Prints what was written as JSON.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The dataset: KIND:PLACE, as for `cascade data inspect`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to write."""
    format: Format = "tar"
    """Tar shards, which WebDataset reads too, or array_record, the TFDS dataset "pictures"."""
    resolution: int | None = None
    """Side in pixels that central squares are resized to, as PNG; None keeps each picture's file as
    it is."""
    per_shard: int = 10_000
    """Examples in a tar shard."""
    split: str = "train"
    """The split of the scenes, or of a dataset that has splits."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    """Which of the pictures are taken."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade data` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "make":
        options = config.parse(MakeOptions, argv[1:], prog="cascade data make")
        data = scenes(options.split, options.seed)
        report = make(data, options.dir, count=options.count, resolution=options.resolution)
        print(json.dumps(report))
    elif argv[0] == "inspect":
        options = config.parse(InspectOptions, argv[1:], prog="cascade data inspect")
        named = dataset(options.source, options.split, options.seed)
        report = inspect(
            _filtered(named, options.filters),
            options.out,
            count=options.count,
            resolution=options.resolution,
            sample=options.sample,
            text_encoder=options.text_encoder,
            tokens=options.tokens,
        )
        print(json.dumps(report))
    elif argv[0] == "convert":
        options = config.parse(ConvertOptions, argv[1:], prog="cascade data convert")
        data = _filtered(dataset(options.source, options.split), options.filters)
        report = convert(
            data,
            options.out,
            format=options.format,
            resolution=options.resolution,
            per_shard=options.per_shard,
        )
        print(json.dumps(report))
    elif argv[0] == "embed":
        _embed(argv[1:])
    else:
        raise UserError(f"cascade data {argv[0]}: no such command; see cascade data --help")


def _embed(words: Sequence[str]) -> None:
    """Do what `cascade data embed` asks for; the first process prints what is in the store."""
    options = config.parse(EmbedOptions, words, prog="cascade data embed")
    data = dataset(options.source, options.split, options.seed)
    if isinstance(data, ScenesData) and options.count is None:
        raise UserError("scenes have no end: say how many with --count, such as --count 10000")
    xla_flags.apply(xla_flags.expected_backend(), os.environ)
    with distributed.processes():
        report = embed(options, data)
        import jax

        if jax.process_index() == 0:
            print(json.dumps(report))


def _filtered(data: Any, filters: Filters) -> Data:
    """The dataset with those filters."""
    if filters == Filters():
        return data
    if isinstance(data, Mixture):
        sources = tuple(_filtered(source, filters) for source in data.sources)
        return dataclasses.replace(data, sources=sources)
    if not hasattr(data, "filters"):
        raise UserError(f"--filters: a {type(data).__name__} has no picture files to filter")
    return dataclasses.replace(data, filters=filters)
