"""The U-Net of stable-diffusion-x4-upscaler, laid out as its public weights are.

It denoises latents of an autoencoder (`cascade/models/autoencoder.py`) beside the low-resolution
picture, whose pixels lie one on one with them. Like those of DeepFloyd IF's U-Net its modules are
named after the tensors of the files in diffusers' layout. What is unlike it: the level of the
picture's noise is looked up in a table, the embedding is added rather than scaling, resampling is a
convolution, and attention is a transformer block (Rombach et al. 2022, "High-Resolution Image
Synthesis with Latent Diffusion Models", app. E.2.1), whose first attention sees the text instead of
the pixels in all levels but the innermost:

    emb = time(t) + table[noise level]
    h   = conv2(act(GN(conv1(act(GN(x))) + proj(act(emb)))));   out = x + h
    y   = in(GN(x));  y += attn1(LN(y));  y += attn2(LN(y), text);  y += ff(LN(y));  x + out(y)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cascade import ranges
from cascade.models.layers import Conv, GroupNorm, Linear, Remat, attend, enlarge, run
from cascade.models.network import NetworkConfig
from cascade.models.signals import Signals, Widths, check_signals, sinusoids

FirstSees = Literal["text", "image"]
"""What the first attention of a transformer block draws its keys and values from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscalerLevel:
    """One resolution of the U-Net, on the way down and on the way up."""

    width: int
    """Features have this many channels, a multiple of UpscalerUNetConfig.groups."""
    blocks: int
    """There are this many residual blocks on the way down, at least 1, and one more going up."""
    attention: FirstSees | None = None
    """Each of these blocks is followed by a transformer block whose first attention sees this; None
    is no such block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpscalerUNetConfig(NetworkConfig):
    """Sizes of the upscaler's U-Net; `reader.unet_config` reads them from `unet/config.json`."""

    levels: tuple[UpscalerLevel, ...]
    """The resolutions from full resolution down, at least one, each of half the side of the one
    before; the two blocks below them have a transformer block that sees the image first."""
    in_channels: int = 4
    """Noisy latents have this many channels."""
    out_channels: int = 4
    """The output has this many channels."""
    lowres_channels: int = 3
    """The picture to enlarge, which is concatenated to the latents, has this many channels."""
    noise_levels: int = 1000
    """The table of the low-resolution picture's noise levels has this many rows."""
    text_width: int = 1024
    """The embedding of a token has this many channels."""
    heads: int = 8
    """Every attention layer has this many heads, a divisor of the width of levels that attend."""
    groups: int = 32
    """GroupNorm splits channels into this many groups."""
    epsilon: float = 1e-5
    """GroupNorm adds this to the variance in residual blocks; it is 1e-6 in transformer blocks."""

    def __post_init__(self):
        if self.lowres_channels < 1:
            raise ValueError(
                "UpscalerUNetConfig.lowres_channels must be at least 1: in_channels of "
                f"unet/config.json less out_channels, got {self.lowres_channels}"
            )
        sizes = ("in_channels", "out_channels")
        told = ("lowres_channels", "noise_levels", "text_width", "heads")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, "groups")
        ranges.levels(self, width=self.groups)
        ranges.whole(self, 1, ranges.MOST_CHANNELS, *sizes, *told)
        ranges.real(self, 0, 1, "epsilon")
        for i, level in enumerate(self.levels):
            attends = level.attention or level is self.levels[-1]  # the middle always does
            if attends and level.width % self.heads:
                raise ValueError(
                    f"UpscalerUNetConfig.levels[{i}].width must be a multiple of heads="
                    f"{self.heads}, got {level.width}"
                )

    def build(self, widths: Widths, *, rngs: nnx.Rngs) -> UpscalerUNet:
        self.check(widths)
        return UpscalerUNet(self, widths, rngs)

    @property
    def embedding_width(self) -> int:
        return 4 * self.levels[0].width

    @property
    def widths(self) -> Widths:
        """What it is told: the picture to enlarge, and CLIP's tokens."""
        return Widths(channels=self.lowres_channels, tokens=self.text_width)

    def check(self, widths: Widths) -> None:
        if widths != self.widths:
            raise ValueError(
                f"UpscalerUNetConfig with lowres_channels={self.lowres_channels} and text_width="
                f"{self.text_width} is told {self.widths}, but the stage's conditions give {widths}"
            )

    @property
    def side_multiple(self) -> int:
        """What the height and the width of latents must be divisible by."""
        return 2 ** (len(self.levels) - 1)


