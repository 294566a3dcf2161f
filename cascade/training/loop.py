"""The only training loop: `fit(job, workdir)`, whatever the job is.

A run lives in one folder. The same command starts it and, when the folder holds a checkpoint,
continues it with the numbers it would have had: parameters, optimizer, averages, the place in the
data and the random keys (all folded from seed and step) are restored. Progress is counted in
images. In order:

    1  the mesh, the folder, which nobody else may use meanwhile, the run that it holds, and what
       the job needs while it runs: all that may be wrong is found here
    2  the state: restored from the newest checkpoint, or the job's own first weights
    3  until the last step: a batch, prepared; the step; figures, the loss of what is held out,
       checkpoints, snapshots and previews when they are due; whether somebody asked to stop
    4  the last checkpoint is waited for; a run that diverged says so, one that ended finishes
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cascade.config import from_json, read_json, to_json
from cascade.devices import distributed, sharding
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.published import earlier_versions
from cascade.storage import paths
from cascade.storage.checkpoint import Checkpoints, check_name
from cascade.storage.lock import Lock
from cascade.storage.paths import Path
from cascade.storage.weights import save_safetensors
from cascade.training.job import Batches, Job, Running
from cascade.training.log import TrainingLog
from cascade.training.skipped import Skipped
from cascade.training.step import State, begin, make_train_step, step_flops, whole

Evaluate = Callable[[Running, Any], Mapping[str, float]]
"""What a job has open, and its averaged weights -> figures by name; all processes call it."""


def fit(
    job: Job,
    workdir: str | os.PathLike[str],
    *,
    until: int | None = None,
    evaluate: Evaluate | None = None,
) -> bool:
    """Train in `workdir`, from its newest checkpoint if it has one; whether it came to its end.

    workdir: a folder here, or gs://BUCKET/NAME or s3://BUCKET/NAME. until: end (with a checkpoint)
    after this many images instead of job.images. evaluate: gives figures for metrics.jsonl, as
    often as the job wants them; None gives none. SIGTERM and Ctrl-C save a checkpoint and return
    False. Several processes (jax.distributed) call it alike; a SIGTERM to any of them stops all.
    Raises UserError when skip_limit updates in a row were not finite, with the state before them
    saved, and at once where another training holds the folder, or processes were started unlike.
    """
    with _Folder(paths.path(workdir)) as folder:
        try:
            return _fit(job, folder, until, evaluate)
        except OSError as e:
            if e.errno not in paths.FULL:
                raise
            raise UserError(
                f"{folder.path}: cannot be written to ({e.strerror}); complete checkpoints stay; "
                "make room, then run the same command again"
            ) from None


def _fit(job: Job, folder: _Folder, until: int | None, evaluate: Evaluate | None) -> bool:
    workdir = folder.path
    check_name(workdir)
    if job.minutes is not None and jax.process_count() > 1:
        raise UserError(
            f"minutes={job.minutes}: several processes have no common clock; give images instead"
        )
    distributed.agree(
        {
            "config": json.dumps(to_json(job)),  # what cannot be saved is told before training too
            "--until": str(until),
            "--workdir": str(workdir),
            "version of this program": metadata.version("cascade-diffusion"),
        }
    )
    mesh = sharding.make_mesh(job.mesh)
    check_batch(job, mesh)
    folder.claim_if_there()
    saved, changed = _saved_config(job, workdir)
    optimizer = job.transformation()
    if job.trainable.freezes:
        _check_trainable(job, optimizer)
    running = job.open(mesh, workdir)
    data = running.batches
    checkpoints = None if saved is None else Checkpoints(workdir, keep=job.keep, clears=True)
    state, placement, unwritten = _initial_state(job, optimizer, mesh, checkpoints, saved, data)
    changed = "; ".join(dict.fromkeys(filter(None, (unwritten.changed, changed))))
    folder.claim()  # after all that may be wrong
    if jax.process_index() == 0:
        paths.write_json(workdir / "config.json", to_json(job))
    if checkpoints is None:
        checkpoints = Checkpoints(workdir, keep=job.keep, clears=True)
    step = int(state["train"]["step"])
    last = job.steps if until is None else min(job.steps, -(-until // job.batch_size))
    clock = None if job.minutes is None else _Clock(job.minutes, last)
    replicated = () if clock is None else (sharding.replicated(mesh),)
    train_step = jax.jit(
        make_train_step(job, optimizer, mesh),
        in_shardings=(placement, sharding.batch_sharding(mesh), *replicated),
        out_shardings=(placement, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    log = None
    profile = _Profile(workdir / "profile", job.profile_steps)
    stop = _StopSignal()
    skipped = Skipped(workdir, step * job.batch_size)
    shown = bar(
        total=min(job.images, last * job.batch_size),
        initial=min(step * job.batch_size, job.images),
        unit="img",
        desc=job.name,
        smoothing=0.05,
        disable=jax.process_index() != 0,
    )
    with shown, stop, profile, contextlib.closing(checkpoints):
        ends = begun = step >= last
        while not ends:
            if not begun:
                shown.set_postfix_str("compiling")
            before = time.perf_counter()
            batch = next(data)
            waited = time.perf_counter() - before
            skipped.add(running.skipped(), (step + 1) * job.batch_size)
            batch = running.prepare(batch, step)
            ends_at = ()
            if clock is not None:
                last = clock.last(step)
                shown.total = last * job.batch_size
                ends_at = (np.int32(last),)
            if log is None:
                given = (state, batch, *ends_at)
                work = step_flops(job, train_step, *given) if job.even else None
                log = _log(job, workdir, step, work, unwritten.figures, changed)
            profile.before_step()
            state, metrics = train_step(state, batch, *ends_at)
            # One step may be under way while the next is prepared; more would only hide progress.
            jax.block_until_ready(log.latest)
            step += 1
            if folder.is_lost:
                raise UserError(
                    f"{workdir}: another training has taken this folder over, as this one gave no "
                    "sign of life for a while; it goes on there"
                )
            if not begun:  # the speed is that of the steps
                jax.block_until_ready(metrics)
                log.compiled(step)
                shown.set_postfix_str("")
                shown.unpause()
                begun = True
            shown.update(min(job.batch_size, job.images - (step - 1) * job.batch_size))
            log.add(metrics, waited)
            ends = step >= last or log.diverged
            validates, evaluates = (
                every > 0 and (step >= last or _due(step, every, job)) and not log.diverged
                for every in (running.validate_every_images, running.evaluate_every_images)
            )
            if ends or validates or evaluates or _due(step, job.log_every_images, job):
                folder.check_there()
                figures: dict[str, float] = {}
                jax.block_until_ready(metrics)
                paused = time.perf_counter()
                if validates:
                    figures |= running.validate(whole(job, state, state["ema"]))
                if evaluates and evaluate is not None:
                    shown.set_postfix_str("evaluating")
                    figures |= evaluate(running, whole(job, state, state["ema"]))
                log.pause(time.perf_counter() - paused)
                loss = log.write(step, skipped.counts, figures)["loss"]
                shown.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}")
            ends = stop.asked(step) or ends  # no row for it: those of a stopped run are as others'
            if ends:
                shown.set_postfix_str("saving a checkpoint")
            if ends or _due(step, job.save_every_images, job):
                folder.check_there()
                kept = {"train": state["train"], "ema": state["ema"]}
                at = {**data.get_state(), _FIGURES: log.pending(), _CHANGED: log.changed}
                checkpoints.save(step, **kept, config=to_json(job), data=at)
            if job.ema_profiles and (ends or _due(step, job.ema_snapshot_images, job)):
                _snapshot(state["train"]["profiles"], workdir, step)
            if job.preview_every_images and (
                step >= last or _due(step, job.preview_every_images, job)
            ):
                shown.set_postfix_str("drawing a preview")
                file = workdir / "previews" / f"{step * job.batch_size:010d}.png"
                running.preview(whole(job, state, state["ema"]), batch, file)
    if log is not None:
        log.close()
        if log.diverged:
            raise UserError(
                f"training diverged: the last {job.skip_limit} updates, up to image "
                f"{step * job.batch_size}, were not finite and left out; the weights before "
                "them are saved; lower the learning rate or the norm that gradients are clipped "
                "at, and run again"
            )
    if step >= job.steps or (clock is not None and until is None and step >= last):
        running.finish(whole(job, state, state["ema"]))
    return step >= last


def saved_job(value: Any, where: str) -> Job:
    """The job whose config is in a checkpoint; fields added since have their defaults."""
    return from_json(Job, earlier_versions.upgraded(value), where)


def saved_weights(job: Job, saved: Any, weights: Any) -> Any:
    """Averaged weights of a checkpoint with that saved config, with today's names."""
    if not earlier_versions.is_old(saved):
        return weights
    abstract = jax.eval_shape(lambda: begin(job, job.transformation(), job.fresh(_key(job))))
    return earlier_versions.as_new(weights, abstract["ema"], earlier_versions.old_path_of(job))


