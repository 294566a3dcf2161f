"""The Efficient U-Net of Imagen's super-resolution stages (Saharia et al. 2022, app. B.1).

Against the base: parameters move to low resolutions by more blocks there, residual sums are scaled
by 1/sqrt(2), and levels downsample before their blocks and upsample after them.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade import ranges
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
from cascade.models.layers import Conv
from cascade.models.signals import Signals, TimeEmbedding, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientLevel:
    """A DBlock and its UBlock: `blocks` residual blocks each, then one attention layer if any.

    Without self-attention the level runs at any image size, hence is trained on crops.
    """

    width: int
    """Channels, a multiple of 8."""
    blocks: int
    """Residual blocks of the DBlock, and of the UBlock."""
    stride: int = 2
    """By how much the level shrinks its input, 1 for not at all."""
    self_attention: bool = False
    """Whether pixels attend to each other."""
    text_attention: bool = False
    """Whether pixels attend to the tokens told; with self_attention, under one softmax."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig(LevelsConfig):
    """An EfficientUNet; Imagen's 64 -> 256 has levels of 128, 256, 512 and 1024 with 2, 4, 8 and 8
    blocks, both attentions at the last, head_width=128 (Imagen, app. F).
    """

    levels: tuple[EfficientLevel, ...]
    """From full resolution down."""

    def __post_init__(self):
        super().__post_init__()
        for i, level in enumerate(self.levels):
            ranges.whole(level, 1, 64, "stride", called=f"EfficientUNetConfig.levels[{i}]")
            if level.self_attention or level.text_attention:
                self.check_heads(f"levels[{i}].width", level.width)

    def check(self, widths: Widths) -> None:
        for i, level in enumerate(self.levels):
            if level.text_attention and not widths.tokens:
                raise ValueError(
                    f"EfficientUNetConfig.levels[{i}].text_attention needs tokens to attend to: "
                    "the stage's conditions give none"
                )

    def build(self, widths: Widths, *, rngs: nnx.Rngs) -> "EfficientUNet":
        return EfficientUNet(self, widths, rngs)

    @property
    def attends_to_itself(self) -> bool:
        return any(level.self_attention for level in self.levels)

    @property
    def side_multiple(self) -> int:
        return self.patch * math.prod(level.stride for level in self.levels)


class EfficientUNet(nnx.Module):
    """Call with x [b, h, w, in], time [b] in 0..1000, Signals; returns [b, h, w, out] float32.

    h and w: divisible by patch and all strides. key: for dropout; without one there is none.
    The output is exactly zero before training.
    """

    def __init__(self, config: EfficientUNetConfig, widths: Widths, rngs: nnx.Rngs):
        self.config, self.widths = config, widths
        width = config.levels[0].width
        pixel_in, pixel_out = config.pixel_channels(widths)
        outer = (width, *(level.width for level in config.levels[:-1]))
        self.time = TimeEmbedding(config.time_width, config.embedding_width, rngs)
        self.conv_in = Conv(pixel_in, width, rngs=rngs)
        self.down = nnx.List(
            DBlock(config, widths, level, width, rngs)
            for level, width in zip(config.levels, outer, strict=True)
        )
        self.up = nnx.List(
            UBlock(config, widths, level, width, rngs)
            for level, width in zip(config.levels, outer, strict=True)
        )
        self.conv_out = Conv(width, pixel_out, zero=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        signals: Signals,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w d"]:
        pixels = network_input(self.config, self.widths, x, signals)
        context = context_of(self.time, time, signals)
        keys = iter(layers.split_keys(key, 2 * len(self.config.levels)))
        h = layers.placed(self.conv_in(pixels), "stream")
        skips = []
        for level in self.down:
            h, outputs = level(h, context, next(keys))
            skips.append(outputs)
        for level in reversed(self.up):
            h = level(h, context, skips.pop(), next(keys))
        return layers.depth_to_space(self.conv_out(h.astype(jnp.float32)), self.config.patch)


class DBlock(nnx.Module):
    """Convolution with stride, residual blocks, attention."""

    def __init__(
        self,
        config: EfficientUNetConfig,
        widths: Widths,
        level: EfficientLevel,
        width_in: int,
        rngs: nnx.Rngs,
    ):
        self.remat: layers.Remat = config.remat
        same = level.stride == 1 and width_in == level.width
        self.resample = (
            None if same else Conv(width_in, level.width, stride=level.stride, rngs=rngs)
        )
        self.blocks = make_blocks(config, level, level.width, rngs)
        self.attention = make_attention(config, widths, level, rngs)

    def __call__(self, h: Array, context: Context, key: Array | None) -> tuple[Array, list[Array]]:
        """Also returns the output of every block: the skips."""
        if self.resample is not None:
            h = layers.placed(self.resample(h), "stream")
        h, skips = layers.run_stack(self.blocks, self.remat, h, context, None, key)
        if self.attention is not None:
            h = layers.placed(self.attention(h, context), "stream")
        return h, skips


class UBlock(nnx.Module):
    """Residual blocks that each take the skip of their mirror image, attention, upsampling."""

    def __init__(
        self,
        config: EfficientUNetConfig,
        widths: Widths,
        level: EfficientLevel,
        width_out: int,
        rngs: nnx.Rngs,
    ):
        self.remat: layers.Remat = config.remat
        self.stride = level.stride
        same = level.stride == 1 and width_out == level.width
        self.blocks = make_blocks(config, level, 2 * level.width, rngs)
        self.attention = make_attention(config, widths, level, rngs)
        self.resample = None if same else Conv(level.width, width_out, rngs=rngs)

    def __call__(self, h: Array, context: Context, skips: list[Array], key: Array | None) -> Array:
        h, _ = layers.run_stack(self.blocks, self.remat, h, context, skips[::-1], key)
        if self.attention is not None:
            h = layers.placed(self.attention(h, context), "stream")
        if self.resample is not None:
            h = layers.placed(self.resample(layers.enlarge(h, self.stride)), "stream")
        return h


def make_blocks(
    config: EfficientUNetConfig, level: EfficientLevel, width_in: int, rngs: nnx.Rngs
) -> Block:
    return layers.stack(
        lambda rngs: Block(
            ResBlock(
                width_in,
                level.width,
                config.embedding_width,
                dropout=config.dropout,
                residual_scale=2**-0.5,
                rngs=rngs,
            )
        ),
        level.blocks,
        rngs,
    )


def make_attention(
    config: EfficientUNetConfig, widths: Widths, level: EfficientLevel, rngs: nnx.Rngs
) -> Attention | None:
    if not (level.self_attention or level.text_attention):
        return None
    return Attention(
        level.width,
        config.head_width,
        image=level.self_attention,
        token_width=widths.tokens if level.text_attention else 0,
        rngs=rngs,
    )
