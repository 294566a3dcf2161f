"""Make, inspect or embed a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cascade import config
from cascade.data import Data
from cascade.data.inspection import dataset_in, inspect
from cascade.devices import distributed, xla_flags
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make
from cascade.scenes.spec import Split
from cascade.training.embed import EmbedOptions, embed

USAGE = """usage: cascade data make DIR ...      render scenes into DIR as a TFDS dataset
       cascade data inspect SOURCE ...  draw a contact sheet of a dataset and print its statistics
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
    """Draw a contact sheet of a dataset with its captions, and print its statistics as JSON."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset: `scenes` (rendered now), a folder of pictures with captions, or a folder of a
    TFDS dataset."""
    out: Path
    """The PNG to write, which must not exist yet."""
    split: str = "train"
    """The split of the scenes or of the TFDS dataset."""
    seed: int = 0
    """Which endless list of scenes, 0 or more."""
    count: int = 20
    """Number of pictures on the sheet."""
    resolution: int = 128
    """Side of a picture on the sheet in pixels."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade data` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "make":
        options = config.parse(MakeOptions, argv[1:], prog="cascade data make")
        data = _scenes(options.split, options.seed)
        report = make(data, options.dir, count=options.count, resolution=options.resolution)
        print(json.dumps(report))
    elif argv[0] == "inspect":
        options = config.parse(InspectOptions, argv[1:], prog="cascade data inspect")
        data = _found(options.source, options.split, options.seed)
        report = inspect(data, options.out, count=options.count, resolution=options.resolution)
        print(json.dumps(report))
    elif argv[0] == "embed":
        _embed(argv[1:])
    else:
        raise UserError(f"cascade data {argv[0]}: no such command; see cascade data --help")


def _embed(words: Sequence[str]) -> None:
    """Do what `cascade data embed` asks for; the first process prints what is in the store."""
    options = config.parse(EmbedOptions, words, prog="cascade data embed")
    data = _found(options.source, options.split, options.seed)
    if isinstance(data, ScenesData) and options.count is None:
        raise UserError("scenes have no end: say how many with --count, such as --count 10000")
    xla_flags.apply(xla_flags.expected_backend(), os.environ)
    with distributed.processes():
        report = embed(options, data)
        import jax

        if jax.process_index() == 0:
            print(json.dumps(report))


def _found(source: str, split: str, seed: int) -> Data:
    """The dataset that a SOURCE on the command line names."""
    if source == "scenes" and not Path(source).is_dir():
        return _scenes(split, seed)
    return dataset_in(source, split)


def _scenes(split: Any, seed: int) -> ScenesData:
    try:
        return ScenesData(split=split, seed=seed)
    except ValueError as e:
        raise UserError(str(e)) from None
