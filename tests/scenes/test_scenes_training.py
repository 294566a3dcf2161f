"""The job that draws its scenes on the device, against the data of the host."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import testing
from cascade.config import load
from cascade.runner.model_folder import SHIPPED
from cascade.scenes import training
from cascade.scenes.dataset import ScenesData
from cascade.stage import LowRes, Pixels, Stage
from cascade.text.tokenizer import Tokenizer
from cascade.training.job import Optimizer
from cascade.training.loop import fit

SPIECE = SHIPPED / "scenes/text_encoder/spiece.model"


def job_of(stage, **changes):
    fields = {
        "data": ScenesData(seed=3),
        "images": 64,
        "batch_size": 8,
        "text_tokens": 24,
        "preview_every_images": 0,
        "log_every_images": 8,
        "optimizer": Optimizer(learning_rate=1e-2),
    }
    return training.ScenesTraining(stage=stage, **{**fields, **changes})


BASE = dataclasses.replace(testing.smallest_stage(text_width=128), space=Pixels(resolution=32))
SUPER = dataclasses.replace(
    testing.super_resolution_stage(text_width=128),
    space=Pixels(resolution=64),
    conditions=(LowRes(resolution=16), *testing.smallest_stage(text_width=128).conditions),
)


def first(job, n=8):
    """What the devices have of the first examples, without the text encoder."""
    made = training.example_batch(job.data, job.stage.resolution, None, np.arange(n))
    corner = jnp.asarray(made.pop("corner"))
    draw = jax.jit(functools.partial(training.drawn, job))
    return draw(training.device.Layouts(**made), corner, np.int32(0))


@pytest.mark.parametrize("closeup", [1, 2])
def test_examples_are_those_of_the_dataset(closeup):
    job = job_of(BASE, data=ScenesData(seed=3, closeup=closeup))
    source = job.data.open(32)
    expected = np.stack([source[i]["image"] for i in range(8)])
    difference = np.abs(np.asarray(first(job)["image"]).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_captions_are_those_of_the_dataset():
    tokenizer = Tokenizer(SPIECE.read_bytes(), 24)
    data = ScenesData(seed=3, size=10)
    made = training.example_batch(data, 32, tokenizer, np.arange(6, 14))  # 10 is the first again
    source = data.open(32)
    expected = tokenizer([source[i % 10]["caption"] for i in range(6, 14)])
    np.testing.assert_array_equal(made["tokens"], expected.ids)
    np.testing.assert_array_equal(made["token_mask"], expected.mask)


def test_crops_are_windows_of_the_whole_with_their_means():
    job = job_of(SUPER, crop=32)
    whole, crops = (first(dataclasses.replace(job, crop=c)) for c in (None, 32))
    whole, image, lowres = (
        np.asarray(x) for x in (whole["image"], crops["image"], crops["lowres"])
    )
    assert image.shape == (8, 32, 32, 3) and lowres.shape == (8, 8, 8, 3)
    found = []
    for i in range(8):
        corners = [(y, x) for y in range(0, 33, 4) for x in range(0, 33, 4)]
        same = [
            c for c in corners if (whole[i, c[0] : c[0] + 32, c[1] : c[1] + 32] == image[i]).all()
        ]
        assert same
        found.append(same[0])
        means = image[i].reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
        assert np.abs(lowres[i] - means).max() <= 0.5
    assert len(set(found)) > 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_learns_resumes_and_is_the_same_for_any_workers(workers, tmp_path):
    job = job_of(BASE, workers=workers)
    assert fit(job, tmp_path / "whole") and fit(job, tmp_path / "parts", until=24)
    assert fit(job, tmp_path / "parts")
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    ]
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]


def test_the_gpu_configs_are_those_of_the_cascade_that_ships_but_for_the_base():
    for name in ("base64", "sr256", "sr1024"):
        cpu, gpu = (load(f"configs/scenes/{folder}{name}.py") for folder in ("", "gpu/"))
        assert gpu.stage.network.compute_dtype == "bfloat16"
        network = dataclasses.replace(gpu.stage.network, compute_dtype="float32")
        assert dataclasses.replace(gpu.stage, network=cpu.stage.network) == cpu.stage
        assert (network == cpu.stage.network) == (name != "base64")
        weights = sum(x.size for x in jax.tree.leaves(Stage(gpu.stage).abstract()))
        assert weights <= 10_000_000
