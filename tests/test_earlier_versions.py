"""What version 0.1.0 wrote still opens.

fixtures/version_0_1_0, which it made, draws, goes on and is exported to the numbers that it
recorded there (see its README). On the processor of the recordings the pictures are equal to the
byte and the weights to 1e-6; the tolerances are for others.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from cascade.commands.export import export
from cascade.config import from_json, load, to_json
from cascade.data import BSR, Blur, Data, Degradation, FolderData, TFDSData
from cascade.devices.sharding import MeshConfig
from cascade.diffusion import denoise, grids, loss, process, samplers
from cascade.models import (
    AutoencoderConfig,
    CLIPTextConfig,
    EfficientLevel,
    EfficientUNetConfig,
    Level,
    NetworkConfig,
    UNetConfig,
)
from cascade.models.t5 import T5Config
from cascade.published.deepfloyd.unet import IFLevel, IFUNetConfig
from cascade.published.earlier_versions import is_old, old_path, old_path_of, upgraded
from cascade.published.schedulers import SECTIONS, Respaced
from cascade.published.x4_upscaler.unet import UpscalerLevel, UpscalerUNetConfig
from cascade.runner.cascade import Cascade
from cascade.runner.edits import edits
from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.scenes.text_pretraining import TextPretraining
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, StageConfig, Text
from cascade.storage.checkpoint import Checkpoints
from cascade.storage.weights import leaves
from cascade.text.t5 import read_folder
from cascade.training.job import Job, Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining
from cascade.training.trainable import LoRA

LANDED = Path(__file__).parent / "fixtures" / "version_0_1_0"
CONFIGS = Path(__file__).parents[1] / "configs"
CALLS, EXAMPLES, LOSSES = (
    json.loads((LANDED / f"{name}.json").read_text()) for name in ("pictures", "examples", "losses")
)
PICTURES = np.load(LANDED / "pictures.npz")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder is a copy of theirs, to which names in them are relative; there is one
    device, as there was."""
    alone = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    monkeypatch.chdir(shutil.copytree(LANDED, tmp_path / "version_0_1_0"))


# Models.


@pytest.fixture(scope="module")
def loaded():
    """Name of a model -> it, read once."""
    return {name: Cascade.load(LANDED / name) for name in ("native_model", "converted_if")}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_draws_the_recorded_pictures(loaded, name):
    call, of = CALLS[name], PICTURES.get
    model = loaded[call["model"]]
    lowres, mask = (of(f"input_{call[k]}") if k in call else None for k in ("lowres", "mask"))
    shape = None if lowres is None else len(lowres)
    stages = [stage.config for stage, _ in model.select(until=call.get("until"), lowres=shape)]
    settings = []
    for stage, steps in zip(stages, call["steps"], strict=True):
        changes = {"steps": steps}
        if "sampler" in call:
            changes["sampler"] = from_json(samplers.Step, upgraded(call["sampler"]))
        settings.append(dataclasses.replace(stage.sampling, **changes))
    steering = None
    if "init" in call:
        picture = of(f"input_{call['init']}")
        steering = edits(stages, settings, picture, mask=mask, strength=call.get("strength"))
    options = {k: call[k] for k in ("seed", "num", "until", "negative") if k in call}
    drawn = model(call["prompts"], settings=settings, steering=steering, lowres=lowres, **options)
    for side in drawn[0].images:
        got = np.stack([picture.images[side] for picture in drawn])
        away = np.abs(got.astype(int) - of(f"{name}_{side}"))
        assert away.max() <= 8 and away.mean() < 0.1
    if "metadata" in call:
        was, told = dict(call["metadata"]), drawn[0].metadata
        assert (told["seed"], told["prompt"]) == (was["seed"], was["prompt"])
        assert told["model_sha256"] == was["model_sha256"]


# Runs.


def native_run():
    """What native_run.py says, as it is written today."""
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
            schedule=process.Cosine(logsnr_max=3.0, shift=2.0),
            prediction="x0",
            loss=loss.Loss(weighting="debiased"),
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


STAGES = {"native_run": native_run, "profiles_run": profiles_run, "lora_run": lora_run}

# Adam moves a bias of attention's keys, whose gradient is rounding alone, by as much as any other.
ROUNDING = 3e-4
OF_KEYS = ("keys_values.bias", "attention.text.bias")


def rows(name):
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


def named(tree, renamed=str):
    """{name in the recorded files: array}."""
    return {renamed(path).replace("/", "."): np.asarray(x) for path, x in leaves(tree)}


