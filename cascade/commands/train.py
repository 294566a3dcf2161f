"""Train a stage or a text encoder; the same command resumes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

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
  --until N      stop, with a checkpoint, after N images (of a text encoder: captions) in all
  --FIELD VALUE  override a field of the config; or an argument of its function config(), such as
                 the --init MODEL of configs/if/finetune_base64.py

`cascade train CONFIG --help` lists the config's fields with their values.

{distributed.HELP}"""

STOPPED = 143
"""The exit status of a run that was told to stop before its end: that of SIGTERM, in a shell."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade train` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    path, rest = argv[0], argv[1:]
    if path.startswith("-"):
        raise UserError(
            f"the first word must be a config file, got {path}; see cascade train --help"
        )
    workdir, rest = config.take(rest, "--workdir")
    until, rest = config.take(rest, "--until")
    defaults, rest = config.load_with(path, rest)
    xla_flags.apply(xla_flags.expected_backend(), os.environ)
    from cascade.training.job import Job
    from cascade.training.loop import fit

    if not isinstance(defaults, Job):
        raise UserError(f"config {path}: config() must return a job, such as a StageTraining")
    job = config.parse(type(defaults), rest, default=defaults, prog=f"cascade train {path}")
    folder, images = _workdir(workdir), _images(until)
    with distributed.processes():
        ended = fit(job, folder, until=images)
    if not ended:
        print(f"stopped: {folder}; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    print(f"done: {folder}", file=sys.stderr)


def _workdir(name: str | None) -> Path:
    if name is None:
        raise UserError("--workdir DIR is missing: the folder of the run")
    folder = paths.path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {folder}: is a file; name a folder")
    return folder


def _images(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"--until must be a number of images, got {text}")
    return int(text)