def frozen(job: Job) -> Any:
    """What a run has frozen, read or made again."""
    if not job.trainable.freezes:
        return {}
    params = job.start()
    params = job.fresh(_key(job)) if params is None else params
    return begin(job, job.transformation(), params).get("frozen", {})


def check_batch(job: Job, mesh: Mesh) -> None:
    """UserError unless every device gets an equal share of every microbatch."""
    micro = job.batch_size // job.microbatches
    if micro % (parts := sharding.batch_parts(mesh)):
        raise UserError(
            f"batch_size={job.batch_size} / microbatches={job.microbatches} = {micro} "
            f"must be a multiple of the {parts} parts that the mesh's data and fsdp axes make of it"
        )


def _check_trainable(job: Job, optimizer: Any) -> None:
    """UserError where what trains is no part of the parameters."""
    try:
        jax.eval_shape(lambda key: begin(job, optimizer, job.fresh(key)), _key(job))
    except ValueError as e:
        raise UserError(str(e)) from None


def _initial_state(
    job: Job,
    optimizer: Any,
    mesh: Mesh,
    checkpoints: Checkpoints | None,
    saved: Any,
    data: Batches,
) -> tuple[State, Any, _Unwritten]:
    """The state, where each array is put, and what is in no row yet.

    saved: as `_saved_config` gave it; checkpoints: None where that is None.
    """

    def init(key):
        return begin(job, optimizer, job.fresh(key))

    abstract = jax.eval_shape(init, _key(job))
    placement = sharding.shardings(abstract, mesh)
    place = functools.partial(sharding.shardings, mesh=mesh)

    def started() -> State:
        params = job.start(place)
        if params is None:
            return jax.jit(init, out_shardings=placement)(_key(job))
        begun = functools.partial(begin, job, optimizer)
        return jax.jit(begun, out_shardings=placement, donate_argnums=0)(params)

    if checkpoints is None:
        return started(), placement, _Unwritten()
    if not checkpoints.steps():
        state = earlier_versions.text_run_state(checkpoints.directory.parent / _EARLIER, started())
        data.set_state({"examples": int(state["train"]["step"]) * job.batch_size})
        return jax.device_put(state, placement), placement, _Unwritten()
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placement
    )
    target.pop("frozen", None)
    if earlier_versions.is_old(saved):
        renamed = earlier_versions.old_path_of(job)
        at, train, ema, data_state = checkpoints.restore(**earlier_versions.as_old(target, renamed))
        state = earlier_versions.as_new({"train": train, "ema": ema}, target, renamed)
    else:
        at, train, ema, data_state = checkpoints.restore(**target)
        state = {"train": train, "ema": ema}
    try:
        unwritten = _Unwritten(data_state.pop(_FIGURES, []), data_state.pop(_CHANGED, ""))
        data.set_state(data_state)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{checkpoints.directory}: the place in the data of checkpoint {at} is damaged "
            f"({data_state!r}); remove the folder {at} to go on from the one before"
        ) from None
    if job.trainable.freezes:
        state |= {k: v for k, v in started().items() if k == "frozen"}
    return state, placement, unwritten


