"""What the two U-Nets of Imagen share: their fields, what a block is told, and the blocks.

Images are [b, h, w, c]. Blocks compute in the dtype of their input; see `layers`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cascade import ranges
from cascade.models import layers
from cascade.models.layers import Conv, GroupNorm, Linear, Resample
from cascade.models.network import NetworkConfig
from cascade.models.signals import Signals, TimeEmbedding, Widths, check_signals


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelsConfig(NetworkConfig):
    """The fields that UNet and EfficientUNet share."""

    levels: tuple[Any, ...]
    """From full resolution down; each network has its own kind of level."""
    patch: int = 1
    """Pixels a side that enter as one (space to depth; Hoogeboom et al. 2023); 1 is the papers'."""
    head_width: int = 64
    """Channels of an attention head."""
    emb_width: int | None = None
    """Width of the embedding of time and of the vectors told; None is 4 * levels[0].width."""
    dropout: float = 0.0
    """Share of the activations dropped in each residual block while training, in [0, 1)."""

    def __post_init__(self):
        name = type(self).__name__
        ranges.levels(self, width=8)
        sizes = ("in_channels", "out_channels", "head_width")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, *sizes)
        ranges.whole(self, 1, 64, "patch")
        if self.emb_width is not None:
            ranges.whole(self, 1, ranges.MOST_CHANNELS, "emb_width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}.dropout must be in [0, 1), got {self.dropout}")

    def check_heads(self, field: str, width: int) -> None:
        """Raise ValueError unless that many channels make whole attention heads."""
        if width % self.head_width:
            raise ValueError(
                f"{type(self).__name__}.{field} must be a multiple of head_width="
                f"{self.head_width} (attention heads), got {width}"
            )

    @property
    def embedding_width(self) -> int:
        return self.emb_width or 4 * self.levels[0].width

    @property
    def time_width(self) -> int:
        return self.levels[0].width

    def pixel_channels(self, widths: Widths) -> tuple[int, int]:
        """Channels into the first convolution and out of the last one."""
        inputs = self.in_channels + widths.channels
        return inputs * self.patch**2, self.out_channels * self.patch**2


class Context(NamedTuple):
    """What every block is told besides the image.

    emb [b, e] float32: time and the vectors told, after its activation.
    tokens [b, l, d], mask [b, l]: what attention sees besides the image, or None.
    """

    emb: Float[Array, "b e"]
    tokens: Float[Array, "b l d"] | None
    mask: Bool[Array, "b l"] | None


def context_of(embed: TimeEmbedding, time: Float[Array, " b"], signals: Signals) -> Context:
    """What blocks are told, in float32 throughout: it is a vector per image.

    Raises ValueError for vectors of another width than the embedding.
    """
    emb = embed(time)
    for vector in signals.vectors:
        if vector.shape != emb.shape:  # one of width 1 would be added to every channel
            raise ValueError(
                f"Signals.vectors must be [{', '.join(map(str, emb.shape))}], as wide as the "
                f"network's embedding_width, got {vector.shape}"
            )
        emb = emb + vector
    return Context(jax.nn.silu(emb), signals.tokens, signals.mask)


def network_input(
    config: LevelsConfig, widths: Widths, x: Float[Array, "b h w c"], signals: Signals
) -> Float[Array, "b h2 w2 d"]:
    """x, the channels told behind its own, in patches.

    Raises ValueError for what the network needs and was not given, or cannot divide.
    """
    config.check_sides(*x.shape[1:3])
    check_signals(type(config).__name__, widths, x, signals)
    x = jnp.concatenate([x, *(c.astype(x.dtype) for c in signals.channels)], axis=-1)
    return layers.space_to_depth(x.astype(config.compute_dtype), config.patch)


