"""The U-Net of DeepFloyd IF, stages I and II, laid out as its public weights are.

It is Imagen's base (`cascade/models/unet.py`) in all but these: the text enters three times, pooled
into the time embedding, normalised over all tokens at once ahead of each attention, and with its
padding, which is not masked; attention follows every residual block of its levels; stage II attends
to the text alone and divides its residual sums by about sqrt(2). The modules are named after the
tensors of the files in diffusers' layout, so that `reader.py` only has to rename the leaves:

    emb = time(t) [+ class(augmentation level)] + pool(text), then activated once
    h   = conv2(act(GN(conv1(resample(act(GN(x))))) (1 + scale) + shift));   out = (x + h) / c
    out = x + to_out(softmax(q [text, image]^T / sqrt(d)) [text, image])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade import ranges
from cascade.models.layers import (
    Conv,
    GroupNorm,
    Linear,
    Remat,
    Resample,
    attend,
    enlarge,
    run,
    shrink,
)
from cascade.models.network import NetworkConfig
from cascade.models.signals import Signals, Widths, check_signals, sinusoids

Sees = Literal["text", "text and image"]
"""What an attention layer draws its keys and values from."""
Activation = Literal["gelu", "silu"]
"""The activation of blocks and embeddings; gelu is the exact one, by the error function."""
TEXT_GROUPS = 32
"""The norm of the text has this many groups of channels; no config.json has a say in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFLevel:
    """One resolution of the U-Net, on the way down and on the way up."""

    width: int
    """Features have this many channels, a multiple of IFUNetConfig.groups."""
    blocks: int
    """There are this many residual blocks on the way down, at least 1, and one more going up."""
    attention: Sees | None = None
    """Each of these blocks is followed by an attention layer that sees this; None is no layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFUNetConfig(NetworkConfig):
    """Sizes of a U-Net of DeepFloyd IF; `reader.unet_config` reads them from `unet/config.json`."""

    levels: tuple[IFLevel, ...]
    """The resolutions from full resolution down, at least one, each of half the side of the one
    before."""
    middle_attention: Sees = "text and image"
    """The attention layer between the two blocks below the levels sees this."""
    in_channels: int = 3
    """A picture has this many channels."""
    out_channels: int = 6
    """The output has this many channels: in_channels of eps, and as many of the learned variance
    if it is twice as many."""
    text_width: int = 4096
    """The embedding of a T5 token has this many channels, a multiple of pool_heads."""
    cross_width: int
    """A token has this many channels ahead of the attention layers' own projections, a multiple of
    32."""
    emb_width: int
    """The time embedding has this many channels."""
    head_width: int = 64
    """An attention head has this many channels, a divisor of the width of levels that attend."""
    pool_heads: int = 64
    """The attention that pools the text has this many heads."""
    lowres: bool = False
    """Whether it is told of a low-resolution picture and of the noise on that (stage II)."""
    groups: int = 32
    """GroupNorm splits channels into this many groups."""
    epsilon: float = 1e-5
    """GroupNorm adds this to the variance."""
    residual_scale: float = 1.0
    """The sum of a residual block is multiplied by this: 1 in stage I, .7071 in stage II."""
    middle_scale: float = 1.0
    """The sums of the two blocks below the levels are multiplied by this instead."""
    activation: Activation = "gelu"
    """Blocks and embeddings are activated by this function."""

    def __post_init__(self):
        sizes = ("in_channels", "out_channels")
        told = ("text_width", "cross_width", "emb_width", "head_width", "pool_heads")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "groups")
        ranges.levels(self, width=self.groups)
        ranges.whole(self, 1, ranges.MOST_CHANNELS, *sizes, *told)
        ranges.real(self, 0, 1, "epsilon")
        ranges.real(self, -1e3, 1e3, "residual_scale", "middle_scale")
        for i, level in enumerate(self.levels):
            attends = level.attention or level is self.levels[-1]  # the middle always does
            if attends and level.width % self.head_width:
                raise ValueError(
                    f"IFUNetConfig.levels[{i}].width must be a multiple of head_width="
                    f"{self.head_width} (attention heads), got {level.width}"
                )
        for field, divisor in (("text_width", self.pool_heads), ("cross_width", TEXT_GROUPS)):
            if getattr(self, field) < 1 or getattr(self, field) % divisor:
                raise ValueError(
                    f"IFUNetConfig.{field} must be a multiple of {divisor}, "
                    f"got {getattr(self, field)}"
                )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"IFUNetConfig.out_channels must be in_channels={self.in_channels} or, with a "
                f"learned variance, twice as many, got {self.out_channels}"
            )

    def build(self, widths: Widths, *, rngs: nnx.Rngs) -> IFUNet:
        self.check(widths)
        return IFUNet(self, widths, rngs)

    @property
    def embedding_width(self) -> int:
        return self.emb_width

    @property
    def widths(self) -> Widths:
        """What it is told: T5's tokens, and in stage II a picture."""
        return Widths(channels=self.in_channels * self.lowres, tokens=self.text_width)

    def check(self, widths: Widths) -> None:
        if widths != self.widths:
            raise ValueError(
                f"IFUNetConfig with lowres={self.lowres} and text_width={self.text_width} is told "
                f"{self.widths}, but the stage's conditions give {widths}"
            )

    @property
    def learned_variance(self) -> bool:
        """Whether the output has channels for the variance of a step of sampling."""
        return self.out_channels > self.in_channels

    @property
    def side_multiple(self) -> int:
        """What the height and the width of an image, in pixels, must be divisible by."""
        return 2 ** (len(self.levels) - 1)


