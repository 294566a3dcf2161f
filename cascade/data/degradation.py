"""How the low-resolution pictures that a super-resolution model trains on are degraded.

A model trained on clean block means trusts them to the last detail, and enlarges whatever faults
the stage below has left. Degraded inputs teach it to repair: a little blur (Ho et al. 2021,
"Cascaded Diffusion Models"; Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation
with CLIP Latents"), or the random chain of blurs, resizes, noise and JPEG of Zhang et al. 2021
("Designing a Practical Degradation Model for Deep Blind Image Super-Resolution"), BSR for short.

All of it runs on the host, on pictures of levels 0..255, and is for training alone: sampling
degrades nothing in this way. Nor is it the Gaussian noise of conditioning augmentation, which comes
on top, and whose level the network is told.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cascade import images


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """A way to degrade low-resolution pictures: degradation(image, rng, factor) applies it.

    A subclass holds its settings as fields and defines `degraded`.
    """

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int
    ) -> UInt8[np.ndarray, "h2 w2 3"]:
        """High resolution [h, w, 3] -> degraded low resolution [h / factor, w / factor, 3].

        The result depends on the arguments and the generator's state alone. Nothing moves the
        picture: a pixel stays over its block. Raises ValueError unless `factor` divides both sides.
        """
        h, w, _ = image.shape
        if h % factor or w % factor:
            raise ValueError(
                f"{type(self).__name__}: the sides {h}x{w} must be multiples of factor={factor}"
            )
        levels = self.degraded(image.astype(np.float32), rng, factor)
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)

    def degraded(
        self, levels: Float[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int
    ) -> Float[np.ndarray, "h2 w2 3"]:
        """Levels 0..255 [h, w, 3] -> levels [h / factor, w / factor, 3], not yet rounded."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Blur(Degradation):
    """Block means, and then on a share of the pictures a Gaussian blur.

    The defaults are those of Ho et al. 2021. Ramesh et al. 2022 blur every picture, with sigma 0.6.
    Both cut the kernel off at 3 x 3, which at such widths loses 0.4% of it; here it reaches to
    3 sigma.
    """

    sigma: tuple[float, float] = (0.4, 0.6)
    """Least and largest standard deviation of the blur in low-resolution pixels, above 0; each
    picture's is drawn uniformly between them."""
    share: float = 0.5
    """Share of the pictures that are blurred, in (0, 1]."""

    def __post_init__(self):
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(
                f"Blur.sigma must be positive and in rising order, as (0.4, 0.6), got {self.sigma}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"Blur.share must lie in (0, 1], got {self.share}")

    def degraded(
        self, levels: Float[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int
    ) -> Float[np.ndarray, "h2 w2 3"]:
        levels = images.downsample(levels, factor)
        if rng.random() >= self.share:
            return levels
        sigma = rng.uniform(*self.sigma)
        size = 2 * math.ceil(3 * sigma) + 1
        return correlate(levels, gaussian_kernel(size, (sigma**2, sigma**2)))


@dataclass(frozen=True, kw_only=True)
class BSR(Degradation):
    """The degradation of Zhang et al. 2021, without its model of a camera's processing.

    Blur, downsampling, noise and JPEG come in random order. JPEG always ends it.
    """

    light: bool = True
    """True takes the milder ranges of Rombach et al. 2022 ("High-Resolution Image Synthesis with
    Latent Diffusion Models"), which suit generated pictures, and blurs once, not twice; False is
    for the repair of photographs from anywhere."""

    def degraded(
        self, levels: Float[np.ndarray, "h w 3"], rng: np.random.Generator, factor: int
    ) -> Float[np.ndarray, "h2 w2 3"]:
        return _bsr(levels, rng, _LIGHT if self.light else _FULL, factor)


# The operations, on levels 0..255 as floats.

Method = Literal["bilinear", "bicubic", "area", "antialiased"]
"""A way to resize. "bilinear" and "bicubic" sample at the new pixels' centres, which aliases when a
picture shrinks; "area" takes means over the new pixels; "antialiased" is bicubic with a kernel that
is widened when a picture shrinks."""


def gaussian_kernel(
    size: int, variances: tuple[float, float], *, angle: float = 0.0, shift: float = 0.0
) -> Float[np.ndarray, "s s"]:
    """A normal density at the pixels of a square, [size, size] with axes (y, x) and sum 1.

    variances: those along the principal axes, in squared pixels; the first axis is turned from x
    towards y by `angle` radians. shift: how far the centre lies from the middle pixel, towards
    larger x and y, in pixels.
    """
    x = np.arange(size) - (size - 1) / 2 - shift
    along = math.cos(angle) * x + math.sin(angle) * x[:, None]
    across = math.cos(angle) * x[:, None] - math.sin(angle) * x
    exponent = -0.5 * (along**2 / variances[0] + across**2 / variances[1])
    kernel = np.exp(exponent - exponent.max())
    return (kernel / kernel.sum()).astype(np.float32)


def correlate(
    image: Float[np.ndarray, "h w c"], kernel: Float[np.ndarray, "s s"]
) -> Float[np.ndarray, "h w c"]:
    """The sum of kernel[i, j] image[y + i - s // 2, x + j - s // 2] for odd s: -> [h, w, c].

    Outside its borders the picture is its own mirror image, the pixels of the border not doubled.
    """
    r = len(kernel) // 2
    padded = np.pad(image, ((r, r), (r, r), (0, 0)), mode="reflect")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(kernel[::-1, ::-1], size)[..., None]
    whole = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * spectrum, size, axes=(0, 1))
    return whole[2 * r :, 2 * r :]


def resize(
    image: Float[np.ndarray, "h w c"], size: tuple[int, int], method: Method
) -> Float[np.ndarray, "h2 w2 c"]:
    """[h, w, c] -> [*size, c], larger or smaller, with half-pixel centres."""
    h, w, c = image.shape
    tall = (_weights(h, size[0], method) @ image.reshape(h, w * c)).reshape(-1, w, c)
    return _weights(w, size[1], method) @ tall


def gaussian_noise(
    size: tuple[int, int], rng: np.random.Generator, levels: tuple[int, int]
) -> Float[np.ndarray, "h w 3"]:
    """Noise [*size, 3] of a kind: grey (40%), independent in each channel (40%), correlated (20%).

    levels: the standard deviation of the first two is a whole number between these; the third has
    the covariance high**2 |U D U^T| of Zhang et al. 2021, with U a random rotation and D diagonal
    and uniform in [0, 1].
    """
    kind, sigma = rng.random(), np.float32(rng.integers(*levels, endpoint=True))
    if kind < 0.4:
        return np.repeat(sigma * rng.standard_normal((*size, 1), np.float32), 3, axis=2)
    if kind < 0.8:
        return sigma * rng.standard_normal((*size, 3), np.float32)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    # Taking absolute values leaves a 3 x 3 covariance one: no principal minor gets smaller.
    covariance = levels[1] ** 2 * np.abs(rotation @ np.diag(rng.random(3)) @ rotation.T)
    return rng.multivariate_normal(np.zeros(3), covariance, size).astype(np.float32)


def jpeg(image: Float[np.ndarray, "h w 3"], quality: int) -> Float[np.ndarray, "h w 3"]:
    """The picture [h, w, 3], levels 0..255, after JPEG and back, its colour at half the resolution.

    quality: as in libjpeg, 1..95.
    """
    file = io.BytesIO()
    levels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    Image.fromarray(levels).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32)


