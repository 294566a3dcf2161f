"""Every example of ADDING.md is run as it stands there, and does what the page says of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from cascade import testing
from cascade.data import batches
from cascade.diffusion.process import Cosine
from cascade.diffusion.samplers import initial_noise, sample, time_grid
from cascade.models import Level, UNetConfig
from cascade.stage import Pixels, Sampling, Stage, StageConfig
from cascade.training.loop import fit

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ADDING.md").read_text()


def source_of(heading):
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def example(heading):
    """The names that the example defines."""
    names = {"__name__": __name__}
    exec(source_of(heading), names)
    return type("Example", (), names)


def stage_with(**fields):
    levels = (Level(width=8, blocks=1),)
    network = fields.pop("network", UNetConfig(levels=levels, head_width=8))
    settings = Sampling(steps=2, guidance=1.0)
    return Stage(
        StageConfig(
            name="added",
            space=Pixels(resolution=8),
            network=network,
            sampling=settings,
            **fields,
        )
    )


def test_no_example_is_left_out():
    assert re.findall(r"^## (.*)", PAGE, re.MULTILINE) == [
        "A condition: something that a stage is told",
        "A sampler",
        "A source of data",
        "A network",
        "A job: something that learns",
        "A task with its own verb",
    ]


def test_the_condition_reaches_the_picture():
    condition = example("A condition").Loudness()
    stage = stage_with(conditions=(condition,))
    given = {"loudness": condition.of_prompts(["a circle", "a circle!!"], None)}
    keys = jnp.stack([jax.random.key(0)] * 2)
    quiet, loud = stage.sample(testing.lively(stage), given, keys, settings=stage.config.sampling)
    assert jnp.abs(quiet - loud).max() > 1e-3


def test_the_sampler_draws_gaussian_data_as_euler_in_the_limit_of_many_steps():
    euler, schedule = example("A sampler").Euler(), Cosine()
    keys = jax.random.split(jax.random.key(0), 4)
    noise = initial_noise(keys, (3,))
    data = oracle.Gaussian(scale=0.5)
    drawn = sample(data, noise, schedule=schedule, times=time_grid(400), step=euler, keys=keys)
    np.testing.assert_allclose(drawn, data.flow(noise, -20.0, 20.0), atol=0.01)


def test_the_source_fills_batches():
    encoder = testing.FakeEncoder()
    data = example("A source").PlainColours()
    found = batches(data.open(8), batch_size=3, seed=0, tokenizer=encoder.tokenize)
    batch = next(found)
    found.close()
    assert batch["image"].shape == (3, 8, 8, 3)
    assert sorted(batch["image"][:, 0, 0].tolist()) == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]


def test_the_network_is_trained_by_a_stage():
    stage = stage_with(network=example("A network").PixelwiseConfig())
    params = stage.init(jax.random.key(0))
    batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8)}
    gradients = jax.grad(lambda p: stage.loss(p, batch, jax.random.key(1))[0])(params)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients["network"]["out"]))


def test_the_job_learns_and_goes_on(tmp_path):
    job = example("A job").Mean(
        images=8_000, batch_size=80, ema_decay=0.9, save_every_images=4_000, preview_every_images=0
    )
    trusted = sys.modules[__name__]
    trusted.Mean = type(job)  # where its saved config says that it is
    assert fit(job, tmp_path, until=4_000) and fit(job, tmp_path)
    from cascade.storage.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path)
    step, ema, _ = checkpoints.restore_ema()
    checkpoints.close()
    assert step == 100
    assert ema["mean"] == pytest.approx(3.0, abs=0.2)


def test_the_task_is_a_verb_of_the_command_line(tmp_path):
    shutil.copytree(
        ROOT / "cascade", tmp_path / "cascade", ignore=shutil.ignore_patterns("__pycache__")
    )
    task = tmp_path / "cascade" / "tasks" / "sizes.py"
    task.write_text(source_of("A task"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""}

    def cascade(*words):
        command = [sys.executable, "-m", "cascade", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "  sizes    draw a prompt in a row of sizes\n" in cascade("--help")
    assert "--model STR" in cascade("sizes", "--help")
