"""`cascade bench`: figures of this machine, as JSON on stdout."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade import config
from cascade.errors import UserError

PROMPT = "a small red circle above a big blue square on gray"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Time `cascade sample` as a person meets it: whole processes, one prompt to the last stage.

    The first run starts with an empty compilation cache, the second one finds it filled.
    """

    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    prompt: str = PROMPT
    """What to draw."""


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: cascade bench sample [--model NAME|DIR] [--prompt TEXT]")
        return
    if argv[0] != "sample":
        raise UserError(f"cascade bench {argv[0]}: only `cascade bench sample` exists")
    options = config.parse(SampleOptions, argv[1:], prog="cascade bench sample")
    print(json.dumps(bench_sample(options), indent=2))


def bench_sample(options: SampleOptions) -> dict[str, Any]:
    """Seconds of a first and a second run, and the peak memory of the larger, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "cascade", "sample", options.prompt),
            *("--model", options.model, "--out", str(Path(folder) / "samples")),
        ]
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        seconds = []
        for name in ("first run", "second run"):
            print(f"{name} ...", file=sys.stderr)
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds.append(round(time.perf_counter() - start, 2))
            if done.returncode:
                raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return {
        "first_run_seconds": seconds[0],
        "second_run_seconds": seconds[1],
        "peak_memory_bytes": peak,
        "cores": os.cpu_count(),
    }
