"""The base U-Net of Imagen: the ImageNet-64 network of Dhariwal & Nichol (2021), told text."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade.models import layers
from cascade.models.blocks import (
    Attention,
    Block,
    Context,
    LevelsConfig,
    ResBlock,
    context_of,
    network_input,
)
from cascade.models.layers import Conv, GroupNorm, Resample
from cascade.models.signals import Signals, TimeEmbedding, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution."""

    width: int
    """Channels, a multiple of 8."""
    blocks: int
    """Residual blocks on the way down; the way up has one more."""
    attention: bool = False
    """Whether each block is followed by attention to the pixels and to what tokens there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(LevelsConfig):
    """A UNet; the size of Imagen's base is levels of 512, 1024, 1536 and 2048, 3 blocks each,
    attention at all but the first (Imagen, app. F).
    """

    levels: tuple[Level, ...]
    """From full resolution down."""
    coordinates: bool = False
    """Every pixel knows where it is: y and x enter as two more channels (Liu et al. 2018,
    "CoordConv") and are part of each query of attention. The papers' networks must tell it from the
    zeros around the picture; with few parameters and few hours they do not, and "above" means
    nothing to them."""

    def __post_init__(self):
        super().__post_init__()
        for i, level in enumerate(self.levels):
            if level.attention or level is self.levels[-1]:  # the middle always attends
                self.check_heads(f"levels[{i}].width", level.width)

    def build(self, widths: Widths, *, rngs: nnx.Rngs) -> "UNet":
        return UNet(self, widths, rngs)

    @property
    def side_multiple(self) -> int:
        return self.patch * 2 ** (len(self.levels) - 1)


class UNet(nnx.Module):
    """Call with x [b, h, w, in], time [b] in 0..1000, Signals; returns [b, h, w, out] float32.

    h and w: divisible by patch * 2^(levels - 1). key: for dropout; without one there is none.
    The output is exactly zero before training.
    """

    def __init__(self, config: UNetConfig, widths: Widths, rngs: nnx.Rngs):
        self.config, self.widths = config, widths
        first, last = config.levels[0], config.levels[-1]
        pixel_in, pixel_out = config.pixel_channels(widths)
        self.time = TimeEmbedding(config.time_width, config.embedding_width, rngs)
        self.conv_in = Conv(pixel_in + 2 * config.coordinates, first.width, rngs=rngs)
        inner = (*config.levels[1:], None)
        outer = (None, *config.levels[:-1])
        self.encoder = nnx.List(
            EncoderLevel(config, widths, level, o or level, i is not None, rngs)
            for level, i, o in zip(config.levels, inner, outer, strict=True)
        )
        self.middle1 = make_block(config, widths, last.width, last.width, attention=True, rngs=rngs)
        self.middle2 = make_block(
            config, widths, last.width, last.width, attention=False, rngs=rngs
        )
        self.decoder = nnx.List(
            DecoderLevel(config, widths, level, i or level, o, rngs)
            for level, i, o in zip(config.levels, inner, outer, strict=True)
        )
        self.norm_out = GroupNorm(first.width)
        self.conv_out = Conv(first.width, pixel_out, zero=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        signals: Signals,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w d"]:
        config = self.config
        pixels = network_input(config, self.widths, x, signals)
        if config.coordinates:
            pixels = jnp.concatenate([pixels, layers.coordinates(pixels)], axis=-1)
        context = context_of(self.time, time, signals)
        keys = iter(layers.split_keys(key, 2 * len(config.levels) + 2))
        h = layers.placed(self.conv_in(pixels), "stream")
        skips = [h]
        for level in self.encoder:
            h, outputs = level(h, context, next(keys))
            skips += outputs
        h = layers.run(self.middle1, config.remat, h, context, None, next(keys))
        h = layers.run(self.middle2, config.remat, h, context, None, next(keys))
        for level in reversed(self.decoder):
            h = level(h, context, skips, next(keys))
        h = self.norm_out(h.astype(jnp.float32), activate=True)
        return layers.depth_to_space(self.conv_out(h), config.patch)


class EncoderLevel(nnx.Module):
    """Residual blocks at one resolution, then a downsampling one unless it is the last."""

    def __init__(
        self,
        config: UNetConfig,
        widths: Widths,
        level: Level,
        outer: Level,
        down: bool,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(make_block, config, widths, attention=level.attention)
        self.config = config
        self.first = make(outer.width, level.width, rngs=rngs)
        count, width = level.blocks - 1, level.width
        self.rest = (
            layers.stack(lambda rngs: make(width, width, rngs=rngs), count, rngs) if count else None
        )
        self.down = (
            make_block(config, widths, level.width, level.width, resample="down", rngs=rngs)
            if down
            else None
        )

    def __call__(self, h: Array, context: Context, key: Array | None) -> tuple[Array, list[Array]]:
        """Also returns the skips: the output of every block, in order."""
        k_first, k_rest, k_down = layers.split_keys(key, 3)
        h = layers.run(self.first, self.config.remat, h, context, None, k_first)
        skips = [h]
        h, outputs = layers.run_stack(self.rest, self.config.remat, h, context, None, k_rest)
        skips += outputs
        if self.down is not None:
            h = layers.run(self.down, self.config.remat, h, context, None, k_down)
            skips.append(h)
        return h, skips


class DecoderLevel(nnx.Module):
    """As many blocks as the encoder has skips at this resolution, then an upsampling one.

    That is blocks + 1: the last skip is what entered the encoder level, of the outer level's width.
    """

    def __init__(
        self,
        config: UNetConfig,
        widths: Widths,
        level: Level,
        inner: Level,
        outer: Level | None,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(make_block, config, widths, attention=level.attention)
        width, width_outer = level.width, (outer or level).width
        self.config = config
        self.count = count = level.blocks - 1
        self.first = make(inner.width + width, width, rngs=rngs)
        self.rest = (
            layers.stack(lambda rngs: make(2 * width, width, rngs=rngs), count, rngs)
            if count
            else None
        )
        self.last = make(width + width_outer, width, rngs=rngs)
        self.up = (
            make_block(config, widths, width, width, resample="up", rngs=rngs) if outer else None
        )

    def __call__(self, h: Array, context: Context, skips: list[Array], key: Array | None) -> Array:
        """Takes its skips off the end of the list."""
        remat = self.config.remat
        k_first, k_rest, k_last, k_up = layers.split_keys(key, 4)
        h = layers.run(self.first, remat, h, context, skips.pop(), k_first)
        rest = [skips.pop() for _ in range(self.count)]
        h, _ = layers.run_stack(self.rest, remat, h, context, rest, k_rest)
        h = layers.run(self.last, remat, h, context, skips.pop(), k_last)
        return h if self.up is None else layers.run(self.up, remat, h, context, None, k_up)


def make_block(
    config: UNetConfig,
    widths: Widths,
    width_in: int,
    width: int,
    *,
    attention: bool = False,
    resample: Resample | None = None,
    rngs: nnx.Rngs,
) -> Block:
    residual = ResBlock(
        width_in,
        width,
        config.embedding_width,
        resample=resample,
        dropout=config.dropout,
        rngs=rngs,
    )
    if not attention:
        return Block(residual)
    return Block(
        residual,
        Attention(
            width,
            config.head_width,
            image=True,
            token_width=widths.tokens,
            coordinates=config.coordinates,
            rngs=rngs,
        ),
    )
