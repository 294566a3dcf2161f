"""Checkpoints of a training run (Orbax), and the folders of weights that sampling reads.

A run's folder holds `checkpoints/STEP/{train,ema,config,data}`: what the optimizer owns, the
averaged weights, the config as JSON, and where the data stood. Each can be restored alone and on
any mesh. An exported folder holds `config.json` and `model.safetensors`; reading one runs no code.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous: `close` (or the next save) waits."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int | None = 3):
        """keep: how many of the newest stay on disk; None keeps all."""
        folder = paths.path(workdir)
        if isinstance(folder, pathlib.Path):
            folder = folder.absolute()  # for Orbax
        self.directory = folder / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("train", "ema", "config", "data"),
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, *, train: Any, ema: Any, config: Any, data: Any) -> None:
        """train, ema: pytrees of arrays. config, data: JSON values. Complete or not there.

        UserError when this one, or the one before, which was still being written, cannot be
        written; those before stay.
        """
        args = ocp.args.Composite(
            train=ocp.args.StandardSave(train),
            ema=ocp.args.StandardSave(ema),
            config=ocp.args.JsonSave(config),
            data=ocp.args.JsonSave(data),
        )
        with self._unwritten_is_told():
            self._manager.save(step, args=args)

    def restore(self, *, train: Any, ema: Any) -> tuple[int, Any, Any, Any]:
        """(step, train, ema, data) of the newest checkpoint that can be read.

        train, ema: pytrees of ShapeDtypeStructs with the shardings to restore onto. A damaged
        checkpoint is passed over with a warning, and renamed to STEP.damaged1, so that the run can
        save that step again; UserError when none is left.
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
        """(step, EMA weights as NumPy arrays, config) of the newest readable checkpoint.

        By one process alone, whatever devices and processes have saved it.
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
        """The config (JSON values) of the newest checkpoint."""
        return self._newest(ocp.args.Composite(config=ocp.args.JsonRestore()))[1]["config"]

    def close(self) -> None:
        """Waits for the last save; UserError when it could not be written."""
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
            kept = [p.name for p in self.directory.iterdir() if p.name.isdigit()]
            raise UserError(
                f"{self.directory}: a checkpoint could not be written ({reason}); complete ones "
                f"stay (steps {', '.join(sorted(kept, key=int)) or 'none yet'}); make room, then "
                "run the same command again"
            ) from e

    def _set_aside(self, step: int) -> None:
        names = (self.directory / f"{step}.damaged{n}" for n in itertools.count(1))
        (self.directory / str(step)).rename(next(p for p in names if not p.exists()))

    def _newest(self, args: ocp.args.Composite) -> tuple[int, Any]:
        """That all processes can read, each its own part: they go on to the one before together."""
        reasons = []
        for step in reversed(self.steps()):
            found, reason = None, "another process cannot read it"
            try:
                with _quiet_orbax(), _own_reader() as reader:
                    found = reader.restore(self.directory / str(step), args=args)
            except Exception as e:  # Orbax raises whatever the damaged file made its readers raise
                reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
            if _all_processes(found is not None):
                return step, found
            reasons.append(f"{step}: {reason}")
            warnings.warn(
                f"checkpoint {self.directory / str(step)} cannot be read and is passed over",
                stacklevel=2,
            )
        raise UserError(
            f"{self.directory}: no readable checkpoint ({'; '.join(reasons) or 'none was saved'}); "
            "restore the folder from a copy, or start again in an empty --workdir"
        )


def _own_reader() -> ocp.Checkpointer:
    """One that waits for no other process, which may have failed."""
    own = jax.process_index()
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}
        ),
    )


def _all_processes(ok: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(ok)).all())


def save_safetensors(
    path: Path,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] = {},
) -> None:
    """Nested dicts of arrays -> one file with keys such as `levels.0.conv.kernel`.

    dtype: what floating arrays are stored as. The file appears whole or not at all.
    """
    flat = {
        ".".join(str(k.key) for k in keys): np.asarray(leaf).astype(dtype)
        for keys, leaf in jax.tree.leaves_with_path(dict(params))
    }
    with paths.writing(path) as file:
        save_file(flat, file, metadata=dict(metadata))
        file.chmod(0o644)  # safetensors makes files that only their owner may read


def load_safetensors(path: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `save_safetensors`, as float32, checked against the expected shapes.

    abstract: nested dicts of ShapeDtypeStructs. Raises UserError that lists what is missing, left
    over or of another shape.
    """
    try:
        with paths.reading(path) as file:
            flat = load_file(file)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is this a folder that `cascade export` wrote?"
        ) from None
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: damaged or not a safetensors file ({e}); copy it again") from None
    names = [
        (".".join(str(k.key) for k in keys), leaf.shape)
        for keys, leaf in jax.tree.leaves_with_path(dict(abstract))
    ]
    expected = dict(names)
    problems = [f"missing {name}" for name in expected if name not in flat]
    problems += [f"left over {name}" for name in flat if name not in expected]
    problems += [
        f"{name} has shape {flat[name].shape}, expected {shape}"
        for name, shape in names
        if name in flat and flat[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path} does not fit the network's config: {'; '.join(problems[:3])}{more}"
        )
    leaves = [flat[name].astype(np.float32) for name, _ in names]
    return jax.tree.unflatten(jax.tree.structure(dict(abstract)), leaves)


def _of_the_system(error: BaseException | None) -> str | None:
    """What the operating system said, if it caused this: TensorStore has it in its own text,
    `[OS error 28: ...]` or `[os_error_code='28']` by its version."""
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
