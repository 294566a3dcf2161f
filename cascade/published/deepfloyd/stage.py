"""DeepFloyd IF as stages of a cascade: its published pipelines, in diffusers' layout.

A cascade has two of them; stage III is stable-diffusion-x4-upscaler (`x4_upscaler/stage.py`).
A pipeline's folder holds model_index.json, `unet/`, `scheduler/`, in stage II
`image_noising_scheduler/`, and in stage I `tokenizer/` and `text_encoder/`, the T5 of all stages.
What the configs say decides what a stage is; watermarker and safety checker are not read.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from cascade.config import from_json, read_json, to_json
from cascade.diffusion import loss
from cascade.errors import UserError
from cascade.published.deepfloyd import reader as deepfloyd
from cascade.published.schedulers import read_scheduler
from cascade.published.x4_upscaler.stage import UpscalePipeline
from cascade.published.x4_upscaler.unet import UpscalerUNetConfig
from cascade.runner import model_folder as pretrained
from cascade.stage import Augmentation, Sampling, Stage, StageConfig
from cascade.storage import network as published
from cascade.storage import weights
from cascade.storage.paths import write_json
from cascade.text import DEFAULT_MAX_TOKENS, clip
from cascade.text.captions import Captions

Dtype = Literal["float32", "bfloat16"]
KINDS = ("IFPipeline", "IFSuperResolutionPipeline")
"""The `_class_name` of model_index.json in stage I and in stage II."""
MAX_TOKENS = 77
"""How many tokens the text of a prompt is padded or cut to."""
CAPTIONS: Captions = "clean"
"""What is done to a prompt first."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One published stage on disk."""

    folder: Path
    """The folder with model_index.json."""
    config: StageConfig
    """Our config of the stage, as `stage_config` reads it."""

    def params(
        self, dtype: Dtype = "float32", shardings: Callable[[Any], Any] | None = None
    ) -> dict[str, Any]:
        """Read the U-Net's parameters, each straight onto its devices, as `Published.read` does."""
        return self._unet.read(dtype, shardings)

    @property
    def files(self) -> list[Path]:
        """The paths of the weights."""
        return self._unet.files

    def write(self, folder: Path, dtype: str | None = None) -> None:
        """Write the weights as our model.safetensors into the folder, tensor by tensor.

        dtype: what they are stored as, in safetensors' spelling; None keeps that of each.
        Raises UserError for weights that are missing, damaged, misshapen or left over.
        """
        published.write(folder / "model.safetensors", {"": self._unet}, dtype)

    @property
    def _unet(self) -> published.Published:
        network: Any = self.config.network
        return deepfloyd.unet(self.folder / "unet", network)


