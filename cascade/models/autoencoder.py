"""The autoencoder of latent diffusion: pictures to latents of a quarter of their side, and back.

It is laid out as its public weights are (diffusers' AutoencoderKL), so that modules carry the
tensors' names. Both halves are residual blocks, level by level, with one attention over all pixels
in the middle (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
app. G; Esser et al. 2021, "Taming Transformers"):

    h = conv2(silu(GN(conv1(silu(GN(x))))));   out = x + h
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from cascade import ranges
from cascade.models.layers import Conv, GroupNorm, Linear, attend, enlarge

MOST_WIDTH = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of an autoencoder of pictures."""

    widths: tuple[int, ...]
    """Features have this many channels at each level, from full resolution down: multiples of
    groups, for at least one level. Each level but the first has half the side of the one before."""
    blocks: int
    """A level of the encoder has this many residual blocks, and one of the decoder one more."""
    channels: int = 3
    """A picture has this many channels."""
    latent_channels: int = 4
    """Latents have this many channels."""
    groups: int = 32
    """GroupNorm, whose epsilon is 1e-6, splits channels into this many groups."""
    scaling: float
    """The encoder's latents are multiplied by this, to have variance 1 in the diffusion."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations have this dtype, norms, softmax and output float32; float16 would overflow."""

    def __post_init__(self):
        sizes = ("channels", "latent_channels", "groups")
        ranges.whole(self, 1, ranges.MOST_CHANNELS, *sizes)
        ranges.whole(self, 1, ranges.MOST_BLOCKS, "blocks")
        ranges.real(self, 1e-6, 1e6, "scaling")
        if len(self.widths) > ranges.MOST_LEVELS or max(self.widths, default=1) > MOST_WIDTH:
            raise ValueError(
                f"AutoencoderConfig.widths must be at most {ranges.MOST_LEVELS}, none above "
                f"{MOST_WIDTH}, got {ranges.shown(self.widths)}"
            )
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            raise ValueError(
                f"AutoencoderConfig.widths must be multiples of groups={self.groups}, at least "
                f"one, got {self.widths}"
            )

    def build(self, rngs: nnx.Rngs) -> Autoencoder:
        """Make the network, with fresh float32 parameters."""
        return Autoencoder(self, rngs)

    @property
    def factor(self) -> int:
        """How many times smaller the side of latents is than that of the picture."""
        return 2 ** (len(self.widths) - 1)


