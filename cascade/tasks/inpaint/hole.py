"""What a stage is told of a picture with a hole."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cascade import images
from cascade.diffusion import loss
from cascade.models.signals import Signals, Widths
from cascade.stage.conditions import Condition


class HoleInput(NamedTuple):
    """known [b, h, w, 3] in [-1, 1], 0 in the hole; hole [b, h, w, 1], 1 there and 0 elsewhere."""

    known: Any
    hole: Any


@dataclass(frozen=True, kw_only=True)
class Hole(Condition):
    """The picture outside a hole, and the hole: four more channels, behind all others.

    In drawing both are those of the mask that steers the run; without one all is hole.
    """

    name: ClassVar[str] = "hole"

    least: float = 0.2
    """The least side of a hole of training, as a share of the picture's."""
    most: float = 0.8
    """The largest."""
    whole: float = 0.1
    """The share of training's pictures of which nothing is told: all of it is hole."""

    def __post_init__(self):
        if not 0 < self.least <= self.most <= 1:
            raise ValueError(
                f"Hole.least must be above 0 and at most Hole.most, which is at most 1, got "
                f"{self.least} and {self.most}"
            )
        if not 0 <= self.whole <= 1:
            raise ValueError(f"Hole.whole must be in [0, 1], got {self.whole}")

    def check(self, space, prediction):
        if space.shape()[-1] != 3:
            raise ValueError(f"Hole is for pictures, which {type(space).__name__} does not diffuse")

    def widths(self, network):
        return Widths(channels=4)

    def build(self, network, *, rngs):
        return _HoleSignals()

    def of_batch(self, batch, keys, part, shape):
        """batch: image uint8 [b, h, w, 3], of which random boxes are hidden."""
        picture = jnp.asarray(images.to_float(batch["image"]))
        draw = functools.partial(_boxes, jax.random.fold_in(keys.drop, 7), self)
        return _told(picture, loss.draw(draw, picture.shape[:3], part)[..., None])

    def of_examples(self, batch):
        """Nothing of the picture: previews draw all of it."""
        b, h, w, _ = batch["image"].shape
        return self.of_steering(None, b, (h, w, 3))

    def of_steering(self, steering, b, shape):
        picture = getattr(steering, "picture", None)
        if picture is None or steering.repaint is None:
            return HoleInput(jnp.zeros((b, *shape[:2], 3)), jnp.ones((b, *shape[:2], 1)))
        return _told(jnp.asarray(picture, jnp.float32), jnp.asarray(steering.repaint))


def _told(picture: Float[Array, "b h w 3"], hole: Bool[Array, "b h w 1"]) -> HoleInput:
    return HoleInput(jnp.where(hole, 0, picture), hole.astype(jnp.float32))


def _boxes(key: Key[Array, ""], config: Hole, shape: tuple[int, ...]) -> Bool[Array, "b h w"]:
    """A box in each of b pictures of h x w pixels, True inside; some are all of the picture."""
    b, h, w = shape
    k_side, k_corner, k_whole = jax.random.split(key, 3)
    side = jax.random.uniform(k_side, (b, 2), minval=config.least, maxval=config.most)
    corner = jax.random.uniform(k_corner, (b, 2)) * (1 - side)
    y, x = (jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w
    rows = (corner[:, :1] <= y) & (y < corner[:, :1] + side[:, :1])
    columns = (corner[:, 1:] <= x) & (x < corner[:, 1:] + side[:, 1:])
    whole = jax.random.bernoulli(k_whole, config.whole, (b, 1, 1))
    return (rows[:, :, None] & columns[:, None, :]) | whole


class _HoleSignals(nnx.Module):
    """The channels; they have no parameters."""

    def __call__(self, known: Float[Array, "b h w 3"], hole: Float[Array, "b h w 1"]) -> Signals:
        return Signals(channels=(known, hole))
