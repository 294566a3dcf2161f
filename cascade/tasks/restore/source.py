"""What a stage is told of a damaged picture, and how a run is steered by one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade import images
from cascade.diffusion import loss, process, samplers
from cascade.models.signals import Signals, Widths
from cascade.stage import Start, Steering
from cascade.stage.conditions import Condition
from cascade.tasks.restore.damage import EVERY, Damage


class SourceInput(NamedTuple):
    """picture [b, h, w, 3] in [-1, 1]: what is left, N(0, 1) in holes. hole [b, h, w, 1]: 1 where
    the picture is drawn and 0 where it is known, which the network is not told."""

    picture: Any
    hole: Any


@dataclass(frozen=True, kw_only=True)
class Source(Condition):
    """A damaged picture: three more channels. Of holes it is told nothing but that there is noise
    in them, and errors count in holes alone (Saharia et al. 2022, "Palette", sec. 3)."""

    name: ClassVar[str] = "source"

    damages: tuple[Damage, ...] = EVERY
    """What the stage learns to undo."""
    residual: bool = False
    """The network predicts what x0 adds to what is left of the picture, so that an untrained stage
    draws that; for prediction="x0"."""

    def __post_init__(self):
        names = [damage.name for damage in self.damages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Source.damages must be one or more, none twice, got {names}")

    def check(self, space, prediction):
        if space.shape()[-1] != 3:
            kind = type(space).__name__
            raise ValueError(f"Source is for pictures, which {kind} does not diffuse")
        if self.residual and prediction != "x0":
            raise ValueError(f'Source.residual is for prediction="x0", got {prediction!r}')

    def widths(self, network):
        return Widths(channels=3)

    def build(self, network, *, rngs):
        return _SourceSignals()

    def shapes(self, space, b, tokens, crop):
        h, w, _ = space.shape(None if crop is None else (crop, crop))
        return {
            "source": jax.ShapeDtypeStruct((b, h, w, 3), jnp.uint8),
            "hole": jax.ShapeDtypeStruct((b, h, w, 1), jnp.bool_),
        }

    def of_batch(self, batch, keys, part, shape):
        """batch: source uint8 [b, h, w, 3], hole bool [b, h, w, 1], as `DamagedSource` has them."""
        told = self.of_examples(batch)
        normal = functools.partial(jax.random.normal, jax.random.fold_in(keys.noise, 3))
        return _told(told.picture, told.hole, loss.draw(normal, told.picture.shape, part))

    def of_examples(self, batch):
        hole = jnp.asarray(batch["hole"], jnp.float32)
        return SourceInput(jnp.asarray(images.to_float(batch["source"])), hole)

    def of_steering(self, steering, b, shape):
        if isinstance(steering, Restoring):
            return SourceInput(jnp.asarray(steering.source, jnp.float32), _float(steering.hole))
        return SourceInput(jnp.zeros((b, *shape)), jnp.ones((b, *shape[:2], 1)))

    def drawn(self, given, keys, shape, level):
        own = jax.vmap(functools.partial(jax.random.fold_in, data=3))(keys)
        return _told(given[0], given[1], samplers.initial_noise(own, shape))

    def where(self, value):
        return value[1]

    def guess(self, value):
        """What is left; the middle of the range where there is noise instead."""
        if not self.residual:
            return None
        return jnp.where(_in_part(value[1]), 0, value[0])


def _float(hole: Any) -> Float[Array, "b h w 1"]:
    return jnp.asarray(hole).astype(jnp.float32)


def _told(picture: Array, hole: Array, noise: Array) -> SourceInput:
    """The picture, with noise where a part of it is missing."""
    return SourceInput(jnp.where(_in_part(hole), noise, picture), hole)


def _in_part(hole: Array) -> Array:
    """Where a hole is, of pictures of which a part is known."""
    return (hole > 0) & (jnp.min(hole, axis=(1, 2, 3), keepdims=True) < 1)


class _SourceSignals(nnx.Module):
    """The picture as channels; there are no parameters."""

    def __call__(self, picture: Float[Array, "b h w 3"], hole: Float[Array, "b h w 1"]) -> Signals:
        return Signals(channels=(picture,))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("source", "hole"), meta_fields=())
@dataclass(frozen=True, kw_only=True)
class Restoring(Steering):
    """Draw what is missing of a damaged picture; what is known stays exactly as it is."""

    # Any, since transformations also build this pytree of shapes and placeholders.
    source: Any
    """[b, h, w, 3] in [-1, 1], of the size that is drawn."""
    hole: Any
    """[b, h, w, 1] bool, True where it is drawn."""

    def start(self, noise, schedule, times):
        source, hole = jnp.asarray(self.source, jnp.float32), jnp.asarray(self.hole)
        ends = schedule.logsnr(times[-1])

        def after_step(x_s, logsnr_s, keys: Key[Array, " b"]):
            noised = process.corrupt(source, samplers.initial_noise(keys, x_s.shape[1:]), logsnr_s)
            # The last step ends in pictures, of which the known part is known exactly.
            known = jnp.where((logsnr_s >= ends)[:, None, None, None], source, noised)
            return jnp.where(hole, x_s, known)

        first = jnp.broadcast_to(schedule.logsnr(times[0]), source.shape[:1])
        x = jnp.where(hole, noise, process.corrupt(source, noise, first))
        return Start(x, times, after_step)
