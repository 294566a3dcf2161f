"""Tiny published pipelines and models of them, for tests: folders as diffusers lays them out, of
random weights, and a converted DeepFloyd IF."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from fixtures.clip_tokenizer import write_tokenizer
from fixtures.random_weights import random_tensors

from cascade import testing
from cascade.config import to_json
from cascade.diffusion import denoise, loss, process, samplers
from cascade.published.deepfloyd.unet import IFLevel, IFUNetConfig
from cascade.published.stage import PublishedLowRes, PublishedStageConfig, PublishedText
from cascade.stage import Augmentation, Pixels, Sampling, Stage
from cascade.storage.paths import write_json
from cascade.storage.weights import save_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
T5 = FIXTURES / "t5"
UNETS = json.loads((FIXTURES / "deepfloyd" / "unets.json").read_text())
PIPELINES = json.loads((FIXTURES / "deepfloyd" / "pipelines.json").read_text())
UPSCALER = json.loads((FIXTURES / "upscaler" / "pipeline.json").read_text())
NAME = "diffusion_pytorch_model"
_FILES = {
    "unet": f"unet/{NAME}.safetensors",
    "vae": f"vae/{NAME}.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def relative_error(output, expected):
    return np.abs(output - expected).max() / np.abs(expected).max()


def write_unet(folder, name="stage1", **changes):
    """A unet/ folder of DeepFloyd IF as diffusers writes it; changes: of config.json."""
    folder.mkdir(exist_ok=True)
    made = UNETS[name]
    (folder / "config.json").write_text(json.dumps(made["config"] | changes))
    tensors = random_tensors(made["shapes"])
    safetensors.numpy.save_file(tensors, folder / f"{NAME}.safetensors")
    return tensors


def write_pipeline(folder, stage, changes=()):
    """The folder of DeepFloyd IF's pipeline 1 or 2. changes: (file, field, value)."""
    made = PIPELINES[f"stage{stage}"]
    _write_configs(folder, made["files"], changes)
    tensors = random_tensors(made["shapes"])
    safetensors.numpy.save_file(tensors, folder / "unet" / f"{NAME}.safetensors")
    if stage == 1:
        for name in ("text_encoder/config.json", "text_encoder/model.safetensors"):
            (folder / "text_encoder").mkdir(exist_ok=True)
            (folder / name).write_bytes((T5 / Path(name).name).read_bytes())
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / "spiece.model").write_bytes((T5 / "spiece.model").read_bytes())
    return folder


def write_upscaler(folder, changes=(), renamed=lambda name: name):
    """The folder of stable-diffusion-x4-upscaler. changes: (file, field, value); renamed: what its
    tensors are called."""
    _write_configs(folder, UPSCALER["files"], changes)
    for name, shapes in UPSCALER["shapes"].items():
        tensors = {renamed(n): t for n, t in random_tensors(shapes).items()}
        safetensors.numpy.save_file(tensors, folder / _FILES[name])
    write_tokenizer(folder / "tokenizer")
    return folder


def _write_configs(folder, files, changes):
    files = json.loads(json.dumps(files))
    for file, field, value in changes:
        files[file][field] = value
    for name, fields in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(fields))


# A DeepFloyd IF that `cascade convert` could have written: text -> 8 px -> 16 px.
IF8 = PublishedStageConfig(
    name="if8",
    space=Pixels(resolution=8),
    conditions=(PublishedText(width=16),),
    network=IFUNetConfig(
        levels=(IFLevel(width=16, blocks=1),),
        text_width=16,
        cross_width=32,
        emb_width=16,
        head_width=8,
        pool_heads=2,
        groups=4,
    ),
    schedule=process.Discrete(),
    prediction="eps",
    loss=loss.Loss(space="eps"),
    variance=loss.LearnedVariance(),
    sampling=Sampling(
        steps=4, sampler=samplers.Ancestral(gamma="learned"), threshold=denoise.Threshold(cap=1.5)
    ),
)
IF16 = dataclasses.replace(
    IF8,
    name="if16",
    space=Pixels(resolution=16),
    conditions=(
        PublishedLowRes(
            resolution=8,
            augmentation=Augmentation(schedule=process.Discrete(), after_upsampling=True),
        ),
        *IF8.conditions,
    ),
    network=dataclasses.replace(IF8.network, lowres=True, residual_scale=0.7071),
    sampling=dataclasses.replace(IF8.sampling, aug_level=0.251),
)


def write_model(folder, *stages):
    """The folder of a converted IF: IF8, IF16 or both."""
    shutil.copytree(T5, folder / "text_encoder")
    names = [stage.name for stage in stages]
    about = {"format": "cascade", "stages": names, "max_tokens": 77, "captions": "clean"}
    write_json(folder / "config.json", about)
    for stage in stages:
        where = folder / stage.name
        where.mkdir()
        write_json(where / "config.json", to_json(stage))
        save_safetensors(where / "model.safetensors", testing.lively(Stage(stage)))
    return folder
