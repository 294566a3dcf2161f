"""The U-Net of DeepFloyd IF, stages I and II, laid out as its public weights are.

Imagen's base (`unet.py`) in all but these: the text enters three times, pooled into the time
embedding, normalised over all tokens at once ahead of each attention, and with its padding, which
is not masked; attention follows every residual block of its levels; stage II attends to the text
alone and divides its residual sums by about sqrt(2). The modules are named after the tensors of the
files in diffusers' layout, so that `pretrained.deepfloyd` only has to rename the leaves:

    emb = time(t) [+ class(augmentation level)] + pool(text), then activated once
    h   = conv2(act(GN(conv1(resample(act(GN(x))))) (1 + scale) + shift));   out = (x + h) / c
    out = x + to_out(softmax(q [text, image]^T / sqrt(d)) [text, image])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

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
from cascade.published import fields as published

Sees = Literal["text", "text and image"]
"""What an attention layer draws its keys and values from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFLevel:
    """One resolution: `blocks` residual blocks on the way down, blocks + 1 on the way up.

    attention: what each of them is followed by; None is nothing.
    """

    width: int
    blocks: int
    attention: Sees | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IFUNetConfig(NetworkConfig):
    """What `unet/config.json` says, see `from_diffusers`.

    levels: from full resolution down. middle_attention: of the two blocks below them.
    in_channels, out_channels: of a picture; the first output channels are eps, as many as
        in_channels, then come those of the learned variance, if any.
    text_width: of a T5 token. cross_width: of a token ahead of the attention layers' own
        projections. emb_width: of the time embedding. head_width: channels of an attention head.
    pool_heads: heads of the attention that pools the text.
    lowres: Conditioning.lowres is concatenated to x, and its lowres_time embedded (stage II).
    groups, epsilon: of GroupNorm. residual_scale, middle_scale: multiply the sum of a residual
        block, 1 in stage I and .7071 in stage II.
    compute_dtype: of activations; norms, softmax, embedding and output are float32.
    remat: what each block keeps for its backward pass, as in `NetworkConfig`.
    """

    levels: tuple[IFLevel, ...]
    middle_attention: Sees = "text and image"
    in_channels: int = 3
    out_channels: int = 6
    text_width: int = 4096
    cross_width: int
    emb_width: int
    head_width: int = 64
    pool_heads: int = 64
    lowres: bool = False
    groups: int = 32
    epsilon: float = 1e-5
    residual_scale: float = 1.0
    middle_scale: float = 1.0
    activation: Literal["gelu", "silu"] = "gelu"

    def __post_init__(self):
        if not self.levels:
            raise ValueError("IFUNetConfig.levels must hold at least one level, got none")
        for i, level in enumerate(self.levels):
            if level.blocks < 1 or level.width < 1 or level.width % self.groups:
                raise ValueError(
                    f"IFUNetConfig.levels[{i}] needs blocks of at least 1 and a width that is a "
                    f"multiple of groups={self.groups}, got {level.blocks} and {level.width}"
                )
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

    def build(self, rngs: nnx.Rngs) -> IFUNet:
        """The network, with fresh parameters."""
        return IFUNet(self, rngs)

    @property
    def embedding_width(self) -> int:
        return self.emb_width

    @property
    def widths(self) -> Widths:
        """What it is told: in stage II a picture, and always T5's tokens."""
        return Widths(channels=self.in_channels * self.lowres, tokens=self.text_width)

    def check(self, widths: Widths) -> None:
        if widths != self.widths:
            raise ValueError(
                f"IFUNetConfig with lowres={self.lowres} and text_width={self.text_width} is told "
                f"{self.widths}, but the stage's conditions give {widths}"
            )

    @property
    def learned_variance(self) -> bool:
        return self.out_channels > self.in_channels

    @property
    def side_multiple(self) -> int:
        """What the height and the width of an image must be divisible by."""
        return 2 ** (len(self.levels) - 1)

    @classmethod
    def from_diffusers(cls, fields: Mapping[str, Any]) -> IFUNetConfig:
        """From the contents of a `unet/config.json`; a missing field has UNet2DConditionModel's
        default. Raises ValueError naming the field that asks for another network.
        """
        given = published.read_fields(
            fields,
            class_name="UNet2DConditionModel",
            defaults=_DEFAULTS,
            required=_REQUIRED,
            without_effect=_WITHOUT_EFFECT,
            network="a DeepFloyd IF stage I or II",
        )
        if given["class_embed_type"] not in (None, "timestep"):
            raise ValueError(
                f"class_embed_type must be None (stage I) or 'timestep' (stage II), "
                f"got {given['class_embed_type']!r}"
            )
        lowres = given["class_embed_type"] == "timestep"
        act = given["act_fn"]
        # Either the embedding is activated where it is made, or in every block: the same, once.
        once = given["time_embedding_act_fn"] == (act if given["resnet_skip_time_act"] else None)
        if act not in _ACTIVATIONS or not once:
            raise ValueError(
                f"act_fn must be gelu or silu, and time_embedding_act_fn equal to it exactly with "
                f"resnet_skip_time_act; got {act!r}, {given['time_embedding_act_fn']!r} and "
                f"{given['resnet_skip_time_act']!r}"
            )
        channels = published.integer(given, "in_channels")
        if lowres and channels % 2:
            raise ValueError(f"in_channels must be even in a super-resolution U-Net, {channels=}")
        levels, middle = _levels(given)
        widths = [level.width for level in levels]
        return cls(
            levels=levels,
            middle_attention=middle,
            in_channels=channels // 2 if lowres else channels,
            out_channels=published.integer(given, "out_channels"),
            text_width=published.integer(given, "encoder_hid_dim"),
            cross_width=published.integer(given, "cross_attention_dim"),
            emb_width=given["time_embedding_dim"] or 4 * widths[0],
            head_width=published.integer(given, "attention_head_dim"),
            pool_heads=published.integer(given, "addition_embed_type_num_heads"),
            lowres=lowres,
            groups=published.integer(given, "norm_num_groups"),
            epsilon=float(given["norm_eps"]),
            residual_scale=1 / given["resnet_out_scale_factor"],
            middle_scale=1 / given["mid_block_scale_factor"],
            activation=act,
        )


