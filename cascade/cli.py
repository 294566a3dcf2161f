"""The console command: `cascade <verb>`.

Each verb lives in a module of its own with a `main(argv)`; it is imported when it is asked for, so
that `cascade --help` needs no JAX. A person's mistake (UserError) is one line and exit status 2.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from cascade.errors import UserError

VERBS = {
    "sample": ("cascade.commands.sample", "draw pictures from prompts"),
    "train": (
        "cascade.commands.train",
        "train a stage or a text encoder; the same command resumes",
    ),
    "export": (
        "cascade.commands.export",
        "collect trained stages into a model folder for `sample --model`",
    ),
    "convert": (
        "cascade.commands.convert",
        "public weights (DeepFloyd IF, x4 upscaler) to a model folder",
    ),
    "eval": ("cascade.commands.eval", "measure a model: facts right, sweeps, properties"),
    "data": ("cascade.commands.data", "make or inspect a dataset"),
    "plan": (
        "cascade.commands.plan",
        "what a run needs on a TPU slice or GPUs that are not here",
    ),
    "bench": ("cascade.commands.bench", "measure this machine: time to a picture, training speed"),
}


# What a folder's permissions, a full disk or a name can do at any time: no fault of the program.
_OF_THE_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line. Exits 0 on success, 2 on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("cascade-diffusion"))
        return
    try:
        if argv[0] not in VERBS:
            from cascade.config import nearest

            raise UserError(f"{argv[0]!r} is no command of cascade{nearest(argv[0], list(VERBS))}")
        # So that what is half-written is cleared away; training has a handler of its own.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Worker threads and libraries read these at import.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
        importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as e:
        if e.errno not in _OF_THE_MACHINE:
            raise
        print(f"error: {e.filename or argv[0]}: {e.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def usage() -> str:
    lines = "\n".join(f"  {verb:<8} {help}" for verb, (_, help) in VERBS.items())
    return (
        "usage: cascade VERB ...\n\nText to image by cascaded pixel diffusion.\n\n"
        f"{lines}\n\n`cascade VERB --help` shows what a verb takes, with units and defaults; "
        "`cascade --version` which version this is."
    )