@dataclass(frozen=True)
class _Ranges:
    """The ranges that BSR draws from; both ends are included."""

    blurs: int
    """Number of blurs."""
    spread: float
    """Largest variances and standard deviations of the blurs, as a part of the paper's."""
    anisotropic: tuple[int, ...]
    """Sizes of the anisotropic kernels in pixels, of which even ones are made odd by one more, for
    an even kernel moves the picture by half a pixel."""
    isotropic: tuple[int, ...]
    """Sizes of the isotropic kernels, likewise."""
    strided: float
    """Share of the pictures that are downsampled by taking pixels."""
    noise: tuple[int, int]
    """Standard deviation of the noise in levels."""
    quality: tuple[int, int]
    """Quality of JPEG, as `jpeg` has it."""


_ODD = tuple(range(7, 26, 2))
_FULL = _Ranges(
    blurs=2,
    spread=1.0,
    anisotropic=_ODD,
    isotropic=_ODD,
    strided=0.25,
    noise=(2, 25),
    quality=(30, 95),
)
_LIGHT = _Ranges(
    blurs=1,
    spread=0.25,
    anisotropic=tuple(range(5, 15)),
    isotropic=tuple(range(5, 8)),
    strided=0.2,
    noise=(1, 2),
    quality=(80, 95),
)


