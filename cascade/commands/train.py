"""Train a stage or a text encoder; the same command resumes."""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cascade import config
from cascade.devices import distributed, xla_flags
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path

USAGE = f"""usage: cascade train CONFIG --workdir DIR [--FIELD VALUE ...]

Train one stage of a cascade, or a text encoder, as the config file says.

  CONFIG         a Python file with a function config(), such as configs/tiny/base64.py
  --workdir DIR  the run's folder: checkpoints, metrics.jsonl, tensorboard/, previews/, loss.png.
                 If it holds a checkpoint, the run continues from there. Here, or in object storage:
                 gs://BUCKET/NAME, s3://BUCKET/NAME (pip install 'cascade-diffusion[storage]').
  --data SOURCE  train on these pictures: KIND:PLACE, where KIND is folder, table, tar, parquet, hf,
                 tfds (NAME@DIR), samples (of `cascade sample`) or scenes; or a mixture,
                 "3*KIND:PLACE + 1*KIND:PLACE"; --data.FIELD VALUE overrides a field of theirs
  --until N      stop, with a checkpoint, after N images (of a text encoder: captions) in all
  --lora-rank R  train adapters of rank R to the projections of attention (LoRA) instead of the
                 weights of --init MODEL; 0 trains all weights
  --FIELD VALUE  override a field of the config; or an argument of its function config(), such as
                 the --init MODEL of configs/finetune.py

`cascade train CONFIG --help` lists the config's fields with their values. The exit status is 0 at
the end, 143 if the run was told to stop (SIGTERM, Ctrl-C) and saved a checkpoint, 130 after a
second Ctrl-C, which does not wait for one, and 2 for a mistake.

{distributed.HELP}"""

if TYPE_CHECKING:
    from cascade.training.job import Job

STOPPED = 143
"""The exit status of a run that was told to stop before its end: that of SIGTERM, in a shell."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade train` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    xla_flags.apply(xla_flags.expected_backend(), os.environ)
    interrupted: list[int] = []
    # Last of all at the end: threads of libraries that are at work then abort the process.
    atexit.register(lambda: interrupted and os._exit(interrupted[0]))
    try:
        with distributed.processes():  # so that a wrong word in one of them ends the others too
            folder, ended, more = _train(argv)
    except KeyboardInterrupt:
        interrupted.append(130)
        raise
    if not ended:
        print(f"stopped: {folder}; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    print(f"done: {folder}{more}", file=sys.stderr)


def _train(argv: list[str]) -> tuple[Path, bool, str]:
    """The run's folder, whether it came to the end that was asked for, and what to say of that end
    if it is not the run's own."""
    path, rest = argv[0], argv[1:]
    if path.startswith("-"):
        raise UserError(
            f"the first word must be a config file, got {path}; see cascade train --help"
        )
    workdir, rest = config.take(rest, "--workdir")
    until, rest = config.take(rest, "--until")
    job = read_job(path, rest, prog=f"cascade train {path}")
    from cascade.training.loop import fit

    folder, images = _workdir(workdir), _images(until)
    evaluate = None
    from cascade.training.stage_training import StageTraining

    if isinstance(job, StageTraining) and job.eval_every_images:
        from cascade.evaluation.while_training import WhileTraining

        evaluate = WhileTraining(job)
    ended, more = fit(job, folder, until=images, evaluate=evaluate), ""
    if images is not None and images < job.images:
        more = f", up to --until {images} of {job.images} images; without --until it goes on"
    return folder, ended, more


def read_job(path: str, words: Sequence[str], *, prog: str) -> Job:
    """What a config file returns, with the words laid over it. Raises UserError for no job.

    words: overrides of fields, arguments of its function config(), --lora-rank and --data.
    """
    rank, words = config.take(words, "--lora-rank")
    named, words = config.take(words, "--data")
    default, words = config.load_with(path, words)
    from cascade.training.job import Job
    from cascade.training.trainable import LoRA, Weights

    if not isinstance(default, Job):
        raise UserError(f"config {path}: config() must return a job, such as a StageTraining")
    config.check(default, f"config {path}")
    if rank is not None:
        if not rank.isdecimal():
            raise UserError(f"--lora-rank must be a whole number, 0 for all weights, got {rank}")
        if not hasattr(default, "init"):
            raise UserError(f"--lora-rank {rank}: is for stages, and this is {default.name}")
        trainable = LoRA(rank=int(rank)) if int(rank) else Weights()
        init, words = config.take(words, "--init")  # without which adapters are refused
        changes = {"trainable": trainable} | ({} if init is None else {"init": init})
        try:
            default = dataclasses.replace(default, **changes)
        except ValueError as e:
            raise UserError(f"--lora-rank {rank}: {e}") from None
    if named is not None:
        default = _with_data(default, named)
    return config.parse(type(default), words, default=default, prog=prog)


def _with_data(job: Any, named: str) -> Any:
    """The job, learning from the dataset that a word on the command line names."""
    from cascade.scenes.words import dataset

    if not hasattr(job, "data"):
        raise UserError(f"--data {named}: is for stages, and {job.name} has no pictures to choose")
    data, wanted = dataset(named), typing.get_type_hints(type(job))["data"]
    if not isinstance(data, wanted):
        raise UserError(f"--data {named}: a {type(job).__name__} takes {wanted.__name__} alone")
    return dataclasses.replace(job, data=data)


def _workdir(name: str | None) -> Path:
    if not name:
        raise UserError("--workdir DIR is missing: the folder of the run")
    folder = paths.path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {folder}: is a file; name a folder")
    return folder


def _images(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not int(text):
        raise UserError(f"--until must be a number of images, 1 or more, got {text}")
    return int(text)
