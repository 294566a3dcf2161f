"""What earlier versions wrote still opens: folders that version 0.1.0 made (see
fixtures/make_landed.py) draw, resume and export to the numbers that it recorded beside them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from cascade.commands.export import export
from cascade.config import from_json
from cascade.data import Blur
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.diffusion.samplers import Step
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.models.t5 import T5Config
from cascade.published import landed
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, StageConfig, Text
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.weights import leaves
from cascade.tasks.editing import edits
from cascade.text.t5 import read_folder
from cascade.training.job import Job, Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.trainable import LoRA

LANDED = Path(__file__).parent / "fixtures" / "landed"
CALLS = json.loads((LANDED / "pictures.json").read_text())
PICTURES = np.load(LANDED / "pictures.npz")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Names in these folders are relative to where they lie; there was one device."""
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    monkeypatch.chdir(shutil.copytree(LANDED, tmp_path / "landed"))


@pytest.fixture(scope="module")
def loaded():
    """Name of a model -> it, read once."""
    return {name: Cascade.load(LANDED / name) for name in ("native_model", "converted_if")}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_draws_the_recorded_pictures(loaded, name):
    call = CALLS[name]
    model = loaded[call["model"]]
    lowres = call.get("lowres") and PICTURES[f"input_{call['lowres']}"]
    chosen = model.select(
        until=call.get("until"), lowres=None if lowres is None else lowres.shape[:2]
    )
    stages = [stage.config for stage, _ in chosen]
    settings = []
    for stage, steps in zip(stages, call["steps"], strict=True):
        changes = {"steps": steps}
        if "sampler" in call:
            changes["sampler"] = from_json(Step, landed.upgraded(call["sampler"]))
        settings.append(dataclasses.replace(stage.sampling, **changes))
    steering = None
    if "init" in call:
        mask = call.get("mask") and PICTURES[f"input_{call['mask']}"]
        picture = PICTURES[f"input_{call['init']}"]
        steering = edits(stages, settings, picture, mask=mask, strength=call.get("strength"))
    options = {k: call[k] for k in ("seed", "num", "until", "negative") if k in call}
    drawn = model(call["prompts"], settings=settings, steering=steering, lowres=lowres, **options)
    for side in drawn[0].images:
        expected = PICTURES[f"{name}_{side}"]
        got = np.stack([picture.images[side] for picture in drawn])
        np.testing.assert_array_equal(got, expected)


def native_run():
    """native_run.py, as it is written today."""
    return StageTraining(
        stage=StageConfig(
            name="base8",
            space=Pixels(resolution=8),
            conditions=(Text(width=16, head_width=8),),
            network=EfficientUNetConfig(
                levels=(EfficientLevel(width=8, blocks=1, stride=1, text_attention=True),),
                head_width=8,
                emb_width=8,
            ),
            schedule=Cosine(logsnr_max=3.0, shift=2.0),
            prediction="x0",
            loss=Loss(weighting="debiased"),
            sampling=Sampling(steps=3, guidance=2.0),
        ),
        data=ScenesData(split="train", max_objects=2),
        text_encoder="text_encoder",
        text_tokens=24,
        images=64,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-2, warmup_images=16, cooldown_images=32, b2=0.99),
        ema_decay=0.9,
        seed=1,
        log_every_images=8,
        preview_every_images=0,
        keep=1,
    )


def profiles_run():
    return StageTraining(
        stage=StageConfig(
            name="sr16",
            space=Pixels(resolution=16),
            conditions=(LowRes(resolution=8, augmentation=Augmentation(max_level=0.3)),),
            network=EfficientUNetConfig(
                levels=(EfficientLevel(width=8, blocks=1, stride=1),), head_width=8, emb_width=8
            ),
            sampling=Sampling(steps=2, guidance=1.0, aug_level=0.1),
        ),
        data=ScenesData(split="train"),
        text_encoder="text_encoder",
        text_tokens=24,
        images=128,
        batch_size=16,
        microbatches=2,
        crop=8,
        degradation=Blur(),
        optimizer=Optimizer(name="adafactor", learning_rate=1e-1),
        ema_profiles=(0.05, 0.1),
        ema_snapshot_images=32,
        log_every_images=16,
        preview_every_images=0,
        keep=1,
    )


def lora_run():
    start = open_model("converted_if")
    return StageTraining(
        stage=start.stages[0],
        data=ScenesData(split="train"),
        text_encoder=start.text_encoder,
        text_tokens=start.max_tokens,
        captions=start.captions,
        text_int8=True,
        init="converted_if",
        trainable=LoRA(rank=2),
        images=64,
        batch_size=8,
        optimizer=Optimizer(name="adamw", learning_rate=1e-2, warmup_images=8, weight_decay=0.01),
        ema_decay=0.9,
        log_every_images=8,
        preview_every_images=0,
        keep=1,
    )


def text_run():
    return TextPretraining(
        encoder=T5Config(
            vocab_size=460, d_model=4, d_kv=4, d_ff=8, num_layers=2, num_heads=1, n_positions=32
        ),
        images=192,
        batch_size=16,
        length=16,
        learning_rate=2e-2,
        warmup_images=3 * 16,
        vocabulary_captions=200,
        log_every_images=2 * 16,
        save_every_images=3 * 16,
        preview_every_images=0,
    )


RUNS = {"native_run": native_run, "profiles_run": profiles_run, "lora_run": lora_run}


@pytest.mark.parametrize("name", RUNS)
def test_a_stages_run_goes_on_to_the_recorded_end(name):
    job = RUNS[name]()
    assert fit(job, name)
    checkpoints = Checkpoints(name)
    step, weights, saved = checkpoints.restore_ema()
    checkpoints.close()
    assert step == job.steps and from_json(Job, saved) == job
    losses = {str(row["images"]): row["loss"] for row in rows(name)}
    print({k: (v, json.loads(Path("losses.json").read_text())[name][k]) for k, v in losses.items()})
    old = landed.old_path_of(job)
    found = {old(path).replace("/", "."): np.asarray(x) for path, x in leaves(weights)}
    assert_equal(found, f"{name}_end.safetensors")


def assert_equal(found, file):
    expected = safetensors.numpy.load_file(file)
    assert found.keys() == expected.keys()
    print(
        {
            name: (np.abs(v - expected[name]).max(), np.abs(v).max())
            for name, v in found.items()
            if (v != expected[name]).any()
        }
    )
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def rows(name):
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_stages_run_is_exported_to_the_recorded_weights(name):
    export([name], "out", ema=0.2 if name == "profiles_run" else None)
    (stage,) = open_model("out").stages
    weights = open_model("out").read(stage)
    old = landed.old_path(stage)
    found = {old(path).replace("/", "."): np.asarray(x) for path, x in leaves(weights)}
    if name == "lora_run":
        before = open_model("converted_if").read(stage, dtype="float32")
        for path, x in leaves(before):
            if (found[n := old(path).replace("/", ".")] == x).all():
                del found[n]
    assert_equal(found, f"{name}_half.safetensors")


def test_a_text_encoders_run_goes_on_to_the_recorded_end():
    job = text_run()
    assert fit(job, "text_run")
    checkpoints = Checkpoints("text_run")
    _, weights, _ = checkpoints.restore_ema()
    checkpoints.close()
    found = {path.replace("/", "."): np.asarray(x) for path, x in leaves(weights["encoder"])}
    assert_equal(found, "text_run_end.safetensors")
