"""Steering: to change a sampling run without another sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from cascade.diffusion.denoise import Denoiser
from cascade.diffusion.process import Schedule
from cascade.diffusion.samplers import AfterStep


class Start(NamedTuple):
    """Where a run begins, and what changes it.

    x [b, *d]: at times[0]. times [n + 1]: those that are left, decreasing unless `rises` (see
    `samplers.again`). after_step: (x_s, logsnr_s, keys) -> x_s after every step, or None. around:
    the stage's denoiser, guided and not yet thresholded -> the one whose estimates are thresholded
    and sampled with, such as `denoise.pulled`; or None."""

    x: Float[Array, " b *d"]
    times: Float[Array, " times"]
    after_step: AfterStep | None = None
    rises: bool = False
    around: Callable[[Denoiser], Denoiser] | None = None


class Steering:
    """Subclasses are pytrees whose arrays have a row a picture; what decides shapes is static."""

    def repeated(self, b: int) -> Steering:
        """The steering of b pictures alike, given that of one, whose arrays lack the rows.

        A subclass with arrays that all pictures share, such as weights, leaves those as they are.
        """
        return jax.tree.map(lambda x: np.broadcast_to(x, (b, *x.shape)), self)

    def check(self, steps: int) -> None:
        """Raise ValueError unless a run of that many steps can be steered so."""

    def start(
        self, noise: Float[Array, " b *d"], schedule: Schedule, times: Float[Array, " times"]
    ) -> Start:
        """noise: what the run would begin from at times[0]. Within the compiled program."""
        raise NotImplementedError