class Block(nnx.Module):
    """A residual block, then attention if there is any: the unit that levels repeat."""

    def __init__(self, residual: ResBlock, attention: Attention | None = None):
        self.residual = residual
        self.attention = attention

    def __call__(
        self,
        h: Float[Array, "b h w c"],
        context: Context,
        skip: Float[Array, "b h w s"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h2 w2 d"]:
        if skip is not None:
            h = jnp.concatenate([h, skip], axis=-1)
        h = self.residual(h, context.emb, key)
        return h if self.attention is None else self.attention(h, context)


class ResBlock(nnx.Module):
    """GroupNorm-SiLU-conv, twice, around a residual; FiLM by the embedding after the second norm.

    resample: "down" (2x2 mean) or "up" (nearest) acts on both branches ahead of the first
    convolution (the BigGAN form: Dhariwal & Nichol 2021, sec. 3; Imagen's base).
    residual_scale multiplies the sum of the branches: 1, or 1/sqrt(2) in the Efficient U-Net.
    The second convolution starts at zero, the shortcut is 1x1 where the width changes.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        emb_width: int,
        *,
        resample: Resample | None = None,
        dropout: float = 0.0,
        residual_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.resample: Resample | None = resample
        self.dropout = dropout
        self.residual_scale = residual_scale
        self.norm1 = GroupNorm(width_in)
        self.conv1 = Conv(width_in, width, rngs=rngs)
        self.film = Linear(emb_width, 2 * width, rngs=rngs)
        self.norm2 = GroupNorm(width)
        self.conv2 = Conv(width, width, zero=True, rngs=rngs)
        self.shortcut = None if width_in == width else Linear(width_in, width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h2 w2 d"]:
        h = self.norm1(x, activate=True)
        if self.resample is not None:
            resize = layers.shrink if self.resample == "down" else layers.enlarge
            h, x = resize(h), resize(x)
        h = layers.placed(self.conv1(h), "inner")
        h = self.norm2(h, film=self.film(emb), activate=True)
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(key, 1 - self.dropout, h.shape)
            h = jnp.where(keep, h / (1 - self.dropout), 0).astype(h.dtype)
        h = self.conv2(h)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x + h if self.residual_scale == 1 else (x + h) * self.residual_scale


class Attention(nnx.Module):
    """Every pixel attends to the pixels (image=True), the tokens told (token_width > 0), or both.

    Both share one softmax: keys and values of the text are appended to those of the image
    (Imagen, sec. 2.1 and app. D.3.1). Without image=True it is plain cross-attention. Heads are
    head_width wide, so there are width // head_width of them. The output projection starts at zero.
    coordinates: a projection of the pixel's place is added to its query, from the first step on as
    large as the query itself, since attention is slow to find a use for what it hardly sees.
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        *,
        image: bool,
        token_width: int,
        coordinates: bool = False,
        rngs: nnx.Rngs,
    ):
        self.head_width = head_width
        self.norm = GroupNorm(width)
        self.query = Linear(width, width, rngs=rngs)
        # Of coordinates, whose variance is 1/3.
        places = nnx.initializers.normal(3**0.5)
        self.places = nnx.Param(places(rngs.params(), (2, width))) if coordinates else None
        self.image = Linear(width, 2 * width, rngs=rngs) if image else None
        self.text = Linear(token_width, 2 * width, rngs=rngs) if token_width else None
        self.out = Linear(width, width, zero=True, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], context: Context) -> Float[Array, "b h w c"]:
        b, _, _, c = x.shape
        h = self.norm(x).reshape(b, -1, c)
        keys_values, visible = [], []
        if self.image is not None:
            keys_values.append(self.image.halves(h))
            visible.append(jnp.ones(h.shape[:2], bool))
        if self.text is not None and context.tokens is not None and context.mask is not None:
            keys_values.append(self.text.halves(context.tokens.astype(x.dtype)))
            visible.append(context.mask)
        q = self.query(h)
        if self.places is not None:
            q = q + (layers.coordinates(x) @ self.places[...].astype(x.dtype)).reshape(h.shape)
        q = layers.placed(q, "inner")
        k, v = (
            layers.placed(jnp.concatenate(parts, axis=1), "inner")
            for parts in zip(*keys_values, strict=True)
        )
        mask = None if self.text is None else jnp.concatenate(visible, axis=1)
        h = layers.attend(q, k, v, mask, self.head_width)
        return x + self.out(h).reshape(x.shape)
