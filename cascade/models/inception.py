"""Inception-v3 as TensorFlow published it on 2015-12-05: the features that FID is made of.

Szegedy et al. 2016, "Rethinking the Inception architecture", with what sets these weights apart
from torchvision's: average pools leave out the padding, the pool of the last block takes the
maximum, and pictures are enlarged to 299 px without half-pixel centres (Heusel et al. 2017).

The modules are called as the published tensors. A convolution W and the norm behind it, which has
fixed statistics, are one affine map:

    s = scale / sqrt(running_var + 0.001)
    y = relu(conv(x, s W) + bias - s running_mean)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

SIDE = 299
"""The network sees pictures of so many pixels squared."""
WIDTH = 2048
"""There are so many features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Inception-v3 without its classes; its sizes are those published."""

    like: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity"
    """How pictures are brought to 299 px and to [-1, 1]. torch-fidelity does as TensorFlow 1 did:
    pixel i of n lies at i n / 299, levels are (x - 128) / 128. pytorch-fid centres the pixels, and
    has 2 x / 255 - 1."""

    def build(self, rngs: nnx.Rngs) -> Inception:
        """Make the network, with fresh float32 parameters."""
        return Inception(self, rngs)


class Inception(nnx.Module):
    """The network up to its last pool ("pool_3")."""

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs):
        self.config = config
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3), same=True, rngs=rngs)
        self.Conv2d_3b_1x1 = _Conv(64, 80, (1, 1), rngs=rngs)
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), rngs=rngs)
        self.Mixed_5b = _Mixed5(192, 32, rngs=rngs)
        self.Mixed_5c = _Mixed5(256, 64, rngs=rngs)
        self.Mixed_5d = _Mixed5(288, 64, rngs=rngs)
        self.Mixed_6a = _Mixed6a(288, rngs=rngs)
        self.Mixed_6b = _Mixed6(768, 128, rngs=rngs)
        self.Mixed_6c = _Mixed6(768, 160, rngs=rngs)
        self.Mixed_6d = _Mixed6(768, 160, rngs=rngs)
        self.Mixed_6e = _Mixed6(768, 192, rngs=rngs)
        self.Mixed_7a = _Mixed7a(768, rngs=rngs)
        self.Mixed_7b = _Mixed7(1280, _average_pool, rngs=rngs)
        self.Mixed_7c = _Mixed7(2048, _max_pool_same, rngs=rngs)

    def __call__(self, pictures: UInt8[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Give the features, float32, of pictures in levels 0..255 and of any size.

        Pictures that a model draws are rounded to levels first, as those that lie in files are.
        """
        with jax.default_matmul_precision("highest"):
            x = _as_seen(pictures, self.config)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool(x))))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
            return self.Mixed_7c(self.Mixed_7b(x)).mean(axis=(1, 2))


def resizing(pixels: int, side: int, *, centred: bool) -> Float[np.ndarray, "side pixels"]:
    """The matrix of bilinear interpolation from `pixels` along an axis to `side`, not antialiased.

    Pixel i of `side` lies at i pixels / side of the other scale, or with `centred` at
    (i + 1/2) pixels / side - 1/2; what lies outside is the pixel at the edge.
    """
    at = np.arange(side) * (pixels / side)
    if centred:
        at = (np.arange(side) + 0.5) * (pixels / side) - 0.5
    at = np.clip(at, 0, pixels - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, pixels - 1)
    matrix = np.zeros((side, pixels), np.float32)
    np.add.at(matrix, (np.arange(side), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(side), high), at - low)
    return matrix


def _as_seen(
    pictures: UInt8[Array, "b h w 3"], config: InceptionConfig
) -> Float[Array, "b 299 299 3"]:
    centred = config.like == "pytorch-fid"
    rows, columns = (resizing(n, SIDE, centred=centred) for n in pictures.shape[1:3])
    x = pictures.astype(jnp.float32)
    x = jnp.einsum("ih,bhwc->biwc", rows, x)
    x = jnp.einsum("jw,biwc->bijc", columns, x)
    return 2 * x / 255 - 1 if centred else (x - 128) / 128


