"""The figures of a run: metrics.jsonl, TensorBoard, loss.png, and Weights & Biases if asked.

A row holds the means of its steps: loss and norms (of steps whose update was finite), `skipped`
(how many were not), images_per_second, step_seconds, data_wait_seconds (of a step, until its batch
was there), tflops_per_device, mfu (of a device whose peak is known), and memory_gib (the most that
a device of this process held so far, where its driver tells). Speeds are without the step that
compiles. A run that could not read some records of its data also has skipped_records/REASON, how
many different ones by then (of the first 10,000). The first row after a run went on with another
command has `changed`, what is otherwise, which the plot marks.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cascade.devices.chips import chip_of
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path

# Drawing the curve takes as long as many small steps, and nobody looks more often.
PLOT_SECONDS = 20.0


class TrainingLog:
    """The log of a run, which the first process alone writes.

    It begins by dropping the rows past the resumed step. For a workdir in object storage, it writes
    to a folder here, and each row copies it there.
    """

    def __init__(
        self,
        workdir: Path,
        title: str,
        *,
        step: int,
        pending: Sequence[dict[str, Any]] = (),
        batch_size: int,
        step_flops: float | None = None,
        skip_limit: int,
        wandb: str | None = None,
        config: Any = None,
        changed: str = "",
    ):
        """pending: what `pending()` gave when the run stopped. step_flops: FLOPs of one step on
        all devices together. skip_limit: see `diverged`.

        wandb: name of a Weights & Biases project. config: JSON values, for its page. changed: what
        the command has changed, for the next row.
        """
        self._title, self._batch_size, self._step_flops = title, batch_size, step_flops
        self._skip_limit, self._skipped_in_a_row = skip_limit, 0
        self.changed = changed
        self._pending: list[dict[str, Any]] = list(pending)
        self._checked, self._waited = 0, 0.0
        self._since = (time.perf_counter(), step)
        self._compiled = self._since
        self._writers: list[Any] = []
        self._on = jax.process_index() == 0
        if not self._on:
            return
        self._workdir, self._own = workdir, None
        if isinstance(workdir, pathlib.Path):
            folder = workdir
        else:
            self._own = tempfile.TemporaryDirectory()
            folder = pathlib.Path(self._own.name)
        before = workdir / "metrics.jsonl"
        paths.check_regular(before)
        read = before.read_bytes() if before.exists() else b""
        lines = read.decode(errors="replace").splitlines()
        self._path, self._picture = folder / "metrics.jsonl", folder / "loss.png"
        self._plotted = self._since[0]
        # A text encoder's run of an earlier version counted steps alone.
        rows = [row for row in map(_parsed, lines) if row and row["step"] <= step]
        self._rows = [{"images": row["step"] * batch_size, **row} for row in rows]
        with paths.writing(self._path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._writers = [_TensorBoard(folder, step)]
        if wandb:
            self._writers.append(_WeightsAndBiases(wandb, workdir, folder, config))
        self._chip = chip_of(jax.devices()[0].device_kind)
        if self._chip is None and step_flops and jax.default_backend() != "cpu":
            kind = jax.devices()[0].device_kind
            print(f"{kind}: its peak is not in the table, so no MFU is given", file=sys.stderr)

    @property
    def latest(self) -> dict[str, Any]:
        """What was added last, if anything was since the last row."""
        return self._pending[-1] if self._pending else {}

    @property
    def diverged(self) -> bool:
        """Whether the last skip_limit steps were all skipped, as far as `latest` was waited for."""
        return self._skipped_in_a_row >= self._skip_limit

    def add(self, metrics: dict[str, jax.Array], waited: float) -> None:
        """The metrics of a step, with those before already computed. waited: for data, seconds."""
        self._check()
        self._pending.append(metrics)
        self._waited += waited

    def compiled(self, step: int) -> None:
        """Say that the first step, which compiles, is done: speed is that of the others."""
        self._compiled = (time.perf_counter(), step)

    def pause(self, seconds: float) -> None:
        """Say that no step was taken for so long; speed is that of the steps."""
        self._since = (self._since[0] + seconds, self._since[1])
        self._compiled = (self._compiled[0] + seconds, self._compiled[1])

    def pending(self) -> list[dict[str, Any]]:
        """The figures of the steps since the last row, as JSON values."""
        return jax.tree.map(lambda x: np.asarray(x).item(), jax.device_get(self._pending))

    def write(
        self, step: int, skipped: Mapping[str, int] = {}, figures: Mapping[str, float] = {}
    ) -> dict[str, Any]:
        """Write and return the row of the steps since the last one.

        skipped: how many records of the data the run could not read by now, by reason.
        figures: of the averaged weights, "validation/..." of what is never trained on and
        "eval/..." of what they draw, if they were taken at this step.
        """
        self._check()
        pending, self._pending, self._checked = jax.device_get(self._pending), [], 0
        good = [m for m in pending if not m["skipped"]]
        row: dict[str, Any] = {"step": step, "images": step * self._batch_size}
        for name in pending[0]:
            row[name] = float(np.mean([float(m[name]) for m in good])) if good else None
        row["skipped"] = len(pending) - len(good)
        row |= {f"skipped_records/{reason}": count for reason, count in skipped.items()}
        row |= figures
        row |= self._speed(step)
        row |= {"changed": self.changed} if self.changed else {}
        self.changed = ""
        if self._on:
            self._rows.append(row)
            with self._path.open("a") as f:
                f.write(json.dumps(row) + "\n")
            told = row.get("changed")
            for writer in self._writers:
                writer.write({k: v for k, v in row.items() if v not in (None, told)}, step)
            if self._since[0] - self._plotted > PLOT_SECONDS:
                self._plot()
            self._copy()
        return row

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        if self._on:
            self._plot()
            self._copy()

    def _plot(self) -> None:
        _plot_loss(self._rows, self._picture, self._title)
        self._plotted = self._since[0]

    def _copy(self) -> None:
        if self._own is not None:
            paths.copy_folder(pathlib.Path(self._own.name), self._workdir)

    def _check(self) -> None:
        for metrics in self._pending[self._checked :]:
            skipped = bool(metrics["skipped"])
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self._checked = len(self._pending)

    def _speed(self, step: int) -> dict[str, Any]:
        then, before = max(self._since, self._compiled)
        if before == step:  # that was all
            then, before = self._since
        now = time.perf_counter()
        self._since, waited, self._waited = (now, step), self._waited, 0.0
        steps, seconds = step - before, now - then
        speed = {
            "images_per_second": round(steps * self._batch_size / seconds, 2),
            "step_seconds": round(seconds / steps, 5),
            "data_wait_seconds": round(waited / steps, 5),
        }
        if self._step_flops:
            flops = self._step_flops * steps / seconds / jax.device_count()
            speed["tflops_per_device"] = _significant(flops / 1e12)
            if self._on and self._chip is not None:
                speed["mfu"] = _significant(flops / self._chip.flops)
        memory = [device.memory_stats() or {} for device in jax.local_devices()]
        if held := [one["peak_bytes_in_use"] for one in memory if "peak_bytes_in_use" in one]:
            speed["memory_gib"] = round(max(held) / 2**30, 3)
        return speed


class _TensorBoard:
    """What an earlier writer has of steps after `step` is not shown.

    Events are written here: the thread that tensorboardX has for it ends in silence when the disk
    is full, and whoever closes it waits without end.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        (folder / "tensorboard").mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "tensorboard" / "events"))
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.flush()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))

    def write(self, row: dict[str, Any], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in row.items():
            self._add(step, summary=scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A resumed run goes on in the same page: its id is made of the folder's path."""

    def __init__(self, project: str, workdir: Path, folder: pathlib.Path, config: Any):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                f"wandb={project}: Weights & Biases is not installed; pip install wandb, or leave "
                "the field out"
            ) from None
        path = workdir.absolute() if isinstance(workdir, pathlib.Path) else workdir
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", path.name)[:64]  # others it refuses in an id
        self._run = wandb.init(
            project=project,
            id=f"{plain}-{zlib.crc32(str(path).encode()):08x}",
            name=path.name[:128],
            dir=str(folder),
            config=config,
            resume="allow",
        )

    def write(self, row: dict[str, Any], step: int) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()


def _plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    evaluated = sorted({name for row in rows for name in row if name.startswith("eval/")})
    figure = Figure(figsize=(6, 4 + 2 * len(evaluated)), layout="constrained")
    ratios = [2] + [1] * len(evaluated)
    panels = figure.subplots(len(ratios), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    axes = panels[0]
    for panel, name in zip(panels[1:], evaluated, strict=True):
        some = [row for row in rows if name in row]
        panel.plot([row["images"] for row in some], [row[name] for row in some], marker=".")
        panel.set(ylabel=name.removeprefix("eval/").replace("_", " "))
        panel.grid(alpha=0.3)
    seen = [r for r in rows if r["loss"] is not None]
    axes.plot([r["images"] for r in seen], [r["loss"] for r in seen], marker="." * (len(seen) < 3))
    axes.set(ylabel="loss", yscale="log", title=title)
    panels[-1].set(xlabel="images seen")
    if held_out := [r for r in rows if "validation/loss" in r]:
        images = [r["images"] for r in held_out]
        for name in sorted(n for n in held_out[-1] if n.startswith("validation/loss")):
            values = [r.get(name, math.nan) for r in held_out]
            _, _, level = name.partition("_")
            label = f"held out, t in {level}" if level else "held out"
            axes.plot(images, values, label=label, linewidth=0.7 if level else 2)
        axes.legend(fontsize="x-small")
    for before, row in zip([{"images": 0}, *rows], rows, strict=False):
        if "changed" in row:  # since the row before
            axes.axvline(
                before["images"], color="tab:red", linestyle="--", label=row["changed"][:60]
            )
    if any("changed" in row for row in rows):
        axes.legend(fontsize="x-small", title="from here on")
    axes.grid(alpha=0.3)
    with paths.writing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _significant(x: float, digits: int = 4) -> float:
    return round(x, digits - 1 - math.floor(math.log10(x))) if x > 0 else 0.0


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the line a killed run was writing
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 1:
        return None
    numbers = [value for name, value in row.items() if name != "changed"]
    whole = all(v is None or isinstance(v, int | float) for v in numbers) and "loss" in row
    return row if whole and isinstance(row.get("changed", ""), str) else None