def _bsr(image, rng: np.random.Generator, ranges: _Ranges, factor: int):
    """levels [h, w, 3] -> levels [h / factor, w / factor, 3], whole numbers in 0..255."""
    target = image.shape[0] // factor, image.shape[1] // factor
    if factor == 4 and rng.random() < 0.25:
        h, w, _ = image.shape
        method = _any_method(rng) if rng.random() < 0.5 else "antialiased"
        image = np.clip(resize(image, (h // 2, w // 2), method), 0, 255)
        factor = 2

    def blur(x):
        return correlate(x, _random_kernel(rng, ranges, factor))

    def shrink(x):
        if rng.random() < ranges.strided:
            # The kernel's centre is the centre of the block whose first pixel is then taken.
            variance = rng.uniform(0.1, 0.6 * factor) ** 2
            kernel = gaussian_kernel(25, (variance, variance), shift=(factor - 1) / 2)
            return correlate(x, kernel)[::factor, ::factor]
        by = rng.uniform(1, 2 * factor)
        size = max(1, int(x.shape[0] / by)), max(1, int(x.shape[1] / by))
        return resize(x, size, _any_method(rng))

    def fit(x):
        return resize(x, target, _any_method(rng))

    def noise(x):
        return x + gaussian_noise((x.shape[0], x.shape[1]), rng, ranges.noise)

    def compress(x):
        return jpeg(x, int(rng.integers(*ranges.quality, endpoint=True)))

    def perhaps_compress(x):
        return compress(x) if rng.random() < 0.9 else x

    operations = [blur] * ranges.blurs + [shrink, fit, noise, perhaps_compress]
    order = [operations[i] for i in rng.permutation(len(operations))]
    first, second = sorted((order.index(shrink), order.index(fit)))
    order[first], order[second] = shrink, fit
    for operation in order:
        image = np.clip(operation(image), 0, 255)
    return compress(image)


def _any_method(rng: np.random.Generator) -> Method:
    return ("bilinear", "bicubic", "area")[rng.integers(3)]


def _random_kernel(rng: np.random.Generator, ranges: _Ranges, factor: int):
    if rng.random() < 0.5:
        size, angle = rng.choice(ranges.anisotropic), rng.uniform(0, math.pi)
        first, second = rng.uniform(0, ranges.spread * (4 + factor), 2)
    else:
        size, angle = rng.choice(ranges.isotropic), 0.0
        first = second = rng.uniform(0, ranges.spread * (2 + 0.2 * factor)) ** 2
    return gaussian_kernel(int(size) | 1, (first, second), angle=angle)


def _weights(old: int, new: int, method: Method):
    """[new, old]: what each new pixel takes from each old one, in one dimension."""
    scale, pixels = old / new, np.arange(old)
    if method == "area":
        left = np.arange(new)[:, None] * scale
        weights = np.minimum(left + scale, pixels + 1) - np.maximum(left, pixels)
        weights = np.clip(weights, 0, None)
    else:
        centres = (np.arange(new)[:, None] + 0.5) * scale - 0.5
        stretch = max(scale, 1.0) if method == "antialiased" else 1.0
        distance = np.abs(centres - pixels) / stretch
        weights = np.clip(1 - distance, 0, None) if method == "bilinear" else _cubic(distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(d):
    """The interpolation kernel of Keys 1981 (a = -1/2) at distances d >= 0."""
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
