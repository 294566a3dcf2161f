"""Runs that end by the clock: when, and that the rate has cooled down by then."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.config import load
from cascade.errors import UserError
from cascade.training import loop
from cascade.training.job import Job, Optimizer, Running
from cascade.training.loop import fit
from cascade.training.step import begin, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Job):
    """The sum of two weights, whose gradient is 1 everywhere; what is told is above 0."""

    name = "sum"
    optimizer: Optimizer = Optimizer(
        learning_rate=1.0, cooldown_images=32, clip=10.0, b1=0.0, b2=0.0, eps=1e-20
    )

    def fresh(self, key):
        return {"w": jnp.array([1.0, 2.0])}

    def loss(self, params, batch, key, part=None):
        value = params["w"].sum()
        return value, {"loss": 1 + jnp.abs(value)}

    def transformation(self, steps=None):
        return self.optimizer.build(self.batch_size, self.steps if steps is None else steps)

    def open(self, mesh, workdir):
        return Nothing()


class Nothing(Running):
    def __init__(self):
        self.batches, self.step = self, 0

    def __next__(self):
        self.step += 1
        return {"x": np.zeros(8, np.float32)}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]

    def prepare(self, batch, step):
        return batch


def test_a_run_ends_when_its_minutes_are_over(tmp_path):
    job = Sum(images=10**9, batch_size=8, minutes=0.02, log_every_images=80)
    assert fit(job, tmp_path) is True
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["images"] < 10**9 and (tmp_path / "checkpoints").is_dir()


def test_the_last_step_follows_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    clock = loop._Clock(10.0, 10**6)
    assert clock.last(0) == 10**6
    now[0] = 60.0  # a minute of compiling
    assert clock.last(1) == 10**6
    for step in range(2, 12):
        now[0] += 0.5
        last = clock.last(step)
    assert last == 11 + (600 - now[0]) / 0.5
    for step in range(12, 100):
        now[0] += 1.0  # half as fast
        last = clock.last(step)
    assert last == 99 + int(600 - now[0])
    now[0] = 700.0
    assert clock.last(100) == 101


def test_the_rate_cools_down_for_a_step_that_is_told_where_the_run_ends():
    known = Sum(images=64, batch_size=8)
    timed = dataclasses.replace(known, images=10**6, minutes=1.0)
    moved = []
    for job, told in ((known, ()), (timed, (np.int32(8),))):
        state = begin(job, job.transformation(), job.fresh(jax.random.key(0)))
        step, sizes = jax.jit(make_train_step(job, job.transformation())), []
        for _ in range(8):
            before = state["train"]["params"]["w"]
            state, _ = step(state, {}, *told)
            sizes.append(float((before - state["train"]["params"]["w"])[0]))
        moved.append(sizes)
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-6)
    np.testing.assert_allclose(moved[0], [1, 1, 1, 1, 1, 0.75, 0.5, 0.25], rtol=1e-5)


def test_minutes_that_make_no_sense_are_refused(monkeypatch, tmp_path):
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="Sum.minutes must be above 0, got"):
            Sum(images=8, batch_size=8, minutes=minutes)
    with pytest.raises(ValueError, match="TextPretraining.minutes must be None"):
        dataclasses.replace(load("configs/scenes/text_encoder.py"), minutes=1.0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes have no common clock"):
        fit(Sum(images=8, batch_size=8, minutes=1.0), tmp_path / "run")