class IFUNet(nnx.Module):
    """Call it with x [b, h, w, in], time [b] in 0..999 and Signals; returns [b, h, w, out] float32.

    time is an index into the table of betas that the network was trained on. Signals.tokens is T5's
    output at every position, padding too; the mask is not looked at. In stage II Signals.channels
    is the low-resolution picture, and Signals.vectors its own index [b, 1]. h and w must be
    divisible by 2^(levels - 1). key is not used: the public networks have no dropout. Raises
    ValueError for sides and signals that do not fit the config.
    """

    def __init__(self, config: IFUNetConfig, widths: Widths, rngs: nnx.Rngs):
        self.config, self.widths = config, widths
        levels, first_width = config.levels, config.levels[0].width
        pixels = config.in_channels * (2 if config.lowres else 1)
        self.time_embedding = _TimeEmbedding(config, rngs)
        self.class_embedding = _TimeEmbedding(config, rngs) if config.lowres else None
        self.add_embedding = _PooledText(config, rngs)
        self.encoder_hid_proj = Linear(config.text_width, config.cross_width, rngs=rngs)
        self.conv_in = Conv(pixels, first_width, rngs=rngs)
        inner = (*levels[1:], None)
        outer = (None, *levels[:-1])
        self.down_blocks = nnx.List(
            _Down(config, level, (o or level).width, i is not None, rngs)
            for level, i, o in zip(levels, inner, outer, strict=True)
        )
        self.mid_block = _Middle(config, rngs)
        self.up_blocks = nnx.List(
            _Up(config, level, (i or level).width, (o or level).width, o is not None, rngs)
            for level, i, o in reversed(list(zip(levels, inner, outer, strict=True)))
        )
        self.conv_norm_out = _norm(config, first_width)
        self.conv_out = Conv(first_width, config.out_channels, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        signals: Signals,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w d"]:
        dtype = self.config.compute_dtype
        # TPUs would otherwise multiply float32 in one bfloat16 pass, and lose parity with it.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            x, text = self._inputs(x, signals)
            emb = self.time_embedding(time) + self.add_embedding(text)
            if self.class_embedding is not None:
                emb = emb + self.class_embedding(signals.vectors[0][:, 0])
            emb = _ACTIVATIONS[self.config.activation](emb).astype(dtype)
            text = self.encoder_hid_proj(text.astype(dtype))
            h = self.conv_in(x.astype(dtype))
            skips = [h]
            for down in self.down_blocks:
                h, outputs = down(h, emb, text)
                skips += outputs
            h = self.mid_block(h, emb, text)
            for up in self.up_blocks:
                h = up(h, emb, text, skips)
            h = self.conv_norm_out(h.astype(jnp.float32), activate=True)
            return self.conv_out(h)

    def _inputs(self, x: Array, signals: Signals) -> tuple[Array, Array]:
        """Give x, with the low-resolution picture behind it in stage II, and the float32 text."""
        self.config.check_sides(*x.shape[1:3])
        check_signals("IFUNetConfig", self.widths, x, signals)
        levels = [vector.shape for vector in signals.vectors]
        if levels != (wanted := [(len(x), 1)] * self.config.lowres):
            raise ValueError(
                f"IFUNetConfig.lowres is {self.config.lowres}: Signals.vectors, the noise on the "
                f"low-resolution picture, must be {wanted or 'none'}, got {levels or 'none'}"
            )
        x = jnp.concatenate([x, *(c.astype(x.dtype) for c in signals.channels)], axis=-1)
        return x, signals.tokens.astype(jnp.float32)


class _Down(nnx.Module):
    def __init__(
        self, config: IFUNetConfig, level: IFLevel, width_in: int, down: bool, rngs: nnx.Rngs
    ):
        self.remat: Remat = config.remat
        widths = [width_in] + [level.width] * (level.blocks - 1)
        self.resnets = nnx.List(_ResBlock(config, w, level.width, rngs=rngs) for w in widths)
        self.attentions = _attentions(config, level, level.blocks, rngs)
        self.downsamplers = nnx.List(
            [_ResBlock(config, level.width, level.width, resample="down", rngs=rngs)]
            if down
            else []
        )

    def __call__(self, h: Array, emb: Array, text: Array) -> tuple[Array, list[Array]]:
        """Return h and the skips: the output of every block, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, self.remat, h, emb)
            h = run(self.attentions[i], self.remat, h, text) if self.attentions else h
            skips.append(h)
        for resnet in self.downsamplers:
            h = run(resnet, self.remat, h, emb)
            skips.append(h)
        return h, skips


class _Middle(nnx.Module):
    def __init__(self, config: IFUNetConfig, rngs: nnx.Rngs):
        self.remat: Remat = config.remat
        width, scale = config.levels[-1].width, config.middle_scale
        self.resnets = nnx.List(
            _ResBlock(config, width, width, scale=scale, rngs=rngs) for _ in range(2)
        )
        self.attentions = nnx.List([_Attention(config, width, config.middle_attention, rngs)])

    def __call__(self, h: Array, emb: Array, text: Array) -> Array:
        before, after = self.resnets
        h = run(before, self.remat, h, emb)
        h = run(self.attentions[0], self.remat, h, text)
        return run(after, self.remat, h, emb)


class _Up(nnx.Module):
    """It has as many blocks as the way down left skips at this resolution, then an upsampling one.

    The last block of that resolution takes what entered the level on the way down, which has the
    outer level's width.
    """

    def __init__(
        self,
        config: IFUNetConfig,
        level: IFLevel,
        inner_width: int,
        outer_width: int,
        up: bool,
        rngs: nnx.Rngs,
    ):
        self.remat: Remat = config.remat
        width = level.width
        hidden = [inner_width] + [width] * level.blocks
        skips = [width] * level.blocks + [outer_width]
        self.resnets = nnx.List(
            _ResBlock(config, h + s, width, rngs=rngs) for h, s in zip(hidden, skips, strict=True)
        )
        self.attentions = _attentions(config, level, level.blocks + 1, rngs)
        self.upsamplers = nnx.List(
            [_ResBlock(config, width, width, resample="up", rngs=rngs)] if up else []
        )

    def __call__(self, h: Array, emb: Array, text: Array, skips: list[Array]) -> Array:
        """Return h; this takes its skips off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, self.remat, jnp.concatenate([h, skips.pop()], axis=-1), emb)
            h = run(self.attentions[i], self.remat, h, text) if self.attentions else h
        for resnet in self.upsamplers:
            h = run(resnet, self.remat, h, emb)
        return h


