"""stable-diffusion-x4-upscaler's networks as diffusers lays them out: `unet/` and `vae/`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cascade.models import AutoencoderConfig
from cascade.published.x4_upscaler.unet import UpscalerUNetConfig
from cascade.storage import network as published
from cascade.storage.network import Published, Shapes, read_config
from cascade.storage.weights import Origin


def unet(folder: Path) -> Published:
    """Of a `unet/` folder. Raises UserError naming the file and the field of another network."""
    model = "diffusers.UNet2DConditionModel"
    config = read_config(folder, UpscalerUNetConfig.from_diffusers, model)
    return Published(
        folder=folder, config=config, given=(config.widths,), what="U-Net", model=model
    )


def autoencoder(folder: Path) -> Published:
    """Of a `vae/` folder. Raises UserError naming the file and the field of another network."""
    model = "diffusers.AutoencoderKL"
    config = read_config(folder, AutoencoderConfig.from_diffusers, model)
    return Published(
        folder=folder, config=config, what="autoencoder", model=model, origins=_autoencoder_origins
    )


_OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""What the projections of the attention are called in older files."""


def _autoencoder_origins(target: Any, shapes: Shapes) -> dict[str, Origin]:
    found = published.by_name(target)
    if not any(".proj_attn." in name for name in shapes):
        return found

    def older(name: str) -> str:
        for now, then in _OLDER.items():
            name = name.replace(f".{now}.", f".{then}.")
        return name

    return {
        path: dataclasses.replace(origin, names=tuple(map(older, origin.names)))
        for path, origin in found.items()
    }
