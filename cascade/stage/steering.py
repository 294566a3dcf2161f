"""Steering: to change a sampling run without another sampler."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from cascade.diffusion.process import Schedule
from cascade.diffusion.samplers import AfterStep


class Start(NamedTuple):
    """Where a run begins. x [b, *d]: at times[0]. times [n + 1]: those that are left, decreasing
    unless `rises` (see `samplers.again`). after_step: (x_s, logsnr_s, keys) -> x_s after every
    step, or None."""

    x: Float[Array, " b *d"]
    times: Float[Array, " times"]
    after_step: AfterStep | None = None
    rises: bool = False


class Steering:
    """Subclasses are pytrees whose arrays have a row a picture; what decides shapes is static."""

    def check(self, steps: int) -> None:
        """Raise ValueError unless a run of that many steps can be steered so."""

    def start(
        self, noise: Float[Array, " b *d"], schedule: Schedule, times: Float[Array, " times"]
    ) -> Start:
        """noise: what the run would begin from at times[0]. Within the compiled program."""
        raise NotImplementedError