class UpscalerUNet(nnx.Module):
    """Call it with x [b, h, w, in], time [b] in 0..999 and Signals; returns [b, h, w, out] float32.

    time is an index into the table of betas that the network was trained on. Signals.channels is
    the picture [b, h, w, lowres_channels], Signals.vectors the row [b, 1] of the noise levels'
    table. Signals.tokens is CLIP's output at every position; the mask is not looked at. h and w
    must be divisible by 2^(levels - 1). key is not used: there is no dropout. Raises ValueError for
    sides and signals that do not fit the config.
    """

    def __init__(self, config: UpscalerUNetConfig, widths: Widths, rngs: nnx.Rngs):
        self.config, self.widths = config, widths
        levels, first_width = config.levels, config.levels[0].width
        emb_width = 4 * first_width
        self.time_embedding = _TimeEmbedding(first_width, emb_width, rngs)
        self.class_embedding = _Table(config.noise_levels, emb_width, rngs)
        self.conv_in = Conv(config.in_channels + config.lowres_channels, first_width, rngs=rngs)
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
            self._check(x, signals)
            emb = self.time_embedding(time) + self.class_embedding(signals.vectors[0][:, 0])
            emb = jax.nn.silu(emb).astype(dtype)
            text = signals.tokens.astype(dtype)
            h = self.conv_in(jnp.concatenate([x, *signals.channels], axis=-1).astype(dtype))
            skips = [h]
            for down in self.down_blocks:
                h, outputs = down(h, emb, text)
                skips += outputs
            h = self.mid_block(h, emb, text)
            for up in self.up_blocks:
                h = up(h, emb, text, skips)
            return self.conv_out(self.conv_norm_out(h.astype(jnp.float32), activate=True))

    def _check(self, x: Array, signals: Signals) -> None:
        self.config.check_sides(*x.shape[1:3])
        check_signals("UpscalerUNetConfig", self.widths, x, signals)
        levels = [vector.shape for vector in signals.vectors]
        if levels != (wanted := [(len(x), 1)]):
            raise ValueError(
                "UpscalerUNetConfig enlarges a picture: Signals.vectors, the level of its noise, "
                f"must be {wanted}, got {levels or 'none'}"
            )


class _Down(nnx.Module):
    def __init__(
        self,
        config: UpscalerUNetConfig,
        level: UpscalerLevel,
        width_in: int,
        down: bool,
        rngs: nnx.Rngs,
    ):
        self.remat: Remat = config.remat
        widths = [width_in] + [level.width] * (level.blocks - 1)
        self.resnets = nnx.List(_ResBlock(config, w, level.width, rngs) for w in widths)
        self.attentions = _transformers(config, level, level.blocks, rngs)
        self.downsamplers = nnx.List([_Smaller(level.width, rngs)] if down else [])

    def __call__(self, h: Array, emb: Array, text: Array) -> tuple[Array, list[Array]]:
        """Return h and the skips: the output of every block, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, self.remat, h, emb)
            h = run(self.attentions[i], self.remat, h, text) if self.attentions else h
            skips.append(h)
        for smaller in self.downsamplers:
            h = smaller(h)
            skips.append(h)
        return h, skips


class _Middle(nnx.Module):
    def __init__(self, config: UpscalerUNetConfig, rngs: nnx.Rngs):
        self.remat: Remat = config.remat
        width = config.levels[-1].width
        self.resnets = nnx.List(_ResBlock(config, width, width, rngs) for _ in range(2))
        self.attentions = nnx.List([_Transformer(config, width, "image", rngs)])

    def __call__(self, h: Array, emb: Array, text: Array) -> Array:
        before, after = self.resnets
        h = run(before, self.remat, h, emb)
        h = run(self.attentions[0], self.remat, h, text)
        return run(after, self.remat, h, emb)


class _Up(nnx.Module):
    """It has as many blocks as the way down left skips at this resolution, then an enlarging one.

    The last block of that resolution takes what entered the level on the way down, which has the
    outer level's width.
    """

    def __init__(
        self,
        config: UpscalerUNetConfig,
        level: UpscalerLevel,
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
            _ResBlock(config, h + s, width, rngs) for h, s in zip(hidden, skips, strict=True)
        )
        self.attentions = _transformers(config, level, level.blocks + 1, rngs)
        self.upsamplers = nnx.List([_Larger(width, rngs)] if up else [])

    def __call__(self, h: Array, emb: Array, text: Array, skips: list[Array]) -> Array:
        """Return h; this takes its skips off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, self.remat, jnp.concatenate([h, skips.pop()], axis=-1), emb)
            h = run(self.attentions[i], self.remat, h, text) if self.attentions else h
        for larger in self.upsamplers:
            h = larger(h)
        return h


