"""The weights of FID's Inception, which people bring in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cascade.errors import UserError
from cascade.models import InceptionConfig, Network
from cascade.storage import network, paths, weights

FILE = "pt_inception-2015-12-05-6726825d.pth"
"""The file that pytorch-fid publishes; torch-fidelity's weights-inception has the same tensors."""
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{FILE}', weights_only=True), 'inception.safetensors')\""
)
"""What writes it as safetensors. With weights_only torch reads tensors and runs no code."""
HOW = f"download {ADDRESS} and convert it once where torch is installed: {CONVERT}"
"""What people without the weights do."""


def read(path: str | Path) -> dict[str, Any]:
    """Read the parameters of `models.Inception` from a safetensors file, as float32 arrays.

    The classes' weights (fc) may be there or not. Raises UserError for a file that is missing,
    pickled, damaged, or not all of this network; it says where people get the file.
    """
    file = paths.path(path)
    if not file.is_file():
        what = "is no regular file" if file.exists() else "no such file"
        raise UserError(f"Inception's weights {file}: {what}; {HOW}")
    if file.suffix in (".pth", ".pt", ".bin"):
        raise UserError(
            f"Inception's weights {file}: are pickled, which is never read; convert them once "
            f"where torch is installed: {CONVERT}"
        )
    target = weights.as_target(Network(InceptionConfig()).abstract(), lambda _: jnp.float32)
    origins = network.by_name(target)
    with weights.opened_file(file, what="Inception's weights") as opened:
        if problems := weights.misfit(opened.shapes, origins, target, _WITHOUT_USE):
            raise UserError(
                f"Inception's weights {file}: are not those of 2015-12-05: {problems}; {HOW}"
            )
        return weights.read(opened, origins, target)


_WITHOUT_USE = r"(fc\.|.*\.num_batches_tracked$)"