def read_converted(
    folder: Path,
    config: StageConfig,
    *,
    dtype: Dtype | None = None,
    shardings: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """The parameters of a stage that `cascade convert` wrote; dtype None is what it computes in."""
    kind = jnp.dtype(dtype or config.network.compute_dtype)
    target = weights.as_target(Stage(config).abstract(), lambda _: kind, shardings)
    origins = weights.own_origins(target)
    with weights.opened(folder, "model", what="stage", convert="`cascade convert`") as opened:
        weights.fit(opened.name, opened.shapes, origins, target)
        return weights.read(opened, origins, target)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model that training begins from, as `cascade sample --model` names it: a folder that
    `cascade convert` or `cascade export` wrote, or the folders or hub names of its pipelines."""

    model: str

    def stages(self) -> list[StageConfig]:
        """Smallest first; no weights are read."""
        if found := self._pipelines:
            return [pipeline.config for pipeline in found]
        files = [self._model / name / "config.json" for name in self._described["stages"]]
        return [from_json(StageConfig, read_json(file), str(file)) for file in files]

    def text_encoder(self) -> str:
        """What `T5Encoder.load` takes: that of the model."""
        if found := self._pipelines:
            return str(found[0].folder)
        if named := self._described.get("text_encoder"):
            return named
        # The local copy of a model in object storage is gone when this process ends.
        folder = self.model if "://" in self.model else self._model
        return f"{folder}/text_encoder"

    def max_tokens(self) -> int:
        """Of that text encoder."""
        if self._pipelines:
            return MAX_TOKENS
        return self._described.get("max_tokens", DEFAULT_MAX_TOKENS)

    def captions(self) -> Captions:
        """What is done to a prompt first."""
        if self._pipelines:
            return CAPTIONS
        return from_json(Captions, self._described.get("captions", "verbatim"), "captions")

    def own_text_encoder(self, config: StageConfig) -> published.Published | None:
        """Of its stage of that name, if that does not share the model's."""
        own = isinstance(config.network, UpscalerUNetConfig)
        return clip.text_encoder(self._folder(config.name)) if own else None

    def params(
        self, config: StageConfig, dtype: Dtype, shardings: Callable[[Any], Any] | None = None
    ) -> dict[str, Any]:
        """Of its stage of that name, each read straight onto its devices.

        UserError unless the stage is there and its network is the config's, however that computes.
        """
        for own in self.stages():
            if own.name == config.name:
                break
        else:
            known = ", ".join(own.name for own in self.stages())
            raise UserError(f"init={self.model}: has no stage {config.name}, only {known}")
        free = {f: getattr(config.network, f) for f in ("compute_dtype", "remat")}
        if dataclasses.replace(own.network, **free) != config.network:
            raise UserError(
                f"init={self.model}: the network of its {config.name} is not that of the config"
            )
        if found := self._pipelines:
            pipeline = next(p for p in found if p.config.name == config.name)
            return pipeline.params(dtype, shardings)
        folder = self._folder(config.name)
        return read_converted(folder, config, dtype=dtype, shardings=shardings)

    def copy_stage(self, name: str, folder: Path) -> None:
        """Write its stage of that name as a new folder of a model, weights as they are stored."""
        for pipeline in self._pipelines:
            if pipeline.config.name == name:
                write_stage(pipeline, folder)
                return
        shutil.copytree(self._folder(name), folder)

    def _folder(self, stage: str) -> Path:
        """What holds a stage's weights, and its own text encoder if it has one."""
        for pipeline in self._pipelines:
            if pipeline.config.name == stage:
                return pipeline.folder
        return self._model / stage

    @functools.cached_property
    def _model(self) -> Path:
        """Of one of ours, its folder; of one in object storage a local copy, made once."""
        return pretrained.find(self.model)

    @property
    def _described(self) -> dict[str, Any]:
        return pretrained.described(self._model)

    @functools.cached_property
    def _pipelines(self) -> Sequence[Pipeline | UpscalePipeline]:
        from cascade.published.pipelines import is_pipeline, pipelines

        names = self.model.split(",")
        return pipelines(names) if is_pipeline(names[0]) else []


def write_stage(
    pipeline: Pipeline | UpscalePipeline, folder: Path, dtype: str | None = None
) -> None:
    """The published stage as a new folder of a model; dtype: of its weights there, see `write`."""
    folder.mkdir()
    write_json(folder / "config.json", to_json(pipeline.config))
    pipeline.write(folder, dtype)


def computing_in(config: StageConfig, dtype: Dtype) -> StageConfig:
    network = dataclasses.replace(config.network, compute_dtype=dtype)
    autoencoder = config.autoencoder
    if autoencoder is not None:
        autoencoder = dataclasses.replace(autoencoder, compute_dtype=dtype)
    return dataclasses.replace(config, network=network, autoencoder=autoencoder)


def stage_config(folder: Path, lowres_resolution: int | None = None) -> StageConfig:
    """Read the stage that a pipeline's config files describe; no weights are read.

    lowres_resolution: the side in pixels of the pictures that the stage before draws; None is a
    quarter of a super-resolution stage's own.
    Settings without a place in the files are the pipelines' defaults: 100 steps with guidance 7 in
    stage I, 50 steps with guidance 4 and noise level 250 of 1000 in stage II.
    Raises UserError naming the file and the field that is not of DeepFloyd IF.
    """
    index = folder / "model_index.json"
    if (kind := read_json(index).get("_class_name")) not in KINDS:
        raise UserError(f"{index}: _class_name must be {' or '.join(KINDS)}, got {kind!r}")
    network = deepfloyd.read_unet_config(folder / "unet")
    side = read_json(folder / "unet" / "config.json").get("sample_size")
    if not isinstance(side, int) or side % network.side_multiple:
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: sample_size must be a multiple of "
            f"{network.side_multiple}, got {side!r}"
        )
    if network.lowres != (kind == KINDS[1]):
        raise UserError(f"{index}: a {kind} does not go with the U-Net beside it")
    scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    lowres, sampling = (
        {},
        Sampling(
            steps=100,
            grid=scheduler.grid,
            guidance=7.0,
            sampler=scheduler.sampler,
            threshold=scheduler.threshold,
        ),
    )
    if network.lowres:
        noising = read_scheduler(folder / "image_noising_scheduler" / "scheduler_config.json")
        # Noise level 250 is entry 250 of the table.
        sampling = dataclasses.replace(sampling, steps=50, guidance=4.0, aug_level=0.251)
        lowres = {
            "lowres_resolution": lowres_resolution or side // 4,
            "augmentation": Augmentation(schedule=noising.schedule, after_upsampling=True),
        }
    try:
        return StageConfig(
            name=f"if{side}",
            resolution=side,
            network=network,
            schedule=scheduler.schedule,
            prediction=scheduler.prediction,
            loss=loss.Loss(space=scheduler.prediction),
            variance=loss.LearnedVariance() if network.learned_variance else None,
            sampling=sampling,
            **lowres,
        )
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
