"""What is diffused: pixels, or the latents of an autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cascade import images, ranges
from cascade.models import AutoencoderConfig, Network


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where x0 lives. Subclasses are the spaces."""

    resolution: int
    """Side in pixels of the square pictures that a stage draws."""

    def __post_init__(self):
        ranges.whole(self, 1, ranges.MOST_PIXELS, "resolution")

    @property
    def bounded(self) -> bool:
        """Whether x0 keeps to [-1, 1], so that estimates of it may be thresholded."""
        return False

    @property
    def trainable(self) -> bool:
        """Whether a stage can be trained in this space."""
        return True

    def shape(self, sides: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The shape of one x0, channels last. sides: height and width of the picture, in pixels,
        if not the resolution's."""
        raise NotImplementedError

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Frozen parameters that `decode` takes; {} where it needs none."""
        return {}

    def abstract(self) -> dict[str, Any]:
        """The shapes of `init`'s result, without memory."""
        return {}

    def shapes(self, b: int, crop: int | None) -> dict[str, Any]:
        """What `encode` takes of a batch of b examples, as ShapeDtypeStructs."""
        raise NotImplementedError

    def encode(self, batch: Mapping[str, Any]) -> Float[Array, " b *d"]:
        """A training batch -> x0, float32."""
        raise NotImplementedError

    def decode(self, params: Any, x0: Float[Array, " b *d"]) -> Float[Array, "b h w 3"]:
        """x0 -> pictures, nominally in [-1, 1]."""
        raise NotImplementedError

    def computing_in(self, dtype: str) -> Space:
        """The same space, whose networks compute in that dtype."""
        return self


@dataclass(frozen=True, kw_only=True)
class Pixels(Space):
    """Pictures themselves, in [-1, 1]."""

    @property
    def bounded(self) -> bool:
        return True

    def shape(self, sides=None):
        return (*(sides or (self.resolution, self.resolution)), 3)

    def shapes(self, b, crop):
        side = crop or self.resolution
        return {"image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8)}

    def encode(self, batch):
        """batch: image uint8 [b, s, s, 3], any crop of the resolution."""
        return images.to_float(batch["image"])

    def decode(self, params, x0):
        return x0


@dataclass(frozen=True, kw_only=True)
class Latents(Space):
    """Latents of a frozen autoencoder (Rombach et al. 2022). A stage in them is drawn from, not
    trained."""

    autoencoder: AutoencoderConfig
    """What encodes and decodes; its parameters lie beside the network's."""

    def __post_init__(self):
        super().__post_init__()
        if self.resolution % self.autoencoder.factor:
            raise ValueError(
                f"Latents.resolution must be a multiple of {self.autoencoder.factor}, by which the "
                f"autoencoder shrinks a picture, got {self.resolution}"
            )

    @property
    def trainable(self) -> bool:
        return False

    def shape(self, sides=None):
        factor = self.autoencoder.factor
        height, width = sides or (self.resolution, self.resolution)
        return height // factor, width // factor, self.autoencoder.latent_channels

    def init(self, key):
        return Network(self.autoencoder).init(key)

    def abstract(self):
        return Network(self.autoencoder).abstract()

    def encode(self, batch):
        raise ValueError("Latents: a stage in the latents of an autoencoder is not trained")

    def decode(self, params, x0):
        return _decode(self.autoencoder, params, x0)

    def computing_in(self, dtype):
        return replace(self, autoencoder=replace(self.autoencoder, compute_dtype=dtype))


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, params, latents):
    # Picture by picture: at full resolution the activations of one, not the weights, fill memory.
    autoencoder = Network(config).bind(params)
    return jax.lax.map(lambda latent: autoencoder.decode(latent[None])[0], latents)