def _key(job: Job) -> jax.Array:
    # Threefry, JAX's default, would take minutes to compile for some hundred parameters.
    return jax.random.key(job.seed, impl="rbg")


class _Unwritten(NamedTuple):
    """What a checkpoint keeps for the next row; earlier versions kept none."""

    figures: Sequence[dict[str, Any]] = ()
    """The figures of the steps since the last row."""
    changed: str = ""
    """What the command had changed when the run went on."""


_FIGURES, _CHANGED = "figures", "changed"
"""Where the place in the data keeps them."""
_EARLIER = "state.safetensors"
"""What earlier versions kept a text encoder's run in."""


def _saved_config(job: Job, workdir: Path) -> tuple[Any, str]:
    """The config of the run that the folder holds, as JSON, and what the job has otherwise; None if
    it holds none. UserError where the job cannot go on with it."""
    saved, changed = None, ""
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints(workdir)
        saved = checkpoints.read_config() if checkpoints.steps() else None
        checkpoints.close()
    if saved is None and (workdir / _EARLIER).exists():
        saved = read_json(workdir / "config.json")
    if saved is not None:
        there = saved_job(saved, str(workdir))
        _check_fixed(job, there, workdir)
        changed = "; ".join(_differences(to_json(there), to_json(job)))
        if changed and jax.process_index() == 0:
            told = f"{workdir}: goes on with what the command has changed: {changed}"
            print(told, file=sys.stderr)
    multihost_utils.sync_global_devices("the run was looked at")  # before any process begins one
    return saved, changed


