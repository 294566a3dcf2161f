"""DeepFloyd IF as stages of a cascade: its published pipelines, in diffusers' layout.

A cascade has two of them; stage III is stable-diffusion-x4-upscaler (`x4_upscaler/stage.py`).
A pipeline's folder holds model_index.json, `unet/`, `scheduler/`, in stage II
`image_noising_scheduler/`, and in stage I `tokenizer/` and `text_encoder/`, the T5 of all stages.
What the configs say decides what a stage is; watermarker and safety checker are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cascade.config import read_json
from cascade.diffusion import loss
from cascade.errors import UserError
from cascade.published.deepfloyd import reader as deepfloyd
from cascade.published.schedulers import read_schedule, read_scheduler
from cascade.published.stage import (
    DRAWING,
    PublishedLowRes,
    PublishedStageConfig,
    PublishedText,
)
from cascade.ranges import MOST_PIXELS, shown
from cascade.stage import Augmentation, Pixels, Sampling, StageConfig
from cascade.storage import network as published
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
        """Read the stage's parameters, each straight onto its devices."""
        return {"network": self._unet.read(dtype, shardings)}

    @property
    def files(self) -> list[Path]:
        """The paths of the weights."""
        return self._unet.files

    def write(self, folder: Path, dtype: str | None = None) -> None:
        """Write the weights as our model.safetensors into the folder, tensor by tensor.

        dtype: what they are stored as, in safetensors' spelling; None keeps that of each.
        Raises UserError for weights that are missing, damaged, misshapen or left over.
        """
        published.write(folder / "model.safetensors", {"network/": self._unet}, dtype)

    @property
    def _unet(self) -> published.Published:
        network: Any = self.config.network
        return deepfloyd.unet(self.folder / "unet", network)


def stage_config(folder: Path, lowres_resolution: int | None = None) -> StageConfig:
    """Read the stage that a pipeline's config files describe; no weights are read.

    lowres_resolution: the side in pixels of the pictures that the stage before draws; None is a
    quarter of a super-resolution stage's own.
    Settings without a place in the files are the pipelines' defaults: 100 steps with guidance 7 in
    stage I, 50 steps with guidance 4 and noise level 250 of 1000 in stage II.
    Raises UserError naming the file and the field that is not of DeepFloyd IF.
    """
    index = folder / "model_index.json"
    told = read_json(index)
    kind = told.get("_class_name") if isinstance(told, dict) else None
    if kind not in KINDS:
        raise UserError(f"{index}: _class_name must be {' or '.join(KINDS)}, got {kind!r}")
    network = deepfloyd.read_unet_config(folder / "unet")
    side = read_json(folder / "unet" / "config.json").get("sample_size")
    if type(side) is not int or side % network.side_multiple or not 1 <= side <= MOST_PIXELS:
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: sample_size must be a multiple of "
            f"{network.side_multiple}, at most {MOST_PIXELS}, got {shown(side)}"
        )
    if network.lowres != (kind == KINDS[1]):
        raise UserError(f"{index}: a {kind} does not go with the U-Net beside it")
    scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    conditions: tuple[Any, ...] = (PublishedText(width=network.text_width),)
    try:
        sampling = Sampling(
            grid=scheduler.grid,
            sampler=scheduler.sampler,
            threshold=scheduler.threshold,
            **DRAWING[network.lowres],
        )
        if network.lowres:
            noising = read_schedule(folder / "image_noising_scheduler" / "scheduler_config.json")
            augmentation = Augmentation(schedule=noising, after_upsampling=True)
            low = lowres_resolution or side // 4
            lowres = PublishedLowRes(resolution=low, augmentation=augmentation)
            conditions = (lowres, *conditions)
        return PublishedStageConfig(
            name=f"if{side}",
            space=Pixels(resolution=side),
            conditions=conditions,
            network=network,
            schedule=scheduler.schedule,
            prediction=scheduler.prediction,
            loss=loss.Loss(space=scheduler.prediction),
            variance=loss.LearnedVariance() if network.learned_variance else None,
            sampling=sampling,
        )
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
