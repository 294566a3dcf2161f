"""The one training loop, on a job that is none of the package's: a line through noisy points."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cascade.devices import sharding
from cascade.devices.sharding import MeshConfig
from cascade.diffusion import loss
from cascade.errors import UserError
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.lock import Lock
from cascade.training import loop
from cascade.training.job import Batches, Job, Running
from cascade.training.loop import fit
from cascade.training.step import begin, make_train_step

SLOPE, OFFSET = np.array([1.5, -0.5], np.float32), 0.25


class Points:
    """Endless batches of points [b, 2] and their values, each of its own number."""

    def __init__(self, job, rows):
        self.job, self.rows, self.step = job, rows, 0

    def __next__(self):
        rng = np.random.default_rng((self.job.seed, self.step))
        x = rng.standard_normal((self.job.batch_size, 2)).astype(np.float32)
        y = x @ SLOPE + OFFSET
        if self.step in self.job.spoilt:
            y[0] = np.nan
        self.step += 1
        return {"x": x[self.rows], "y": y[self.rows]}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


class Told(Running):
    """Notes in files what the loop asks for."""

    def __init__(self, job, mesh, workdir):
        self.mesh, self.workdir = mesh, workdir
        self.batches = Points(job, sharding.process_rows(mesh, job.batch_size))

    def prepare(self, batch, step):
        """The number of the step goes into the batch, and must be the one of the data."""
        numbers = np.full(len(batch["x"]), step, np.int32)
        return sharding.shard_batch(batch | {"step": numbers}, self.mesh)

    def preview(self, params, batch, file):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"step": int(batch["step"][0]), **plain(params)}))

    def finish(self, params):
        with (self.workdir / "finished").open("a") as f:
            f.write(json.dumps(plain(params)) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(Job):
    learning_rate: float = 0.3
    spoilt: tuple[int, ...] = ()
    """Steps whose batch has a value that is not finite."""

    @property
    def name(self):
        return "line"

    @property
    def fixed(self):
        return super().fixed | {"learning_rate": self.learning_rate}

    def fresh(self, key):
        return {"line": {"kernel": jax.random.normal(key, (2,)), "bias": jnp.zeros(())}}

    def loss(self, params, batch, key, part=None):
        line = params["line"]
        noise = loss.draw(functools.partial(jax.random.normal, key), batch["y"].shape, part)
        error = batch["x"] @ line["kernel"] + line["bias"] - batch["y"] - 0.1 * noise
        value = jnp.mean(error**2)
        return value, {"loss": value}

    def batch_shapes(self, tokens, b=None):
        b = b or self.batch_size
        shapes = {"x": ((b, 2), jnp.float32), "y": ((b,), jnp.float32), "step": ((b,), jnp.int32)}
        return {name: jax.ShapeDtypeStruct(*said) for name, said in shapes.items()}

    def transformation(self):
        return optax.adam(self.learning_rate)

    def open(self, mesh, workdir):
        return Told(self, mesh, workdir)


class Other(Line):
    """Of another kind, though it says nothing else."""


LINE = Line(
    images=64,
    batch_size=8,
    ema_decay=0.9,
    log_every_images=8,
    save_every_images=24,
    preview_every_images=24,
)


def plain(params):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), params)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [row["loss"] for row in rows(workdir)]


def restored(workdir, job=LINE):
    """(step, train, ema, data) of the newest checkpoint."""
    optimizer = job.transformation()
    target = jax.eval_shape(lambda: begin(job, optimizer, job.fresh(jax.random.key(0))))
    target.pop("frozen", None)
    checkpoints = Checkpoints(workdir)
    found = checkpoints.restore(**target)
    checkpoints.close()
    return found


def average(workdir):
    checkpoints = Checkpoints(workdir)
    _, ema, _ = checkpoints.restore_ema()
    checkpoints.close()
    return ema


def finished(workdir):
    file = workdir / "finished"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on eight devices that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert len(jax.devices()) == 8 and fit(LINE, folder) is True
    return folder


def test_a_job_learns_and_has_all_that_a_run_has(whole):
    assert isinstance(Points(LINE, slice(None)), Batches)
    began = LINE.fresh(jax.random.key(0, impl="rbg"))["line"]["kernel"]
    learned = restored(whole)[1]["params"]["line"]["kernel"]
    assert np.linalg.norm(learned - SLOPE) < 0.5 * np.linalg.norm(began - SLOPE)
    assert [row["images"] for row in rows(whole)] == list(range(8, 72, 8))
    assert rows(whole)[0]["tflops_per_device"] > 0
    assert {p.name for p in whole.iterdir()} == {
        *("checkpoints", "config.json", "metrics.jsonl", "tensorboard", "loss.png"),
        *("previews", "finished"),
    }


def test_a_run_that_was_stopped_ends_bit_identical(whole, tmp_path):
    for images in (8, 40):
        assert fit(LINE, tmp_path, until=images) is True
        assert rows(tmp_path)[-1]["images"] == images and not finished(tmp_path)
    assert fit(LINE, tmp_path) is True
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path), restored(whole))
    assert losses(tmp_path) == losses(whole) and finished(tmp_path) == finished(whole)


def test_a_signal_is_answered_at_once_also_while_the_compiler_lets_no_handler_run(
    tmp_path, monkeypatch
):
    wrote = []

    class Noted(io.StringIO):
        def write(self, text):
            wrote.append((text, threading.current_thread() is threading.main_thread()))
            return len(text)

    class Signalled(Line):
        def open(self, mesh, workdir):
            running = super().open(mesh, workdir)
            prepare = running.prepare

            def prepare_and_ask(batch, step):
                if step == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                return prepare(batch, step)

            running.prepare = prepare_and_ask
            return running

    monkeypatch.setattr(sys, "stderr", Noted())
    assert not fit(Signalled(images=64, batch_size=8), tmp_path)
    by_main = [main for text, main in wrote if text.startswith("stopping after this step")]
    assert by_main == [False]  # said once, by a thread, which needs no handler
    assert restored(tmp_path)[0] == 2


def test_a_signal_is_told_of_once_and_others_not_at_all(capsys):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with loop._StopSignal() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert not stop.asked(1)
        assert capsys.readouterr().err == ""
        with loop._StopSignal() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert stop.asked(1)
        assert capsys.readouterr().err.count("stopping after this step") == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_acts_as_usual_and_so_do_all_signals_afterwards():
    usual, acted = (signal.SIGTERM, signal.SIGINT), []
    old = [signal.signal(number, lambda number, frame: acted.append(number)) for number in usual]
    try:
        with loop._StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked(1) and acted == []
            signal.raise_signal(signal.SIGINT)
            assert acted == [signal.SIGINT]
        for number in usual:
            signal.raise_signal(number)
        assert acted == [signal.SIGINT, *usual]
    finally:
        for number, before in zip(usual, old, strict=True):
            signal.signal(number, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_of_a_program_that_trains_in_a_thread_are_left_alone():
    asked = []

    def train():
        with loop._StopSignal() as stop:
            asked.append(stop.asked(1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert asked == [False]


def test_a_run_stops_after_all_the_images_it_was_told(tmp_path):
    assert fit(dataclasses.replace(LINE, preview_every_images=0), tmp_path, until=20) is True
    assert rows(tmp_path)[-1]["images"] == 24  # in steps of 8


def test_one_device_and_parts_of_batches_learn_the_same(whole, tmp_path, monkeypatch):
    parts = dataclasses.replace(LINE, microbatches=4, mesh=MeshConfig(data=2, tensor=4))
    fit(parts, tmp_path / "parts")
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    fit(LINE, tmp_path / "alone")
    for name in ("parts", "alone"):
        assert np.allclose(losses(tmp_path / name), losses(whole), rtol=1e-5)
        np.testing.assert_allclose(
            *(d["line"]["kernel"] for d in (average(tmp_path / name), average(whole))), rtol=1e-5
        )


def test_the_average_of_the_weights_follows_them(tmp_path):
    job = dataclasses.replace(LINE, images=40, save_every_images=8, keep=5, ema_decay=0.3)
    path = []
    for images in range(8, 48, 8):
        fit(job, tmp_path, until=images)
        path.append(restored(tmp_path, job)[1]["params"]["line"]["kernel"])
    mean = job.fresh(jax.random.key(0, impl="rbg"))["line"]["kernel"]
    for n, weights in enumerate(path, 1):
        decay = min(0.3, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weights
    np.testing.assert_allclose(average(tmp_path)["line"]["kernel"], mean, atol=1e-6)
    assert np.abs(mean - path[-1]).min() > 1e-4


def test_previews_are_drawn_when_they_are_due_by_the_average(whole):
    previews = sorted((whole / "previews").iterdir())
    assert [p.name for p in previews] == [f"{n:010d}.png" for n in (24, 48, 64)]
    told = [json.loads(p.read_text()) for p in previews]
    assert [one.pop("step") for one in told] == [2, 5, 7]
    assert told[-1] == plain(average(whole)) != plain(restored(whole)[1]["params"])


def test_finishing_is_asked_once_at_the_end_with_the_average(whole, tmp_path):
    assert finished(whole) == [plain(average(whole))]
    never = dataclasses.replace(LINE, preview_every_images=0)
    fit(never, tmp_path, until=56)
    assert not finished(tmp_path) and not (tmp_path / "previews").exists()


def test_updates_that_are_not_finite_are_left_out(tmp_path):
    job = dataclasses.replace(LINE, spoilt=(2, 4, 5), skip_limit=3, keep=8, save_every_images=8)
    weights = []
    for images in range(8, 72, 8):
        fit(job, tmp_path, until=images)
        weights.append(plain(restored(tmp_path, job)[1]["params"]))
    stays = [i for i in range(1, 8) if weights[i] == weights[i - 1]]
    assert stays == [2, 4, 5]
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 0, 1, 0, 1, 1, 0, 0]
    assert len(finished(tmp_path)) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Line):
    """Of many lines."""

    lines: int

    def fresh(self, key):
        return {str(i): super(Sum, self).fresh(key)["line"] for i in range(self.lines)}

    def loss(self, params, batch, key, part=None):
        line = jax.tree.map(lambda *x: sum(x), *params.values())
        return super().loss({"line": line}, batch, key, part)


def test_a_compiled_step_grows_as_the_weights_do():
    """Not as their square, though whether all are finite decides about each."""

    def length(lines):
        job = Sum(images=8, batch_size=8, lines=lines)
        rule, batch = job.transformation(), job.batch_shapes(0)
        state = jax.eval_shape(lambda key: begin(job, rule, job.fresh(key)), jax.random.key(0))
        step = jax.jit(make_train_step(job, rule)).lower(state, batch).compile()
        return len(step.as_text())

    assert length(20) < 5 * length(5)


def test_too_many_of_them_in_a_row_end_the_run_with_the_weights_before(tmp_path):
    job = dataclasses.replace(LINE, spoilt=(0, 2, 3, 4, 5, 6), skip_limit=3)
    with pytest.raises(UserError, match="training diverged: the last 3 updates"):
        fit(job, tmp_path)
    step, train, ema, _ = restored(tmp_path, job)
    assert step == len(rows(tmp_path)) and [r["skipped"] for r in rows(tmp_path)][-3:] == [1, 1, 1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((train["params"], ema)))
    assert not finished(tmp_path)


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"batch_size": 16}, "batch_size: 8 before, 16 now"),
        ({"learning_rate": 0.2}, "learning_rate: 0.3 before, 0.2 now"),
        ({"ema_profiles": (0.1,)}, "ema_profiles: [] before, [0.1] now"),
    ],
)
def test_what_a_run_cannot_change_is_refused_by_name(whole, changes, told):
    files = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as e:
        fit(dataclasses.replace(LINE, **changes), whole)
    assert str(e.value) == (
        f"{whole}: holds a run with another config ({told}); use its config, or another folder"
    )
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == files


def test_what_it_can_change_is_changed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    mesh = MeshConfig(data=1, fsdp=8)
    assert fit(
        dataclasses.replace(LINE, images=80, ema_decay=0.5, keep=1, mesh=mesh), tmp_path / "run"
    )
    assert rows(tmp_path / "run")[-1]["images"] == 80


def test_a_run_of_another_kind_is_refused(whole):
    other = Other(**{f.name: getattr(LINE, f.name) for f in dataclasses.fields(LINE)})
    told = r"holds a run of another kind \(Line, this is a Other\); name another --workdir"
    with pytest.raises(UserError, match=told):
        fit(other, whole)


class StopsAt(loop._StopSignal):
    """As if told to stop during a step."""

    step = 0

    def asked(self, step):
        return step == self.step


def test_the_rows_of_a_run_that_was_stopped_and_went_on_are_those_of_one_that_was_not(
    tmp_path, monkeypatch
):
    job = dataclasses.replace(LINE, log_every_images=24, spoilt=(1, 4))
    fit(job, tmp_path / "whole")
    told = {"images_per_second", "step_seconds", "data_wait_seconds", "tflops_per_device", "mfu"}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_StopSignal", StopsAt)
        for step in (2, 5):
            patched.setattr(StopsAt, "step", step)
            assert fit(job, tmp_path / "stopped") is False
    assert fit(job, tmp_path / "stopped")
    kept = [
        [{k: v for k, v in row.items() if k not in told} for row in rows(tmp_path / name)]
        for name in ("whole", "stopped")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 3
    assert [row["skipped"] for row in kept[0]] == [1, 1, 0]


def test_a_second_training_in_a_folder_is_refused_and_the_first_ends_as_if_alone(whole, tmp_path):
    with Lock(tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match="a training holds this folder"):
            fit(LINE, tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    fit(LINE, tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_a_training_whose_folder_was_taken_over_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "lost", True, raising=False)
    monkeypatch.setattr(Lock, "__init__", lambda self, folder: None)
    monkeypatch.setattr(Lock, "__enter__", lambda self: self)
    monkeypatch.setattr(Lock, "__exit__", lambda self, *error: None)
    with pytest.raises(UserError, match="taken this folder over"):
        fit(LINE, tmp_path)


@pytest.mark.parametrize("every, cleared", [(1000, ""), (24, ""), (1000, "config.json")])
def test_a_training_whose_folder_was_removed_ends_and_says_so(tmp_path, every, cleared):
    class Cleared(Line):
        def open(self, mesh, workdir):
            running = super().open(mesh, workdir)
            prepare = running.prepare

            def prepare_and_clear(batch, step):
                if step == 2:
                    (workdir / "config.json").unlink()
                    if not cleared:
                        shutil.rmtree(workdir)
                return prepare(batch, step)

            running.prepare = prepare_and_clear
            return running

    job = Cleared(images=32, batch_size=8, log_every_images=1000, save_every_images=every)
    with pytest.raises(UserError, match="was removed, or its config.json, while it was trained"):
        fit(job, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/[34]"))  # nothing is put where all was removed


def test_a_refused_training_clears_nothing_that_the_first_is_writing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    begun = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
    begun.mkdir()
    with Lock(tmp_path / "run"), pytest.raises(UserError, match="a training holds this folder"):
        fit(dataclasses.replace(LINE, images=128), tmp_path / "run")
    assert begun.is_dir()


def test_a_run_that_goes_on_says_what_the_command_has_changed(tmp_path, capsys):
    fit(LINE, tmp_path, until=8)
    assert "changed" not in capsys.readouterr().err
    changed = dataclasses.replace(LINE, seed=5, mesh=MeshConfig(data=4, fsdp=2))
    fit(changed, tmp_path, until=16)
    told = capsys.readouterr().err
    assert "goes on with what the command has changed" in told
    assert "seed: 0 before, 5 now" in told and "mesh.fsdp: " in told
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5
    assert ["changed" in row for row in rows(tmp_path)] == [False, True]
    assert "seed: 0 before, 5 now" in rows(tmp_path)[1]["changed"]


def test_a_change_is_in_the_next_row_also_if_the_run_is_stopped_before(tmp_path, monkeypatch):
    fit(LINE, tmp_path, until=8)
    seldom = dataclasses.replace(LINE, seed=5, log_every_images=24)
    with monkeypatch.context() as patched:
        patched.setattr(loop._StopSignal, "asked", lambda self, step: True)
        assert fit(seldom, tmp_path) is False
    fit(seldom, tmp_path, until=24)
    assert ["changed" in row for row in rows(tmp_path)] == [False, True]
    fit(seldom, tmp_path)
    assert sum("changed" in row for row in rows(tmp_path)) == 1


def test_a_refused_run_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError, match="multiple of the 8 parts"):
        fit(dataclasses.replace(LINE, batch_size=4), tmp_path / "a" / "b")

    class Unready(Line):
        def open(self, mesh, workdir):
            raise UserError("its data is missing")

    with pytest.raises(UserError, match="its data is missing"):
        fit(Unready(images=8, batch_size=8), tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


class Average(Line):
    """Its average is kept at a rate that is no number."""

    def __post_init__(self):
        pass


def test_nothing_that_is_not_finite_is_saved_averages_included(tmp_path):
    with pytest.raises(UserError, match="were not finite"):
        fit(Average(images=64, batch_size=8, ema_decay=float("nan"), skip_limit=2), tmp_path)
    step, train, ema, _ = restored(tmp_path)
    for leaf in jax.tree.leaves([train, ema]):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**20])
def test_seeds_that_cannot_be_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be"):
        dataclasses.replace(LINE, seed=seed)