def _check_fixed(job: Job, there: Job, workdir: Path) -> None:
    """UserError where a run would go on with what it cannot change."""
    if type(there) is not type(job):
        raise UserError(
            f"{workdir}: holds a run of another kind ({type(there).__name__}, this is a "
            f"{type(job).__name__}); name another --workdir"
        )
    now = job.fixed
    for name, was in there.fixed.items():
        if was != now.get(name):
            a, b = to_json(was), to_json(now.get(name))
            raise UserError(
                f"{workdir}: holds a run with another config ({_differences(a, b, name)[0]}); use "
                "its config, or another folder"
            )


def _log(
    job: Job,
    workdir: Path,
    step: int,
    step_flops: float | None,
    figures: Sequence[dict[str, Any]],
    changed: str,
) -> TrainingLog:
    return TrainingLog(
        workdir,
        job.name,
        step=step,
        pending=figures,
        batch_size=job.batch_size,
        step_flops=step_flops,
        skip_limit=job.skip_limit,
        wandb=job.wandb,
        config=to_json(job),
        changed=changed,
    )


def _due(step: int, every_images: int, job: Job) -> bool:
    """Whether this step passed a multiple of `every_images`."""
    b = job.batch_size
    return step * b // every_images > (step - 1) * b // every_images


def _snapshot(profiles: dict[str, Any], workdir: Path, step: int) -> None:
    """Write ema/STEP_WIDTH.safetensors for every width; process 0 does, all take part."""
    folder = workdir / "ema"
    folder.mkdir(exist_ok=True)
    for width, params in profiles.items():
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        if jax.process_index() == 0:
            save_safetensors(folder / f"{step:010d}_{width}.safetensors", params)


