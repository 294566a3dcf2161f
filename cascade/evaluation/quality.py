"""How good pictures look, next to true ones: PSNR, sharpness, and a Fréchet distance.

FD-proxy is the Fréchet distance between Gaussians fitted to features of two sets of pictures, as in
FID (`distances.frechet`), but the features are those of a random convolutional network with fixed
weights. It is good for comparing settings of one model on one set of prompts. Its values are
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
from cascade.evaluation import distances

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
    return np.stack([np.asarray(features_of(picture), np.float64) for picture in pictures])


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """The squared Fréchet distance between Gaussians fitted to the rows of `a` and of `b`.

    Raises ValueError for fewer than two rows.
    """
    return distances.frechet(distances.statistics([a]), distances.statistics([b]))


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
def features_of(picture: UInt8[Array, "s s 3"]) -> Float[Array, " d"]:
    """The mean activations of all layers of the random network, for one picture."""
    x, means = images.to_float(picture)[None], []
    for kernel in _weights():
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        means.append(x.mean(axis=(0, 1, 2)))
    return jnp.concatenate(means)
