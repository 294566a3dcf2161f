"""How good pictures look, next to true ones: PSNR, sharpness, and a Fréchet distance.

FD-proxy is the Fréchet distance between Gaussians fitted to features of two sets of pictures,

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2),

as in FID (Heusel et al. 2017), but the features are those of a random convolutional network with
fixed weights. It is good for comparing settings of one model on one set of prompts. Its values are
not FID's, and cannot be compared with any published ones.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from cascade import images

WIDTHS = (16, 24, 32, 48)  # of the random network's layers, each at half the side of the one before


def psnr(picture: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"]) -> float:
    """The peak signal-to-noise ratio in dB, of 8-bit values; inf for equal pictures."""
    error = float(np.mean((picture.astype(np.float32) - truth) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def gradient_energy(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """The sum of squared differences between neighbours along both axes, in squared levels."""
    picture = picture.astype(np.float32)
    return float(sum((np.diff(picture, axis=axis) ** 2).sum() for axis in (0, 1)))


def bicubic(picture: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Enlarge to `side` pixels squared, bicubically: what super-resolution has to beat."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def features(pictures: Iterable[UInt8[np.ndarray, "s s 3"]]) -> Float[np.ndarray, "n d"]:
    """The mean activations of all layers of the random network, for n pictures of one size."""
    return np.stack([np.asarray(_features(picture), np.float64) for picture in pictures])


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The squared Fréchet distance between Gaussians fitted to the rows of `a` and of `b`.

    It is computed in float64. The trace of the square root comes from the eigenvalues of a
    symmetric matrix, so that it stays real where covariances are singular (fewer rows than
    columns). Raises ValueError for fewer than two rows. Heusel et al. 2017.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"each set must have two rows or more, got {len(a)} and {len(b)}")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap = a.mean(axis=0) - b.mean(axis=0)
    c1, c2 = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0)).sum()
    return float(max(gap @ gap + np.trace(c1) + np.trace(c2) - 2 * shared, 0.0))


@functools.cache
def _weights() -> list[np.ndarray]:
    """The network's kernels [3, 3, in, out], He-uniform."""
    bits, channels, kernels = np.random.PCG64(0), (3, *WIDTHS), []
    for i, o in zip(channels, channels[1:], strict=False):
        # From raw bits, since NumPy may change how its Generators make floats of them.
        uniform = (bits.random_raw(9 * i * o) >> np.uint64(40)) / 2**23 - 1
        kernels.append((uniform * np.sqrt(6 / (9 * i))).astype(np.float32).reshape(3, 3, i, o))
    return kernels


@jax.jit
def _features(picture: UInt8[Array, "s s 3"]) -> Float[Array, " d"]:
    x, means = images.to_float(picture)[None], []
    for kernel in _weights():
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        means.append(x.mean(axis=(0, 1, 2)))
    return jnp.concatenate(means)