class _Folder:
    """The folder of a run, which nobody else trains in between `claim` and the end of the block.

    If nothing was written into it that stays, it goes again, with the parents that were made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: Lock | None = None
        self._claimed = False
        self._made: list[Path] = []

    def __enter__(self) -> _Folder:
        return self

    def claim_if_there(self) -> None:
        """Claim the folder if there is one; UserError where another training holds it."""
        there = multihost_utils.process_allgather(np.array(self.path.is_dir()))
        if there.all():
            self.claim()

    def claim(self) -> None:
        """Make the folder, and hold it from now on; UserError where another training does."""
        if not self._claimed:
            distributed.all_or_none(self._hold)
            self._claimed = True

    @property
    def is_lost(self) -> bool:
        return self._lock is not None and self._lock.lost

    def check_there(self) -> None:
        """UserError if somebody has removed what was written here, as rows and config."""
        if jax.process_index() == 0 and not (self.path / "config.json").exists():
            raise UserError(
                f"{self.path}: was removed, or its config.json, while it was trained in; what was "
                "in it is lost: name a folder that nobody clears"
            )

    def _hold(self) -> None:
        if not paths.is_remote(self.path):
            self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        paths.make_folder(self.path)
        self._lock = Lock(self.path).__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._lock is not None:
            self._lock.__exit__()
        with contextlib.suppress(OSError):  # those that are not empty stay
            for made in self._made:
                made.rmdir()


class _Clock:
    """Tells which step will be the last that the minutes of a run allow, at its speed by now."""

    def __init__(self, minutes: float, most: int):
        """most: the last step in any case."""
        self._end, self._most, self._asked = time.perf_counter() + 60 * minutes, most, 0
        self._begun: collections.deque[float] = collections.deque(maxlen=50)

    def last(self, step: int) -> int:
        """The number of the last step; to be asked before each, after `step` of them."""
        now = time.perf_counter()
        self._asked += 1
        if self._asked > 2:  # the first two compile
            self._begun.append(now)
        if len(self._begun) < 2:
            return self._most
        seconds = (now - self._begun[0]) / (len(self._begun) - 1)
        return min(self._most, step + max(1, int((self._end - now) / seconds)))


class _Profile:
    """While entered, traces `steps` steps after the first three, which compile and warm up."""

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps, self._done, self._on = folder, steps, 0, False
        self._own = tempfile.TemporaryDirectory() if steps and paths.is_remote(folder) else None

    def __enter__(self) -> _Profile:
        return self

    def before_step(self) -> None:
        if self._steps and self._done == 3:
            jax.profiler.start_trace(self._own.name if self._own else str(self._folder))
            self._on = True
        if self._done == 3 + self._steps:
            self.__exit__()
        self._done += 1

    def __exit__(self, *error: Any) -> None:
        if self._on:
            jax.profiler.stop_trace()
            if self._own:
                paths.copy_folder(pathlib.Path(self._own.name), self._folder)
        self._on = False


class _StopSignal:
    """While entered, SIGTERM, and the first SIGINT, make `asked` true and do nothing else.

    So whoever takes a machine away may say so again while the last checkpoint is being written; a
    second Ctrl-C acts as usual. A thread says at once that it was heard: the compiler, while it is
    at work, lets no handler run. Of several processes each must stop after the same step: JAX has
    its own handler of SIGTERM then, and agrees with the others on one.
    """

    def __init__(self):
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self):
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for s in (signal.SIGTERM, signal.SIGINT):
                self._old[s] = signal.signal(s, self._ask)
            heard, self._rings = os.pipe()
            os.set_blocking(self._rings, False)
            self._old_fd = signal.set_wakeup_fd(self._rings, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._say, args=(heard,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error):
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            os.close(self._rings)  # which ends the thread
            self._thread.join()
        for s, old in self._old.items():
            signal.signal(s, old)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every one."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _say(self, heard: int) -> None:
        from tqdm import tqdm

        said = False
        while number := os.read(heard, 1):
            if number[0] in self._old and not said:
                said = True
                tqdm.write(
                    "stopping after this step (or compilation), with a checkpoint; "
                    "Ctrl-C once more ends without one",
                    file=sys.stderr,
                )
        os.close(heard)

    def _ask(self, number, frame):
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._old[number])


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, for people."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in sorted({*a, *b})]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [f"{where}: {a} before, {b} now"]
    found = [_differences(x, y, f"{where}.{key}" if where else str(key)) for key, x, y in pairs]
    return list(itertools.chain.from_iterable(found))