class _ResBlock(nnx.Module):
    def __init__(self, config: UpscalerUNetConfig, width_in: int, width: int, rngs: nnx.Rngs):
        self.norm1 = _norm(config, width_in)
        self.conv1 = Conv(width_in, width, rngs=rngs)
        self.time_emb_proj = Linear(4 * config.levels[0].width, width, rngs=rngs)
        self.norm2 = _norm(config, width)
        self.conv2 = Conv(width, width, rngs=rngs)
        self.conv_shortcut = None if width_in == width else Linear(width_in, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h w d"]:
        h = self.conv1(self.norm1(x, activate=True)) + self.time_emb_proj(emb)[:, None, None]
        h = self.conv2(self.norm2(h, activate=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Smaller(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = Conv(width, width, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class _Larger(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = Conv(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(enlarge(x))


class _Transformer(nnx.Module):
    def __init__(
        self, config: UpscalerUNetConfig, width: int, first_sees: FirstSees, rngs: nnx.Rngs
    ):
        # Not the residual blocks' epsilon.
        self.norm = GroupNorm(width, groups=config.groups, epsilon=1e-6)
        self.proj_in = Linear(width, width, rngs=rngs)
        self.transformer_blocks = nnx.List([_TransformerBlock(config, width, first_sees, rngs)])
        self.proj_out = Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        h = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        for block in self.transformer_blocks:
            h = block(h, text)
        return x + self.proj_out(h).reshape(x.shape)


class _TransformerBlock(nnx.Module):
    def __init__(
        self, config: UpscalerUNetConfig, width: int, first_sees: FirstSees, rngs: nnx.Rngs
    ):
        head_width = width // config.heads
        self.first_sees: FirstSees = first_sees
        first_width = config.text_width if first_sees == "text" else width
        self.norm1 = _layer_norm(width, rngs)
        self.attn1 = _Attention(width, first_width, head_width, rngs)
        self.norm2 = _layer_norm(width, rngs)
        self.attn2 = _Attention(width, config.text_width, head_width, rngs)
        self.norm3 = _layer_norm(width, rngs)
        self.ff = _FeedForward(width, rngs)

    def __call__(
        self, x: Float[Array, "b n c"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b n c"]:
        y = _normed(self.norm1, x)
        x = x + self.attn1(y, text if self.first_sees == "text" else y)
        x = x + self.attn2(_normed(self.norm2, x), text)
        return x + self.ff(_normed(self.norm3, x))


class _Attention(nnx.Module):
    def __init__(self, width: int, seen_width: int, head_width: int, rngs: nnx.Rngs):
        self.head_width = head_width
        self.to_q = _Projection(width, width, rngs)
        self.to_k = _Projection(seen_width, width, rngs)
        self.to_v = _Projection(seen_width, width, rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "b n c"], seen: Float[Array, "b m d"]
    ) -> Float[Array, "b n c"]:
        q, k, v = self.to_q(x), self.to_k(seen), self.to_v(seen)
        return self.to_out[0](attend(q, k, v, None, self.head_width))


class _FeedForward(nnx.Module):
    """It is four times as wide inside: half a projection times the other half's gelu (GEGLU)."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        # The published list has a dropout at 1.
        self.net = nnx.Dict(
            {"0": _Gated(width, 4 * width, rngs), "2": Linear(4 * width, width, rngs=rngs)}
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.net["2"](self.net["0"](x))


class _Gated(nnx.Module):
    def __init__(self, width: int, inner: int, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        hidden, gate = self.proj.halves(x)
        return hidden * jax.nn.gelu(gate, approximate=False)


class _Projection(nnx.Module):
    """It is Linear without a bias."""

    def __init__(self, width_in: int, width: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width_in, width)))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        return x @ self.kernel[...].astype(x.dtype)


class _TimeEmbedding(nnx.Module):
    def __init__(self, width: int, emb_width: int, rngs: nnx.Rngs):
        self.width = width
        self.linear_1 = Linear(width, emb_width, rngs=rngs)
        self.linear_2 = Linear(emb_width, emb_width, rngs=rngs)

    def __call__(self, time: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoids(time, self.width))))


class _Table(nnx.Module):
    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, row: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self.embedding[...][jnp.rint(row).astype(jnp.int32)]


def _transformers(
    config: UpscalerUNetConfig, level: UpscalerLevel, count: int, rngs: nnx.Rngs
) -> Any:
    sees = level.attention
    made = (
        []
        if sees is None
        else [_Transformer(config, level.width, sees, rngs) for _ in range(count)]
    )
    return nnx.List(made)


def _norm(config: UpscalerUNetConfig, width: int) -> GroupNorm:
    return GroupNorm(width, groups=config.groups, epsilon=config.epsilon)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def _normed(norm: nnx.LayerNorm, x: Array) -> Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)