class IFUNet(nnx.Module):
    """Call with x [b, h, w, in], time [b] in 0..999, Signals; returns [b, h, w, out] float32.

    time: an index into the table of betas that the network was trained on. Signals.tokens: T5's
    output at every position, padding too, as it is; the mask is not looked at. In stage II
    Signals.channels is the low-resolution picture, and Signals.vectors its own index [b, 1].
    h and w: divisible by 2^(levels - 1). key is not used: the public networks have no dropout.
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
        """x, with the low-resolution picture behind it in stage II, and the float32 text."""
        config = self.config
        if x.shape[1] % config.side_multiple or x.shape[2] % config.side_multiple:
            raise ValueError(
                f"image sides must be multiples of {config.side_multiple} (strides of "
                f"IFUNetConfig), got {x.shape[1]}x{x.shape[2]}"
            )
        check_signals("IFUNetConfig", self.widths, x, signals)
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
        """Also returns the skips: the output of every block, in order."""
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
    """As many blocks as the way down left skips at this resolution, then an upsampling one.

    The last of them takes what entered the level on the way down, of the outer level's width.
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
        """Takes its skips off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            h = run(resnet, self.remat, jnp.concatenate([h, skips.pop()], axis=-1), emb)
            h = run(self.attentions[i], self.remat, h, text) if self.attentions else h
        for resnet in self.upsamplers:
            h = run(resnet, self.remat, h, emb)
        return h


class _ResBlock(nnx.Module):
    """layers.ResBlock under the published names, with the published groups and activation."""

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
    """One vector of all tokens, between two LayerNorms; it is added to the time embedding."""

    def __init__(self, config: IFUNetConfig, rngs: nnx.Rngs):
        self.norm1 = _layer_norm(config.text_width, rngs)
        self.pool = _AttentionPool(config, rngs)
        self.proj = Linear(config.text_width, config.emb_width, rngs=rngs)
        self.norm2 = _layer_norm(config.emb_width, rngs)

    def __call__(self, text: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class _AttentionPool(nnx.Module):
    """The mean token asks; itself and all tokens, padding among them, answer."""

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


TEXT_GROUPS = 32
"""Groups of the norm of the text; no config.json has a say in it."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # Exact, by the error function; T5's is the tanh approximation.
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}

_SEES: dict[bool, Sees] = {True: "text", False: "text and image"}
_DOWN = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
_UP = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}

# Of UNet2DConditionModel, for fields that a config.json lacks; each is read or checked above.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "encoder_hid_dim": None,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "cross_attention_norm": None,
}

# Fields with one right value. A field that is in none of these tables must be None or False.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "addition_embed_type": ("text",),
    "cross_attention_norm": ("group_norm",),
    "resnet_time_scale_shift": ("scale_shift",),
    "encoder_hid_dim_type": (None, "text_proj"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
# They speak of training, of the pipeline, or of blocks that IF does not have.
_WITHOUT_EFFECT = {
    *("sample_size", "dropout", "downsample_padding", "upcast_attention", "use_linear_projection"),
    "transformer_layers_per_block",
}


def _levels(given: Mapping[str, Any]) -> tuple[tuple[IFLevel, ...], Sees]:
    """The levels, and what the middle attends to."""
    attends = published.levels_with(given, _DOWN, _UP)
    count = len(attends)
    only, middle = given["only_cross_attention"], given["mid_block_only_cross_attention"]
    if middle is None:
        middle = only is True
    widths = published.one_each(given, "block_out_channels", int, count)
    blocks = published.one_each(given, "layers_per_block", int, count)
    only = published.one_each(given, "only_cross_attention", bool, count)
    levels = tuple(
        IFLevel(width=width, blocks=b, attention=_SEES[o] if a else None)
        for width, b, o, a in zip(widths, blocks, only, attends, strict=True)
    )
    return levels, _SEES[middle]


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
