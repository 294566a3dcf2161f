"""How ILVR holds a picture that is being drawn to its reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cascade.diffusion import process, samplers
from cascade.stage import Start, Steering


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("reference",),
    meta_fields=("down", "until", "filter"),
)
@dataclass(frozen=True, kw_only=True)
class ILVR(Steering):
    """Hold what is drawn to a reference at low resolution, after every step."""

    # Any, since transformations also build this pytree of shapes and placeholders.
    reference: Any
    """[b, s, s, 3] in [-1, 1], of the size that is drawn."""
    down: int
    """N: it is held at s / N pixels."""
    until: float = 0.0
    """The time, in [0, 1), below which it is held no more."""
    filter: Literal["box", "bicubic"] = "box"
    """phi: means over blocks of N x N pixels, or bicubic shrinking and enlarging."""

    def start(self, noise, schedule, times):
        y = jnp.asarray(self.reference, jnp.float32)
        ends, release = schedule.logsnr(times[-1]), schedule.logsnr(jnp.float32(self.until))

        def after_step(x_s, logsnr_s, keys):
            noised = process.corrupt(y, samplers.initial_noise(keys, y.shape[1:]), logsnr_s)
            # The last step ends in pictures, which are held to the reference itself.
            y_s = jnp.where((logsnr_s >= ends)[:, None, None, None], y, noised)
            held = x_s + coarse(y_s - x_s, self.down, self.filter)  # phi is linear
            return jnp.where((logsnr_s <= release)[:, None, None, None], held, x_s)

        return Start(noise, times, after_step)


def coarse(x: Float[Array, "b h w c"], down: int, filter: str) -> Float[Array, "b h w c"]:
    """phi(x): x shrunk by a factor that divides its sides, and enlarged again."""
    b, h, w, c = x.shape
    if filter == "box":
        means = x.reshape(b, h // down, down, w // down, down, c).mean((2, 4))
        return means.repeat(down, 1).repeat(down, 2)
    small = jax.image.resize(x, (b, h // down, w // down, c), "cubic")
    return jax.image.resize(small, x.shape, "cubic")
