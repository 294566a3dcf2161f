"""What SR3 is compared with: the same network, trained to predict the mean."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from cascade.stage import Stage
from cascade.training.stage_training import StageTraining


@dataclass(frozen=True, kw_only=True)
class RegressionTraining(StageTraining):
    """Train a super-resolution stage where x is all noise, time 1, alone.

    There nothing but the small picture says what to draw, and the best prediction is the mean of
    all that it may show: the stage, drawn from in one step, is a regression of the same size.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.stage.lowres is None:
            raise ValueError("RegressionTraining.stage must have a LowRes, which it enlarges")
        if self.stage.sampling.steps != 1:
            raise ValueError(
                "RegressionTraining.stage.sampling.steps must be 1, got "
                f"{self.stage.sampling.steps}"
            )
        if self.validation:
            raise ValueError(
                "RegressionTraining.validation must be 0: losses by noise level say nothing of it, "
                f"got {self.validation}"
            )

    def loss(self, params, batch, key, part=None):
        ones = jnp.float32(1), jnp.float32(1)
        return Stage(self.stage).loss(params, batch, key, part, between=ones)