class _ResBlock(nnx.Module):
    """It is layers.ResBlock under the published names, with the published groups and activation."""

    def __init__(
        self,
        config: IFUNetConfig,
        width_in: int,
        width: int,
        *,
        resample: Resample | None = None,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.resample: Resample | None = resample
        self.scale = config.residual_scale if scale is None else scale
        self.norm1 = _norm(config, width_in)
        self.conv1 = Conv(width_in, width, rngs=rngs)
        self.time_emb_proj = Linear(config.emb_width, 2 * width, rngs=rngs)
        self.norm2 = _norm(config, width)
        self.conv2 = Conv(width, width, rngs=rngs)
        self.conv_shortcut = None if width_in == width else Linear(width_in, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h2 w2 d"]:
        h = self.norm1(x, activate=True)
        if self.resample is not None:
            resize = shrink if self.resample == "down" else enlarge
            h, x = resize(h), resize(x)
        h = self.conv1(h)
        h = self.conv2(self.norm2(h, film=self.time_emb_proj(emb), activate=True))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.scale == 1 else (x + h) * self.scale


class _Attention(nnx.Module):
    """Every pixel attends to the text, and to the pixels if it sees them, under one softmax."""

    def __init__(self, config: IFUNetConfig, width: int, sees: Sees, rngs: nnx.Rngs):
        self.head_width = config.head_width
        self.group_norm = _norm(config, width)
        self.norm_cross = GroupNorm(config.cross_width, groups=TEXT_GROUPS)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k = Linear(width, width, rngs=rngs) if sees == "text and image" else None
        self.to_v = Linear(width, width, rngs=rngs) if sees == "text and image" else None
        self.add_k_proj = Linear(config.cross_width, width, rngs=rngs)
        self.add_v_proj = Linear(config.cross_width, width, rngs=rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        # Its statistics run over all tokens: the text is one row of pixels to it.
        text = self.norm_cross(text[:, None])[:, 0]
        k, v = self.add_k_proj(text), self.add_v_proj(text)
        if self.to_k is not None and self.to_v is not None:
            k = jnp.concatenate([k, self.to_k(h)], axis=1)
            v = jnp.concatenate([v, self.to_v(h)], axis=1)
        h = attend(self.to_q(h), k, v, None, self.head_width)
        return x + self.to_out[0](h).reshape(x.shape)


class _TimeEmbedding(nnx.Module):
    def __init__(self, config: IFUNetConfig, rngs: nnx.Rngs):
        self.width = config.levels[0].width
        self.activation = _ACTIVATIONS[config.activation]
        self.linear_1 = Linear(self.width, config.emb_width, rngs=rngs)
        self.linear_2 = Linear(config.emb_width, config.emb_width, rngs=rngs)

    def __call__(self, time: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self.linear_2(self.activation(self.linear_1(sinusoids(time, self.width))))


class _PooledText(nnx.Module):
    """It makes one vector of all tokens, between two LayerNorms, to add to the time embedding."""

    def __init__(self, config: IFUNetConfig, rngs: nnx.Rngs):
        self.norm1 = _layer_norm(config.text_width, rngs)
        self.pool = _AttentionPool(config, rngs)
        self.proj = Linear(config.text_width, config.emb_width, rngs=rngs)
        self.norm2 = _layer_norm(config.emb_width, rngs)

    def __call__(self, text: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class _AttentionPool(nnx.Module):
    """In it the mean token asks; itself and all tokens, padding among them, answer."""

    def __init__(self, config: IFUNetConfig, rngs: nnx.Rngs):
        width = config.text_width
        self.head_width = width // config.pool_heads
        self.positional_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (1, width)) * width**-0.5
        )
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)

    def __call__(self, text: Float[Array, "b l d"]) -> Float[Array, "b d"]:
        mean = text.mean(1, keepdims=True) + self.positional_embedding[...].astype(text.dtype)
        text = jnp.concatenate([mean, text], axis=1)
        k, v = self.k_proj(text), self.v_proj(text)
        return attend(self.q_proj(mean), k, v, None, self.head_width)[:, 0]


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # Exact, by the error function; T5's is the tanh approximation.
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


def _attentions(config: IFUNetConfig, level: IFLevel, count: int, rngs: nnx.Rngs) -> Any:
    sees = level.attention
    made = (
        [] if sees is None else [_Attention(config, level.width, sees, rngs) for _ in range(count)]
    )
    return nnx.List(made)


def _norm(config: IFUNetConfig, width: int) -> GroupNorm:
    activation = _ACTIVATIONS[config.activation]
    return GroupNorm(width, groups=config.groups, epsilon=config.epsilon, activation=activation)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, would cost digits where T5's outputs have a large mean.
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