def assert_equal(found, file, rounding=ROUNDING):
    expected = safetensors.numpy.load_file(file)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        atol = 10 * rounding if name.endswith(OF_KEYS) else rounding
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_run_goes_on_with_its_config_to_the_recorded_end(here, name):
    job = STAGES[name]()
    assert fit(job, name)
    losses = {str(row["images"]): row["loss"] for row in rows(name)}
    assert losses == pytest.approx(LOSSES[name], rel=1e-3)
    checkpoints = Checkpoints(name)
    step, weights, saved = checkpoints.restore_ema()
    checkpoints.close()
    assert step == job.steps and from_json(Job, saved) == job
    renamed = old_path_of(job)
    assert_equal(named(weights, renamed), f"{name}_end.safetensors")


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_run_is_exported_to_the_recorded_weights(here, name):
    export([name], "model", ema=0.2 if name == "profiles_run" else None)
    model = open_model("model")
    (stage,) = model.stages
    assert stage == STAGES[name]().stage
    found = named(model.read(stage), old_path(stage))
    if name == "lora_run":
        frozen = named(open_model("converted_if").read(stage), old_path(stage))
        found = {k: v for k, v in found.items() if (v != frozen[k]).any()}
    assert_equal(found, f"{name}_half.safetensors", 0.0)


def test_a_text_encoders_run_goes_on_with_its_config_to_the_recorded_end(here):
    job, folder = text_run(), Path("text_run")
    assert fit(job, folder)
    # What was written before counted steps alone.
    losses = {str(row["step"]): row["loss"] for row in rows(folder)}
    assert losses == pytest.approx(LOSSES["text_run"], rel=1e-3)
    checkpoints = Checkpoints(folder)
    step, weights, _ = checkpoints.restore_ema()
    checkpoints.close()
    assert step == job.steps
    assert_equal(named(weights["encoder"]), "text_run_end.safetensors")
    config, encoder, spiece = read_folder(folder / "text_encoder")
    assert config == job.encoder and spiece == (folder / "spiece.model").read_bytes()
    for name, value in named(encoder).items():
        np.testing.assert_array_equal(value, named(weights["encoder"])[name].astype(np.float16))


# JSON of configs.


