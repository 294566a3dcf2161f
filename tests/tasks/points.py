"""A whole toy application, as somebody would write it outside of this package.

It draws points of the plane, on a circle about a centre, in the direction of an angle.

    point = centre + (cos angle, sin angle) / 2

The network is told of the centre as channels and of the angle as a vector. A prompt is three
numbers, "0.25 -0.25 90": the centre's x and y and the angle in degrees.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade.devices import sharding
from cascade.models.layers import Linear
from cascade.models.network import NetworkConfig
from cascade.models.signals import Signals, TimeEmbedding, Widths
from cascade.stage import Condition, Space, Start, Steering
from cascade.training.job import Running
from cascade.training.stage_training import StageJob

SIDE = 8  # of the pictures that points are shown in, which reach from -1 to 1


@dataclass(frozen=True, kw_only=True)
class Plane(Space):
    resolution: int = SIDE

    def shape(self, sides=None):
        return (2,)

    def shapes(self, b, crop):
        return {"point": jax.ShapeDtypeStruct((b, 2), jnp.float32)}

    def encode(self, batch):
        return batch["point"]

    def decode(self, params, x0):
        """A white pixel on black, where the point is."""
        middles = (jnp.arange(SIDE) + 0.5) / SIDE * 2 - 1
        near = jnp.abs(x0[:, :, None] - middles) <= 1 / SIDE
        lit = near[:, 1, :, None] & near[:, 0, None, :]
        return jnp.repeat(jnp.where(lit, 1.0, -1.0)[..., None], 3, axis=-1)


class Number(NamedTuple):
    value: jax.Array


@dataclass(frozen=True, kw_only=True)
class Centre(Condition):
    name: ClassVar[str] = "centre"

    def widths(self, network):
        return Widths(channels=2)

    def build(self, network, *, rngs):
        return Plain()

    def shapes(self, space, b, tokens, crop):
        return {"centre": jax.ShapeDtypeStruct((b, 2), jnp.float32)}

    def of_batch(self, batch, keys, part, shape):
        return self.of_examples(batch)

    def of_examples(self, batch):
        return Number(batch["centre"])

    def of_prompts(self, prompts, embed):
        return Number(jnp.array([[float(w) for w in p.split()[:2]] for p in prompts]))


class Plain(nnx.Module):
    def __call__(self, centre):
        return Signals(channels=(centre,))


@dataclass(frozen=True, kw_only=True)
class Angle(Condition):
    name: ClassVar[str] = "angle"

    def widths(self, network):
        return Widths()

    def build(self, network, *, rngs):
        return Direction(network.embedding_width, rngs)

    def shapes(self, space, b, tokens, crop):
        return {"angle": jax.ShapeDtypeStruct((b,), jnp.float32)}

    def of_batch(self, batch, keys, part, shape):
        return self.of_examples(batch)

    def of_examples(self, batch):
        return Number(batch["angle"])

    def of_prompts(self, prompts, embed):
        return Number(jnp.array([np.deg2rad(float(p.split()[2])) for p in prompts]))


class Direction(nnx.Module):
    def __init__(self, width, rngs):
        self.linear = Linear(2, width, rngs=rngs)

    def __call__(self, angle):
        return Signals(vectors=(self.linear(jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)),))


@dataclass(frozen=True, kw_only=True)
class PerceptronConfig(NetworkConfig):
    in_channels: int = 2
    out_channels: int = 2
    width: int = 64

    @property
    def embedding_width(self):
        return self.width

    def build(self, widths, *, rngs):
        return Perceptron(self, widths, rngs)


class Perceptron(nnx.Module):
    def __init__(self, config, widths, rngs):
        self.time = TimeEmbedding(16, config.width, rngs)
        self.first = Linear(config.in_channels + widths.channels, config.width, rngs=rngs)
        self.second = Linear(config.width, config.width, rngs=rngs)
        self.last = Linear(config.width, config.out_channels, rngs=rngs)

    def __call__(self, x, time, signals, key=None):
        h = self.first(jnp.concatenate([x, *signals.channels], axis=-1)) + self.time(time)
        for vector in signals.vectors:
            h = h + vector
        return self.last(jax.nn.silu(self.second(jax.nn.silu(h))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Below(Steering):
    """Keeps the point below a height, after every step."""

    height: jax.Array

    def start(self, noise, schedule, times):
        def after_step(x_s, logsnr_s, keys):
            return x_s.at[:, 1].min(self.height)

        return Start(noise, times, after_step)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    below: float | None = None
    """Keep points below this height."""

    def steering(self, stages, every, settings):
        return [None if self.below is None else Below(jnp.float32(self.below))]

    def record(self, stages, steering):
        return {"below": self.below}


@dataclass(frozen=True, kw_only=True)
class Points(StageJob):
    def open(self, mesh, workdir):
        return Drawn(self, mesh)


class Drawn(Running):
    def __init__(self, job, mesh):
        self.batches = Batches(job.batch_size, job.seed)
        self.mesh = mesh

    def prepare(self, batch, step):
        return sharding.shard_batch(batch, self.mesh)


class Batches:
    def __init__(self, size, seed):
        self.size, self.seed, self.step = size, seed, 0

    def __next__(self):
        rng = np.random.default_rng((self.seed, self.step))
        self.step += 1
        centre = rng.uniform(-0.5, 0.5, (self.size, 2)).astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi, self.size).astype(np.float32)
        point = centre + np.stack([np.cos(angle), np.sin(angle)], -1) / 2
        return {"centre": centre, "angle": angle, "point": point.astype(np.float32)}

    def get_state(self):
        return {"examples": self.step * self.size}

    def set_state(self, state):
        self.step = state["examples"] // self.size
