"""DeepFloyd IF as diffusers lays it out: `unet/config.json` and the names of its tensors.

Our U-Net's modules carry the published names, so a parameter's path is the tensor's name but for
its last part: `conv1.kernel` is `conv1.weight` with its axes in another order, `norm1.scale` is
`norm1.weight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from cascade.config import read_json
from cascade.errors import UserError
from cascade.models import IFUNetConfig, Network
from cascade.pretrained import weights
from cascade.pretrained.weights import Origin

STEM = "diffusion_pytorch_model"
CONVERT = (
    'python -c "from diffusers import UNet2DConditionModel as M; '
    "M.from_pretrained('SOURCE', use_safetensors=False).save_pretrained('DIR')\""
)


def read_unet_config(folder: Path) -> IFUNetConfig:
    """From `folder/config.json`. Raises UserError naming the file and the field."""
    file = folder / "config.json"
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file}: must hold the fields of a UNet2DConditionModel")
    try:
        return IFUNetConfig.from_diffusers(fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"{file}: {e}") from None


def read_unet(
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[IFUNetConfig, dict[str, Any]]:
    """The network of a `unet/` folder, and its parameters, each read straight onto its devices.

    dtype: of the parameters and of what the network computes in, whatever the files hold.
    shardings: parameters as ShapeDtypeStructs -> the placement of each, as
    `functools.partial(cascade.sharding.shardings, mesh=mesh)`; None is the default device.
    Raises UserError for anything missing, damaged, misshapen or left over.
    """
    config = dataclasses.replace(read_unet_config(folder), compute_dtype=dtype)
    abstract = Network(config).abstract()
    target = weights.as_target(abstract, lambda _: jnp.dtype(dtype), shardings)
    origins = unet_origins(target)
    with opened(folder) as found:
        weights.fit(found.name, found.shapes, origins, target)
        return config, weights.read(found, origins, target)


def opened(folder: Path) -> contextlib.AbstractContextManager[weights.Weights]:
    """The tensors of a `unet/` folder."""
    return weights.opened(folder, STEM, what="U-Net", convert=CONVERT)


def unet_origins(target: Any) -> dict[str, Origin]:
    """Where in the published files each parameter of an IFUNet is."""
    return {path: _origin(path, len(leaf.shape)) for path, leaf in weights.leaves(target)}


def _origin(path: str, rank: int) -> Origin:
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        # Linear is [out, in] there and so is, with two axes of length 1, a 1x1 convolution.
        axes = (2, 3, 1, 0) if rank == 4 else (1, 0)
        return Origin((".".join([*modules, "weight"]),), axes)
    return Origin((".".join([*modules, {"scale": "weight"}.get(leaf, leaf)]),))