LEVELS = (Level(width=8, blocks=2), Level(width=16, blocks=1, attention=True))
SAID = {
    "Schedule": (
        process.Schedule,
        process.Cosine(logsnr_min=-15.0, logsnr_max=3.0, shift=-2.5),
        process.InterpolatedCosine(shift_clean=-5.0, shift_noise=-1.0, logsnr_max=15.0),
        process.LinearVP(beta_min=0.2, beta_max=10.0),
        process.Sigmoid(start=-2.0, end=3.5, tau=0.7),
        process.Discrete(betas="linear", steps=100, first=2e-4, last=0.03),
        process.Discrete(betas="scaled linear"),
        process.Discrete(),
        process.ZeroTerminal(schedule=process.Discrete(betas="linear")),
        process.ZeroTerminal(schedule=process.Sigmoid()),
    ),
    "Sampler": (
        samplers.Step,
        samplers.Ancestral(gamma=0.1),
        samplers.Ancestral(gamma="learned"),
        samplers.DDIM(eta=0.5),
        samplers.DPMSolverPP2M(),
        samplers.DPMSolverPP2MSDE(),
        samplers.Heun(churn=0.2),
    ),
    "Grid": (
        grids.Grid,
        grids.Uniform(),
        grids.Quadratic(),
        grids.EvenLogSNR(first=-7.0, last=10.0),
        grids.Karras(first=70.0, last=0.01, rho=5.0),
        grids.OnTable(),
        grids.OnTable(spacing="leading", entries=900, offset=1, ends_clean=False),
        *(Respaced(name=name) for name in SECTIONS),
    ),
    "GuidancePlan": (
        denoise.GuidancePlan,
        denoise.Constant(),
        denoise.Interval(low=0.3, high=4.0),
        denoise.Oscillating(low=1.5, share=0.2),
        denoise.PerStep(factors=(1.0, 0.5, 2.0)),
    ),
    "Threshold": (
        denoise.Threshold,
        denoise.Threshold(kind="none"),
        denoise.Threshold(kind="static"),
        denoise.Threshold(percentile=0.95, cap=1.5),
    ),
    "Augmentation": (
        Augmentation,
        Augmentation(max_level=0.3),
        Augmentation(schedule=process.Discrete(), after_upsampling=True),
    ),
    "Sampling": (
        Sampling,
        Sampling(
            steps=3,
            grid=grids.Karras(),
            guidance=7.5,
            guidance_plan=denoise.PerStep(factors=(1.0, 0.5, 2.0)),
            guidance_rescale=0.7,
            sampler=samplers.Heun(churn=0.2),
            threshold=denoise.Threshold(kind="static"),
            aug_level=0.2,
        ),
    ),
    "Loss": (
        loss.Loss,
        loss.Loss(space="eps"),
        loss.Loss(weighting="min_snr", gamma=4.0),
        loss.Loss(weighting="truncated_snr"),
        loss.Loss(space="x0", weighting="debiased"),
    ),
    "LearnedVariance": (loss.LearnedVariance, loss.LearnedVariance(steps=100, weight=0.01)),
    "DenoiserConfig": (
        NetworkConfig,
        UNetConfig(
            levels=LEVELS,
            patch=2,
            head_width=8,
            emb_width=24,
            dropout=0.1,
            compute_dtype="bfloat16",
            remat="dots_saveable",
            coordinates=True,
        ),
        EfficientUNetConfig(
            levels=(
                EfficientLevel(width=8, blocks=1, stride=1),
                EfficientLevel(width=16, blocks=2, self_attention=True, text_attention=True),
            ),
            head_width=8,
        ),
        IFUNetConfig(
            levels=(
                IFLevel(width=16, blocks=1),
                IFLevel(width=32, blocks=2, attention="text"),
                IFLevel(width=32, blocks=1, attention="text and image"),
            ),
            middle_attention="text",
            text_width=16,
            cross_width=32,
            emb_width=24,
            head_width=8,
            pool_heads=2,
            lowres=True,
            groups=4,
            residual_scale=0.7071,
            middle_scale=0.7071,
            activation="silu",
            remat="nothing_saveable",
        ),
        UpscalerUNetConfig(
            levels=(
                UpscalerLevel(width=16, blocks=1),
                UpscalerLevel(width=32, blocks=2, attention="text"),
                UpscalerLevel(width=32, blocks=1, attention="image"),
            ),
            noise_levels=350,
            text_width=16,
            heads=4,
            groups=4,
        ),
    ),
    "AutoencoderConfig": (
        AutoencoderConfig,
        AutoencoderConfig(widths=(8, 16), blocks=1, latent_channels=3, groups=4, scaling=0.1),
    ),
    "CLIPTextConfig": (
        CLIPTextConfig,
        CLIPTextConfig(hidden_size=16, num_hidden_layers=2, hidden_act="gelu"),
    ),
    "T5Config": (
        T5Config,
        T5Config(vocab_size=460, d_model=8, d_ff=8, num_layers=1, num_heads=2),
    ),
    "DataConfig": (
        Data,
        ScenesData(split="seen", seed=3, size=100, min_objects=2, max_objects=3, closeup=2),
        ScenesData(split="long", max_objects=4),
        TFDSData(name="scenes", data_dir="made", split="train[:90%]", caption="text"),
        FolderData(path="pictures"),
    ),
    "Degradation": (Degradation, Blur(sigma=(0.6, 0.7), share=1.0), BSR(light=False)),
    "Optimizer": (
        Optimizer,
        Optimizer(name="adamw", warmup_images=100, weight_decay=0.1, clip=0.5, b1=0.8),
        Optimizer(name="adafactor", learning_rate=1e-3, cooldown_images=500),
    ),
    "MeshConfig": (MeshConfig, MeshConfig(data=2, fsdp=-1, tensor=2)),
}
"""{name in examples.json: (what is expected there, what was written down)}."""


@pytest.mark.parametrize("name", SAID)
def test_every_old_config_is_read_as_the_value_that_it_came_from(name):
    expected, *said = SAID[name]
    assert [from_json(expected, upgraded(value)) for value in EXAMPLES[name]] == said


def test_the_old_configs_and_stages_that_shipped_are_those_of_today():
    there = ("imagen", "scenes", "tiny")
    files = [file for file in sorted(CONFIGS.glob("*/*.py")) if file.parent.name in there]
    of_today = [load(str(file)) for file in files]
    for name, kind in (("TrainConfig", StageTraining), ("TextPretraining", TextPretraining)):
        was = [from_json(Job, upgraded(value)) for value in EXAMPLES[name]]
        assert was == [job for job in of_today if isinstance(job, kind)]
    stages = [from_json(StageConfig, upgraded(value)) for value in EXAMPLES["StageConfig"]]
    assert stages == open_model("scenes").stages


def test_every_example_is_of_what_this_file_reads():
    assert EXAMPLES.keys() == {*SAID, "TrainConfig", "TextPretraining", "StageConfig"}


def test_what_is_of_today_is_no_old_config():
    for job in (native_run(), profiles_run(), text_run()):
        value = json.loads(json.dumps(to_json(job)))
        assert not is_old(value) and upgraded(value) == value