class _Conv(nnx.Module):
    """Convolution, norm, rectifier. same: padded with zeros, so that the sides stay."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        same: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv = _Kernel((*kernel, width_in, width), rngs)
        self.bn = _Norm(width)
        self.stride, self.padding = stride, "SAME" if same else "VALID"

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        norm = self.bn
        s = norm.scale[...] * jax.lax.rsqrt(norm.running_var[...] + 0.001)
        y = jax.lax.conv_general_dilated(
            x,
            s * self.conv.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y + (norm.bias[...] - s * norm.running_mean[...]))


class _Kernel(nnx.Module):
    def __init__(self, shape: tuple[int, int, int, int], rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))


class _Norm(nnx.Module):
    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.running_mean = nnx.Param(jnp.zeros(width))
        self.running_var = nnx.Param(jnp.ones(width))


class _Mixed5(nnx.Module):
    def __init__(self, width_in: int, pooled: int, *, rngs: nnx.Rngs):
        self.branch1x1 = _Conv(width_in, 64, (1, 1), rngs=rngs)
        self.branch5x5_1 = _Conv(width_in, 48, (1, 1), rngs=rngs)
        self.branch5x5_2 = _Conv(48, 64, (5, 5), same=True, rngs=rngs)
        self.branch3x3dbl_1 = _Conv(width_in, 64, (1, 1), rngs=rngs)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3), same=True, rngs=rngs)
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), same=True, rngs=rngs)
        self.branch_pool = _Conv(width_in, pooled, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _joined(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(double),
            self.branch_pool(_average_pool(x)),
        )


class _Mixed6a(nnx.Module):
    def __init__(self, width_in: int, *, rngs: nnx.Rngs):
        self.branch3x3 = _Conv(width_in, 384, (3, 3), stride=2, rngs=rngs)
        self.branch3x3dbl_1 = _Conv(width_in, 64, (1, 1), rngs=rngs)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3), same=True, rngs=rngs)
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _joined(self.branch3x3(x), self.branch3x3dbl_3(double), _max_pool(x))


class _Mixed6(nnx.Module):
    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.branch1x1 = _Conv(width_in, 192, (1, 1), rngs=rngs)
        self.branch7x7_1 = _Conv(width_in, width, (1, 1), rngs=rngs)
        self.branch7x7_2 = _Conv(width, width, (1, 7), same=True, rngs=rngs)
        self.branch7x7_3 = _Conv(width, 192, (7, 1), same=True, rngs=rngs)
        self.branch7x7dbl_1 = _Conv(width_in, width, (1, 1), rngs=rngs)
        self.branch7x7dbl_2 = _Conv(width, width, (7, 1), same=True, rngs=rngs)
        self.branch7x7dbl_3 = _Conv(width, width, (1, 7), same=True, rngs=rngs)
        self.branch7x7dbl_4 = _Conv(width, width, (7, 1), same=True, rngs=rngs)
        self.branch7x7dbl_5 = _Conv(width, 192, (1, 7), same=True, rngs=rngs)
        self.branch_pool = _Conv(width_in, 192, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _joined(
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(x)),
        )


class _Mixed7a(nnx.Module):
    def __init__(self, width_in: int, *, rngs: nnx.Rngs):
        self.branch3x3_1 = _Conv(width_in, 192, (1, 1), rngs=rngs)
        self.branch3x3_2 = _Conv(192, 320, (3, 3), stride=2, rngs=rngs)
        self.branch7x7x3_1 = _Conv(width_in, 192, (1, 1), rngs=rngs)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), same=True, rngs=rngs)
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), same=True, rngs=rngs)
        self.branch7x7x3_4 = _Conv(192, 192, (3, 3), stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return _joined(three, self.branch7x7x3_4(seven), _max_pool(x))


class _Mixed7(nnx.Module):
    """pool: over 3x3 neighbours, the sides stay."""

    def __init__(self, width_in: int, pool: Any, *, rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = _Conv(width_in, 320, (1, 1), rngs=rngs)
        self.branch3x3_1 = _Conv(width_in, 384, (1, 1), rngs=rngs)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), same=True, rngs=rngs)
        self.branch3x3_2b = _Conv(384, 384, (3, 1), same=True, rngs=rngs)
        self.branch3x3dbl_1 = _Conv(width_in, 448, (1, 1), rngs=rngs)
        self.branch3x3dbl_2 = _Conv(448, 384, (3, 3), same=True, rngs=rngs)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), same=True, rngs=rngs)
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), same=True, rngs=rngs)
        self.branch_pool = _Conv(width_in, 192, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _joined(
            self.branch1x1(x),
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(self.pool(x)),
        )


def _joined(*parts: Float[Array, "b h w _"]) -> Float[Array, "b h w d"]:
    return jnp.concatenate(parts, axis=-1)


def _pool(x: Array, start: float, operation: Any, stride: int, padding: str) -> Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, start, operation, window, strides, padding)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return _pool(x, -jnp.inf, jax.lax.max, 2, "VALID")


def _max_pool_same(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return _pool(x, -jnp.inf, jax.lax.max, 1, "SAME")


def _average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    count = _pool(jnp.ones((1, *x.shape[1:3], 1)), 0.0, jax.lax.add, 1, "SAME")
    return _pool(x, 0.0, jax.lax.add, 1, "SAME") / count
