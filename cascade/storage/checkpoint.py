"""Checkpoints of a training run, which Orbax writes and reads.

A run's folder holds `checkpoints/STEP/{train,ema,config,data}`: what the optimizer owns, the
averaged weights, the config as JSON, and where the data stood. Each can be restored alone and on
any mesh. `STEP/SHA256SUMS`, written before a checkpoint appears, has the checksum of every file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import pathlib
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from cascade.errors import UserError
from cascade.storage import checksums, paths
from cascade.storage.paths import Path

ITEMS = ("train", "ema", "config", "data")


def check_name(folder: Path) -> None:
    """UserError for a folder whose name holds what libraries take for a pattern of names."""
    if found := re.search(r"[*?\[\]]", str(folder)):
        raise UserError(
            f"{folder}: a run's folder must be named without {found[0]}, or its checkpoints could "
            "not be found again; name another"
        )


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous: `close` (or the next save) waits."""

    def __init__(
        self, workdir: str | os.PathLike[str], keep: int | None = 3, *, clears: bool = False
    ):
        """workdir: the run's folder, here or in object storage, which is made if it is missing.
        keep: how many of the newest checkpoints stay there; None keeps all. clears: remove what a
        killed run had begun to write, which nobody may be writing now.
        Raises UserError for a folder whose name Orbax cannot read again.
        """
        folder = paths.path(workdir)
        check_name(folder)
        if isinstance(folder, pathlib.Path):
            folder = folder.absolute()  # for Orbax
        self.directory = folder / "checkpoints"
        paths.make_folder(self.directory)
        if clears:
            self._remove_begun()
        self._saving: int | None = None
        _hush_orbax()
        _write_small_arrays_whole()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
            item_names=ITEMS,
        )

    def steps(self) -> list[int]:
        """List the steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, *, train: Any, ema: Any, config: Any, data: Any) -> None:
        """Begin to write the checkpoint of a step; it appears complete or not at all.

        train, ema: pytrees of arrays. config, data: JSON values.
        Raises UserError when this one, or the one before, which was still being written, cannot be
        written; those before stay.
        """
        args = ocp.args.Composite(
            train=ocp.args.StandardSave(train),
            ema=ocp.args.StandardSave(ema),
            config=ocp.args.JsonSave(config),
            data=ocp.args.JsonSave(data),
        )
        with self._unwritten_is_told():
            self._manager.wait_until_finished()  # `_seal` is still busy with the one before
            self._saving = step
            self._manager.save(step, args=args)

    def restore(self, *, train: Any, ema: Any) -> tuple[int, Any, Any, Any]:
        """Read the newest checkpoint that can be read: (step, train, ema, data).

        train, ema: pytrees of ShapeDtypeStructs with the shardings to restore onto; those returned
        are such pytrees of arrays. A damaged checkpoint is passed over with a warning, and renamed
        to STEP.damaged1, so that the run can save that step again.
        Raises UserError when none is left.
        """
        step, found = self._newest(
            ocp.args.Composite(
                train=ocp.args.StandardRestore(train),
                ema=ocp.args.StandardRestore(ema),
                data=ocp.args.JsonRestore(),
            )
        )
        if damaged := [later for later in self.steps() if later > step]:
            if jax.process_index() == 0:
                for later in damaged:
                    self._set_aside(later)
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()
        return step, found["train"], found["ema"], found["data"]

    def restore_ema(self) -> tuple[int, dict[str, Any], Any]:
        """Read (step, EMA weights as NumPy arrays, config) of the newest readable checkpoint.

        One process can do it alone, whatever devices and processes have saved it.
        Raises UserError when no checkpoint can be read.
        """
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        step, found = self._newest(
            ocp.args.Composite(
                # The devices that a checkpoint was saved on need not be here.
                ema=ocp.args.StandardRestore(fallback_sharding=host),
                config=ocp.args.JsonRestore(),
            )
        )
        return step, jax.tree.map(np.asarray, found["ema"]), found["config"]

    def read_config(self) -> Any:
        """Read the config (JSON values) of the newest readable checkpoint; UserError if none is."""
        return self._newest(ocp.args.Composite(config=ocp.args.JsonRestore()))[1]["config"]

    def close(self) -> None:
        """Wait for the last save; UserError when it could not be written."""
        with self._unwritten_is_told():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _unwritten_is_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if (reason := _of_the_system(e)) is None:
                raise
            threading.Thread(target=_leave_after_all, daemon=True).start()
            for _ in range(20):  # writers that are still under way make folders again
                with contextlib.suppress(OSError):
                    self._remove_begun()
                time.sleep(0.05)
            if reason == os.strerror(errno.ENOENT):
                raise UserError(
                    f"{self.directory}: was removed while a checkpoint was written; what was in it "
                    "is lost: name a folder that nobody clears"
                ) from e
            kept = [p.name for p in self.directory.iterdir() if p.name.isdigit()]
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({reason}); complete ones "
                f"stay (steps {', '.join(sorted(kept, key=int)) or 'none yet'}); make room, then "
                "run the same command again"
            ) from e

    def _remove_begun(self) -> None:
        """Remove checkpoints that are not complete, and that nobody is writing."""
        if jax.process_index() == 0:
            for begun in [p for p in self.directory.iterdir() if ".orbax-checkpoint-tmp" in p.name]:
                epath.Path(begun).rmtree()

    def _seal(self) -> None:
        """Write the checksums of the checkpoint that is about to appear; one process does."""
        for folder in self.directory.iterdir():  # in object storage it has its last name already
            step, _, rest = folder.name.partition(".")
            if step == str(self._saving) and not rest.startswith("damaged"):
                files = [f for name in ITEMS for f in checksums.files_under(folder / name)]
                checksums.write(folder, files)

    def _set_aside(self, step: int) -> None:
        names = (self.directory / f"{step}.damaged{n}" for n in itertools.count(1))
        (self.directory / str(step)).rename(next(p for p in names if not p.exists()))

    def _newest(self, args: ocp.args.Composite) -> tuple[int, Any]:
        """Find the newest that all processes can read, each its own part, and read this part.

        Processes go on to the checkpoint before together.
        """
        reasons, steps = [], self.steps()
        while steps:
            step = steps.pop()
            folder = self.directory / str(step)
            found, reason = None, self._damage(folder, list(args.keys()))
            if _all_processes(reason is None):
                try:
                    with _quiet_orbax(), _own_reader() as reader:
                        found = reader.restore(folder, args=args)
                except Exception as e:  # whatever a damaged file makes Orbax's readers raise
                    reason = _first_line(e)
            if _all_processes(found is not None):
                return step, found
            reason = reason or "another process cannot read it"
            if not _all_processes(folder.exists()):  # its run has gone on, and removed it
                self._manager.reload()
                steps = [s for s in self.steps() if s != step]
                continue
            reasons.append(f"{step}: {reason}")
            warnings.warn(
                f"checkpoint {folder} cannot be read ({reason}) and is passed over", stacklevel=2
            )
        raise UserError(
            f"{self.directory}: no readable checkpoint ({'; '.join(reasons) or 'none was saved'}); "
            "restore the folder from a copy, or start again in an empty --workdir"
        )

    def _damage(self, folder: Path, items: list[str]) -> str | None:
        """Look through this process's share of the checkpoint's files."""
        part, parts = jax.process_index(), jax.process_count()
        try:
            return checksums.damage(folder, items, part=part, parts=parts)
        except OSError as e:
            return _first_line(e)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _own_reader() -> ocp.Checkpointer:
    """Make a reader that waits for no other process, which may have failed."""
    own = jax.process_index()
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}
        ),
    )


def _all_processes(ok: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(ok)).all())


def _leave_after_all() -> None:
    """When the program has ended, end the process with status 2, whatever else there is to do.

    Where a folder cannot be made, threads of Orbax wait for twenty minutes to be told that it is
    there, and Python waits for them.
    """
    threading.main_thread().join()
    time.sleep(5)
    os._exit(2)


_ORBAX = f"{os.sep}orbax{os.sep}"


@functools.cache
def _hush_orbax() -> None:
    """Leave out what Orbax says besides what it raises, which is told.

    It logs pages, and a traceback before it raises the same. Where a disk is full, its writers that
    failed after the first are futures that asyncio logs, each with a traceback; TensorStore has
    more to say to an event loop that is closed by then, which nobody can catch.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = show


@functools.cache
def _write_small_arrays_whole() -> None:
    """Let Orbax divide among its replicas only an array whose parts are large.

    Each part is cut off by a program of its own, which is compiled: for the hundreds of biases of a
    network on eight devices that takes seconds, to spare writing kilobytes.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    if record.name == "asyncio" and (error := record.exc_info and record.exc_info[1]):
        return _of_the_system(error) is None
    return not any(_ORBAX in text for text in (record.pathname, *files))


def _of_the_system(error: BaseException | None) -> str | None:
    """Find what the operating system said, if it caused this error, else None.

    TensorStore has it in its own text, `[OS error 28: ...]` or `[os_error_code='28']` by version.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if found := re.search(r"\[(?:OS error |os_error_code=')(\d+)", str(error)):
            return os.strerror(int(found[1]))
        error = error.__cause__ or error.__context__
    return None


class _quiet_orbax:
    """Orbax logs a page when it restores without shardings; onto the host is what is meant."""

    def __enter__(self):
        self._logger, self._filter = logging.getLogger("absl"), warnings.catch_warnings()
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)
        self._filter.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self._logger.setLevel(self._level)
        self._filter.__exit__(*error)
