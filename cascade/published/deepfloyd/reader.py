"""DeepFloyd IF's U-Nets as diffusers lays them out: `unet/config.json` and safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cascade.published.deepfloyd.unet import IFUNetConfig
from cascade.storage.network import Published, read_config

MODEL = "diffusers.UNet2DConditionModel"


def read_unet_config(folder: Path) -> IFUNetConfig:
    """From `folder/config.json`. Raises UserError naming the file and the field."""
    return read_config(folder, IFUNetConfig.from_diffusers, MODEL)


def read_unet(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[IFUNetConfig, dict[str, Any]]:
    """The network of a `unet/` folder, and its parameters, each read straight onto its devices.

    dtype: of the parameters and of what the network computes in, whatever the files hold.
    shardings, errors: see `Published.read`.
    """
    config = dataclasses.replace(read_unet_config(folder), compute_dtype=dtype)
    return config, unet(folder, config).read(dtype, shardings)


def unet(folder: Path, config: IFUNetConfig) -> Published:
    """The weights of a `unet/` folder."""
    return Published(
        folder=folder, config=config, given=(config.widths,), what="U-Net", model=MODEL
    )
