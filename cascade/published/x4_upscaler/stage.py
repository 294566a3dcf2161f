"""stable-diffusion-x4-upscaler as a stage of a cascade: the third one behind DeepFloyd IF's two.

It diffuses in the latents of an autoencoder, at the resolution of the picture that it enlarges, and
is told of the prompt by a CLIP text encoder of its own. The pipeline's folder, in diffusers'
layout, holds model_index.json, `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/` and
`low_res_scheduler/`; watermarker and safety checker are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.config import read_json
from cascade.errors import UserError
from cascade.published.schedulers import read_schedule, read_scheduler
from cascade.published.stage import PublishedLowRes, PublishedStageConfig, PublishedText
from cascade.published.x4_upscaler import reader as upscaler
from cascade.stage import Augmentation, Latents, Sampling, StageConfig
from cascade.storage import network as published
from cascade.storage.network import Published
from cascade.text import clip

KIND = "StableDiffusionUpscalePipeline"
"""The `_class_name` of model_index.json."""
SCALING = 0.08333
"""The scaling of latents, which the pipeline imposes whatever vae/config.json says."""


@dataclass(frozen=True, kw_only=True)
class UpscalePipeline:
    """The published stage on disk."""

    folder: Path
    """The folder with model_index.json."""
    config: StageConfig
    """Our config of the stage, as `stage_config` reads it."""

    def params(
        self, dtype: str = "float32", shardings: Callable[[Any], Any] | None = None
    ) -> dict[str, Any]:
        """Read the parameters of the U-Net and the autoencoder, each straight onto its devices.

        dtype, shardings: as in `Published.read`; the parameters are nested dicts.
        """
        return {name: part.read(dtype, shardings) for name, part in self._networks.items()}

    @property
    def files(self) -> list[Path]:
        """The paths of the weights, the text encoder's among them."""
        text = clip.text_encoder(self.folder)
        return [file for part in (*self._networks.values(), text) for file in part.files]

    def write(self, folder: Path, dtype: str | None = None) -> None:
        """Write the weights as our model.safetensors into the folder, tensor by tensor.

        Beside it come text_encoder/ and tokenizer/, which the other stages do not share.
        dtype: what weights are stored as, in safetensors' spelling; None keeps that of each.
        Raises UserError for weights that are missing, damaged, misshapen or left over.
        """
        networks = {f"{name}/": part for name, part in self._networks.items()}
        published.write(folder / "model.safetensors", networks, dtype)
        clip.copy_folder(self.folder, folder, dtype)

    @property
    def _networks(self) -> dict[str, Published]:
        """The networks, by the names of the stage's parameters."""
        return {
            "network": upscaler.unet(self.folder / "unet"),
            "space": upscaler.autoencoder(self.folder / "vae"),
        }


def stage_config(folder: Path, lowres_resolution: int | None = None) -> StageConfig:
    """Read the stage that the pipeline's config files describe; no weights are read.

    lowres_resolution: the side in pixels of the pictures that the stage before draws; None is 256,
    what DeepFloyd IF's second one draws.
    Settings without a place in the files are the pipeline's defaults, 75 steps with guidance 9 and
    noise level 20 of 1000; behind another stage the level is 100, as in DeepFloyd IF's README.
    Raises UserError naming the file and the field that is not of the upscaler.
    """
    index = folder / "model_index.json"
    low = lowres_resolution or 256
    network = upscaler.unet(folder / "unet").config
    autoencoder = upscaler.autoencoder(folder / "vae").config
    if (text := clip.text_encoder(folder).config).hidden_size != network.text_width:
        raise UserError(
            f"{folder / 'text_encoder' / 'config.json'}: hidden_size must be the U-Net's "
            f"cross_attention_dim, {network.text_width}, got {text.hidden_size}"
        )
    told = read_json(index)
    most = told.get("max_noise_level", 350) if isinstance(told, dict) else None
    if type(most) is not int or not 0 <= most < network.noise_levels:
        raise UserError(
            f"{index}: max_noise_level must be in 0..{network.noise_levels - 1}, got {most!r}"
        )
    scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    noising = read_schedule(folder / "low_res_scheduler" / "scheduler_config.json")

    def level(entry: int) -> float:
        """Give the time, in 0..1, of that entry of the table."""
        return (entry + 1) / noising.steps

    try:
        side = low * autoencoder.factor
        augmentation = Augmentation(schedule=noising, max_level=level(most), after_upsampling=True)
        return PublishedStageConfig(
            name=f"x{autoencoder.factor}_{side}",
            space=Latents(
                resolution=side, autoencoder=dataclasses.replace(autoencoder, scaling=SCALING)
            ),
            conditions=(
                PublishedLowRes(resolution=low, augmentation=augmentation),
                PublishedText(width=network.text_width),
            ),
            network=network,
            schedule=scheduler.schedule,
            prediction=scheduler.prediction,
            sampling=Sampling(
                steps=75,
                grid=scheduler.grid,
                guidance=9.0,
                sampler=scheduler.sampler,
                threshold=scheduler.threshold,
                aug_level=level(min(20 if lowres_resolution is None else 100, most)),
            ),
        )
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