class Autoencoder(nnx.Module):
    """It has two halves, `encode` and `decode`.

    The sides of pictures, in pixels, must be multiples of config.factor.
    """

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        self.config = config
        latent = config.latent_channels
        self.encoder = _Encoder(config, rngs)
        self.quant_conv = Linear(2 * latent, 2 * latent, rngs=rngs)
        self.post_quant_conv = Linear(latent, latent, rngs=rngs)
        self.decoder = _Decoder(config, rngs)

    def encode(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Turn pictures in [-1, 1] into latents as the diffusion has them, float32.

        They are the mean of the encoder's Gaussian; its variance, the other half of its output, is
        not asked for.
        """
        with self._precision():
            moments = self.quant_conv(self.encoder(x.astype(self.config.compute_dtype)))
        mean = moments[..., : self.config.latent_channels]
        return mean.astype(jnp.float32) * self.config.scaling

    def decode(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
        """Turn latents as the diffusion has them into pictures, nominally in [-1, 1], float32."""
        latents = (latents / self.config.scaling).astype(self.config.compute_dtype)
        with self._precision():
            return self.decoder(self.post_quant_conv(latents))

    def _precision(self) -> Any:
        # TPUs would otherwise multiply float32 in one bfloat16 pass, and lose parity with it.
        highest = self.config.compute_dtype == "float32"
        return jax.default_matmul_precision("highest" if highest else "default")


class _Encoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.widths
        first, last = widths[0], widths[-1]
        self.conv_in = Conv(config.channels, first, rngs=rngs)
        self.down_blocks = nnx.List(
            _Level(config, width_in, width, config.blocks, rngs, smaller=i + 1 < len(widths))
            for i, (width_in, width) in enumerate(zip((first, *widths), widths, strict=False))
        )
        self.mid_block = _Middle(config, rngs)
        self.conv_norm_out = _norm(config, last)
        self.conv_out = Conv(last, 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(
            self.conv_norm_out(self.mid_block(h).astype(jnp.float32), activate=True)
        )


class _Decoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        first, last = widths[0], widths[-1]
        self.conv_in = Conv(config.latent_channels, first, rngs=rngs)
        self.mid_block = _Middle(config, rngs)
        self.up_blocks = nnx.List(
            _Level(config, width_in, width, config.blocks + 1, rngs, larger=i + 1 < len(widths))
            for i, (width_in, width) in enumerate(zip((first, *widths), widths, strict=False))
        )
        self.conv_norm_out = _norm(config, last)
        self.conv_out = Conv(last, config.channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        h = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(self.conv_norm_out(h.astype(jnp.float32), activate=True))


class _Level(nnx.Module):
    def __init__(
        self,
        config: AutoencoderConfig,
        width_in: int,
        width: int,
        blocks: int,
        rngs: nnx.Rngs,
        *,
        smaller: bool = False,
        larger: bool = False,
    ):
        widths = [width_in] + [width] * (blocks - 1)
        self.resnets = nnx.List(_ResBlock(config, w, width, rngs) for w in widths)
        self.downsamplers = nnx.List([_Smaller(width, rngs)] if smaller else [])
        self.upsamplers = nnx.List([_Larger(width, rngs)] if larger else [])

    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            h = block(h)
        return h


class _Middle(nnx.Module):
    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.resnets = nnx.List(_ResBlock(config, width, width, rngs) for _ in range(2))
        self.attentions = nnx.List([_Attention(config, width, rngs)])

    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        before, after = self.resnets
        return after(self.attentions[0](before(h)))


class _ResBlock(nnx.Module):
    def __init__(self, config: AutoencoderConfig, width_in: int, width: int, rngs: nnx.Rngs):
        self.norm1 = _norm(config, width_in)
        self.conv1 = Conv(width_in, width, rngs=rngs)
        self.norm2 = _norm(config, width)
        self.conv2 = Conv(width, width, rngs=rngs)
        self.conv_shortcut = None if width_in == width else Linear(width_in, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = self.conv1(self.norm1(x, activate=True))
        h = self.conv2(self.norm2(h, activate=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nnx.Module):
    """In it every pixel attends to all, with one head."""

    def __init__(self, config: AutoencoderConfig, width: int, rngs: nnx.Rngs):
        self.group_norm = _norm(config, width)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k = Linear(width, width, rngs=rngs)
        self.to_v = Linear(width, width, rngs=rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        # Some queries at a time: 256 x 256 px with each other would be 17 GB of float32 weights.
        part = next(n for n in range(min(h * w, 1024), 0, -1) if h * w % n == 0)
        parts = q.reshape(b, -1, part, c).swapaxes(0, 1)
        y = lax.map(lambda q: attend(q, k, v, None, c), parts).swapaxes(0, 1)
        return x + self.to_out[0](y.reshape(x.shape))


class _Smaller(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = Conv(width, width, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        # Padded below and to the right alone, where Conv pads all around.
        y = lax.conv_general_dilated(
            x,
            self.conv.kernel[...].astype(x.dtype),
            window_strides=(2, 2),
            padding=((0, 1), (0, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.conv.bias[...].astype(x.dtype)


class _Larger(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = Conv(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(enlarge(x))


def _norm(config: AutoencoderConfig, width: int) -> GroupNorm:
    return GroupNorm(width, groups=config.groups, epsilon=1e-6)
