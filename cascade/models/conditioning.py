"""What a network is conditioned on, and how it becomes an embedding.

Time, augmentation level and pooled text are summed into one vector (Imagen, sec. 2.1 and 2.4); the
text tokens themselves go to the attention layers as keys and values.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cascade.models.layers import Context, Linear, NetworkConfig, attend, space_to_depth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Everything a denoiser may be told; a network takes the fields it was built for.

    text: [b, l, d] float32 token embeddings. text_mask: [b, l] bool, False on padding.
    lowres: [b, h, w, c] in [-1, 1], already resized to the height and width of x.
    lowres_time: [b], how far `lowres` was corrupted, in the units of the network's time (0..1000).
    """

    # Any, since transformations also build this pytree of shapes, shardings and placeholders.
    text: Any = None
    text_mask: Any = None
    lowres: Any = None
    lowres_time: Any = None

    def dropped(self, drop: Bool[Array, " b"]) -> "Conditioning":
        """Without text where `drop`: tokens zero and masked, thus sequence and pooled together."""
        if self.text is None:
            return self
        keep = ~drop[:, None]
        return dataclasses.replace(
            self,
            text=jnp.where(keep[:, :, None], self.text, 0),
            text_mask=self.text_mask & keep,
        )

    def null(self) -> "Conditioning":
        """Without text in every row: the unconditional branch of classifier-free guidance."""
        if self.text is None:
            return self
        return dataclasses.replace(
            self,
            text=jnp.zeros_like(self.text),
            text_mask=jnp.zeros_like(self.text_mask),
        )


class Embedder(nnx.Module):
    """(time, Conditioning) -> Context. Float32 throughout; it is a vector per image."""

    def __init__(self, config: NetworkConfig, rngs: nnx.Rngs):
        width, emb_width = config.levels[0].width, config.embedding_width
        self.time = TimeEmbedding(width, emb_width, rngs)
        self.lowres_time = TimeEmbedding(width, emb_width, rngs) if config.lowres else None
        self.text = PooledText(config, rngs) if config.text_width else None

    def __call__(self, time: Float[Array, " b"], cond: Conditioning) -> Context:
        emb = self.time(time)
        if self.lowres_time is not None:
            emb = emb + self.lowres_time(cond.lowres_time)
        if self.text is None:
            return Context(jax.nn.silu(emb), None, None)
        pooled, text, mask = self.text(cond.text, cond.text_mask)
        return Context(jax.nn.silu(emb + pooled), text, mask)


class TimeEmbedding(nnx.Module):
    """Sinusoids of a time in 0..1000, then two layers (Ho et al. 2020)."""

    def __init__(self, width: int, emb_width: int, rngs: nnx.Rngs):
        self.width = width
        self.hidden = Linear(width, emb_width, rngs=rngs)
        self.out = Linear(emb_width, emb_width, rngs=rngs)

    def __call__(self, time: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self.out(jax.nn.silu(self.hidden(sinusoids(time, self.width))))


class PooledText(nnx.Module):
    """LayerNorm of the tokens, the null token in front of them, and their attention pooling.

    The null token is learned and always visible, so that a row without text has a finite softmax
    and a learned unconditional embedding. Padding is invisible whatever it holds.
    The pooling query is a projection of the mean of the visible tokens. The tokens returned, for
    the attention layers, are config.attended_width wide.
    """

    def __init__(self, config: NetworkConfig, rngs: nnx.Rngs):
        text_width, emb_width = config.text_width, config.embedding_width
        self.head_width = config.head_width
        self.norm = nnx.LayerNorm(text_width, rngs=rngs)
        self.null = nnx.Param(jax.random.normal(rngs.params(), (text_width,)))
        self.query = Linear(text_width, emb_width, rngs=rngs)
        self.keys_values = Linear(text_width, 2 * emb_width, rngs=rngs)
        self.out = Linear(emb_width, emb_width, rngs=rngs)
        self.context = (
            Linear(text_width, config.context_width, rngs=rngs) if config.context_width else None
        )

    def __call__(
        self, text: Float[Array, "b l d"], mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b l1 d"], Bool[Array, "b l1"]]:
        b, _, d = text.shape
        text = self.norm(jnp.where(mask[:, :, None], text.astype(jnp.float32), 0))
        text = jnp.concatenate([jnp.broadcast_to(self.null[...], (b, 1, d)), text], axis=1)
        mask = jnp.concatenate([jnp.ones((b, 1), bool), mask], axis=1)
        mean = jnp.mean(text, axis=1, keepdims=True, where=mask[:, :, None])
        k, v = jnp.split(self.keys_values(text), 2, axis=-1)
        pooled = attend(self.query(mean), k, v, mask, self.head_width)
        return self.out(pooled)[:, 0], self.context(text) if self.context else text, mask


def network_input(
    config: NetworkConfig, x: Float[Array, "b h w c"], cond: Conditioning
) -> Float[Array, "b h2 w2 d"]:
    """x, the low-resolution picture beside it if the network has one, in patches.

    Raises ValueError for what the network needs and was not given, or cannot divide.
    """
    name, multiple = type(config).__name__, config.side_multiple
    if x.shape[1] % multiple or x.shape[2] % multiple:
        raise ValueError(
            f"image sides must be multiples of {multiple} (patch x strides of {name}), "
            f"got {x.shape[1]}x{x.shape[2]}"
        )
    text = cond.text
    if config.text_width and (
        text is None or text.shape[-1] != config.text_width or cond.text_mask is None
    ):
        got = None if text is None else text.shape
        raise ValueError(
            f"{name}.text_width is {config.text_width}: Conditioning.text must be "
            f"[b, l, {config.text_width}] with its text_mask (all False for no text), got {got}"
        )
    if config.lowres:
        if cond.lowres is None or cond.lowres.shape[:3] != x.shape[:3] or cond.lowres_time is None:
            got = None if cond.lowres is None else cond.lowres.shape
            raise ValueError(
                f"{name}.lowres is on: Conditioning.lowres must be resized to the {x.shape[1]}x"
                f"{x.shape[2]} of x, with its lowres_time [b]; got lowres {got}"
            )
        x = jnp.concatenate([x, cond.lowres.astype(x.dtype)], axis=-1)
    return space_to_depth(x.astype(config.compute_dtype), config.patch)


def sinusoids(time: Float[Array, " b"], width: int) -> Float[Array, "b w"]:
    """[cos, sin] of time at width / 2 frequencies from 1 down to almost 1 / 10000 rad per unit."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / half)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
