"""The job that teaches a trained stage to fill holes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade.errors import UserError
from cascade.stage import Stage
from cascade.tasks.inpaint.hole import Hole
from cascade.training.stage_training import StageTraining


@dataclass(frozen=True, kw_only=True)
class InpaintTraining(StageTraining):
    """Train a stage whose last condition is a Hole, from one without it.

    `init` names a model whose stage of the same name is this one without the Hole, or this one.
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.stage.conditions or not isinstance(self.stage.conditions[-1], Hole):
            raise ValueError("InpaintTraining.stage must have a Hole as its last condition")

    def start(self, shardings=None):
        if self.init is None:
            return None
        without = dataclasses.replace(self.stage, conditions=self.stage.conditions[:-1])
        fields: Any = {f.name: getattr(self, f.name) for f in dataclasses.fields(StageTraining)}
        plain = StageTraining(**{**fields, "stage": without})
        wanted = Stage(self.stage).abstract()
        params = widened(plain.start(), wanted, without)
        return params if shardings is None else jax.device_put(params, shardings(wanted))


def widened(params: Any, wanted: Any, stage: Any) -> Any:
    """The parameters of a stage that is told more channels, which it does not look at yet.

    params: of `stage`, which is told fewer. wanted: the shapes of the wider one's. Where a network
    takes squares of pixels as one, each pixel's channels lie together; what else enters, such as
    coordinates, lies behind them. Raises UserError where other shapes differ.
    """
    patch = getattr(stage.network, "patch", 1)
    told = stage.network.in_channels + stage.widths.channels

    def wide(path: Any, have: Any, want: Any) -> Any:
        if have.shape == want.shape:
            return have
        more = want.shape[-2] - have.shape[-2] if have.ndim == want.ndim == 4 else 0
        if more != 4 * patch**2 or have.shape[:2] != want.shape[:2]:
            raise UserError(
                f"{jax.tree_util.keystr(path)} has the shape {have.shape}, and {want.shape} is "
                "needed: the weights to begin with are of another stage"
            )
        pixels, rest = np.split(np.asarray(have), [patch**2 * told], axis=2)
        pixels = pixels.reshape(*have.shape[:2], patch**2, told, -1)
        pixels = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, 4), (0, 0)))
        pixels = pixels.reshape(*have.shape[:2], patch**2 * (told + 4), -1)
        return jnp.asarray(np.concatenate([pixels, rest], axis=2))

    return jax.tree_util.tree_map_with_path(wide, params, wanted)
