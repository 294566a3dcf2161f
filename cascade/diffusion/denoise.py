"""Denoisers: functions (x_t, logsnr) -> an estimate of x0, and what wraps them.

A sampler sees nothing else: whatever the network predicts, its denoiser returns x0. The order of
wrapping is the order of Imagen (Saharia et al. 2022, sec. 2.3), guidance inside, threshold outside:

    x0_hat = Threshold()(guide(x0_cond, x0_uncond, 7.0))

Guidance by the gradient of something else (`pulled`) comes between the two.

Samplers re-derive eps from x_t and the x0 they are given, so that after clipping the two agree.
What else is known of an estimate, a Detailed denoiser says to the sampler that asks with
`estimate_of`: x0 as it was before the threshold, and the variance of the step, if the network has
learned it. Guidance leaves the variance that of the conditional half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cascade import ranges
from cascade.diffusion.process import alpha_sigma, expand

Denoiser = Callable[[Float[Array, " b *d"], Float[Array, " b"]], Float[Array, " b *d"]]
"""(x_t [b, *d], logsnr [b]) -> x0_hat [b, *d], float32."""

Weight = float | int | Float[Array, ""] | Float[Array, " b"]
"""A guidance weight: one for all, or one an example."""


class Estimate(NamedTuple):
    """What a denoiser makes of x_t: arrays [b, *d], float32."""

    x0: Float[Array, " b *d"]  # guided and thresholded
    free: Float[Array, " b *d"]  # x0 before it was thresholded
    # Where the log variance of the step lies, for every coordinate, between the bounds of Ho et al.
    # 2020: 0 is the posterior variance given x0, 1 that of the forward process, and it is not
    # clipped to [0, 1]. Nichol & Dhariwal 2021 ("Improved DDPM"), eq. 15, where it is v.
    gamma: Float[Array, " b *d"] | None = None  # None unless the network has learned it


@dataclass(frozen=True)
class Detailed:
    """A Denoiser that can say more of its estimates than x0."""

    estimate: Callable[[Float[Array, " b *d"], Float[Array, " b"]], Estimate]
    """(x_t [b, *d], logsnr [b]) -> Estimate."""

    def __call__(self, x_t: Float[Array, " b *d"], logsnr: Float[Array, " b"]) -> Array:
        """x0_hat alone."""
        return self.estimate(x_t, logsnr).x0


def estimate_of(
    denoiser: Denoiser, x_t: Float[Array, " b *d"], logsnr: Float[Array, " b"]
) -> Estimate:
    """All that a denoiser says of x_t; what is not Detailed has no threshold and no variance."""
    if isinstance(denoiser, Detailed):
        return denoiser.estimate(x_t, logsnr)
    x0_hat = denoiser(x_t, logsnr)
    return Estimate(x0_hat, x0_hat)


def changed(denoiser: Denoiser, change: Callable[[Array, Array, Array], Array]) -> Denoiser:
    """The denoiser with change(x0_hat, x_t, logsnr) for its x0_hat, before and after a threshold;
    its variance is as it was."""

    def estimate(x_t, logsnr):
        x0, free, gamma = estimate_of(denoiser, x_t, logsnr)
        return Estimate(change(x0, x_t, logsnr), change(free, x_t, logsnr), gamma)

    return Detailed(estimate)


def pulled(
    denoiser: Denoiser,
    log_p: Callable[[Float[Array, " b *d"], Float[Array, " b"]], Float[Array, " b"]],
    scale: Weight,
) -> Denoiser:
    """The denoiser of p(x_t) p(c | x_t)^scale, given that of p(x_t) and log p(c | x_t).

    log_p: (x_t, logsnr) -> one number an example, of which each depends on its own example alone.
    scale: 0 is the denoiser as it was, 1 that of p(x_t | c), more than 1 sharpens c. By the score,
    (alpha x0_hat - x_t) / sigma^2 = grad log p(x_t), the estimate moves along the gradient:

        x0_hat + scale (sigma^2 / alpha) grad log p(c | x_t)

    which is eps_hat - scale sigma grad log p(c | x_t) (Dhariwal & Nichol 2021, alg. 2; Song et al.
    2021, "Score-Based Generative Modeling through SDEs", eq. 14). Any other energy that falls where
    x_t is to go has its negative here for log_p. The variance is as it was. Threshold what this
    returns, not what it is given.
    """

    def estimate(x_t, logsnr):
        found = estimate_of(denoiser, x_t, logsnr)
        gradient = jax.grad(lambda x: jnp.sum(log_p(x, logsnr)))(x_t)
        alpha, sigma = alpha_sigma(expand(logsnr, x_t))
        s = jnp.asarray(scale, jnp.float32)
        shift = (expand(s, x_t) if s.ndim else s) * (sigma**2 / alpha) * gradient
        return found._replace(x0=found.x0 + shift, free=found.free + shift)

    return Detailed(estimate)


def guide(
    x0_cond: Float[Array, " b *d"], x0_uncond: Float[Array, " b *d"], w: Weight
) -> Float[Array, " b *d"]:
    """x0_uncond + w (x0_cond - x0_uncond): 0 unconditional, 1 conditional, above 1 guided.

    Imagen's convention: VDM and Imagen Video call w - 1 the weight. Mixing x0, eps or v comes to
    the same, all three being affine in one another at a given x_t. Ho & Salimans 2022
    ("Classifier-Free Diffusion Guidance"); Saharia et al. 2022, sec. 2.2.
    """
    if isinstance(w, int | float) and w == 1:
        return x0_cond
    w = jnp.asarray(w, jnp.float32)
    w = expand(w, x0_cond) if w.ndim else w
    return x0_uncond + w * (x0_cond - x0_uncond)


@dataclass(frozen=True, kw_only=True)
class GuidancePlan:
    """How the guidance weight w changes over the steps. Subclasses are the plans."""

    def check(self, steps: int) -> None:
        """Raise ValueError unless the plan can have so many steps."""

    def guides(self, w: float) -> bool:
        """Whether the weight is other than 1 at any step, so that no text must be evaluated too."""
        return w != 1

    def __call__(
        self, w: Weight, logsnr: Float[Array, " b"], grid: Float[Array, " n"]
    ) -> Float[Array, " b"]:
        """The weight at `logsnr`. grid: the log-SNRs that the n steps start from, noisiest first.

        A denoiser that is asked between two of them, by a second-order step, takes the nearest.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Constant(GuidancePlan):
    """The guidance weight w at every step."""

    def __call__(self, w, logsnr, grid):
        return jnp.broadcast_to(jnp.asarray(w, jnp.float32), logsnr.shape)


@dataclass(frozen=True, kw_only=True)
class Interval(GuidancePlan):
    """w where low < sigma / alpha <= high, and no guidance elsewhere.

    At high noise guidance throws variety away, at low noise it does nothing. The defaults are those
    of Kynkäänniemi et al. 2024 ("Applying Guidance in a Limited Interval") for ImageNet at 512 px
    in latent space: for others they are to be searched for.
    """

    low: float = 0.28
    """sigma / alpha at and below which there is no guidance, 0 or more."""
    high: float = 5.42
    """sigma / alpha above which there is none, above low."""

    def __post_init__(self):
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"Interval.low must be in [0, high={self.high}), got {self.low}")

    def __call__(self, w, logsnr, grid):
        noise = jnp.exp(-logsnr / 2)
        return jnp.where((self.low < noise) & (noise <= self.high), w, 1.0)


@dataclass(frozen=True, kw_only=True)
class Oscillating(GuidancePlan):
    """w for the first share of the steps, then `low` and w by turns.

    A weight that over-saturates when all steps have it can be had in every other one. Ho et al.
    2022 ("Imagen Video", sec. 3.4) go between 15 and 1.
    """

    low: float = 1.0
    """The weight of every other step; 1 is no guidance."""
    share: float = 0.1
    """Share of the steps, in [0, 1], that come first, all of weight w; a tenth is our choice, where
    the paper states none."""

    def __post_init__(self):
        ranges.real(self, 0, 1e6, "low")
        if not 0 <= self.share <= 1:
            raise ValueError(f"Oscillating.share must be in [0, 1], got {self.share}")

    def guides(self, w):
        return w != 1 or self.low != 1

    def __call__(self, w, logsnr, grid):
        n = len(grid)
        i = jnp.arange(n) - math.ceil(round(self.share * n, 6))
        return jnp.where((i >= 0) & (i % 2 == 0), self.low, w)[_nearest(logsnr, grid)]


@dataclass(frozen=True, kw_only=True)
class PerStep(GuidancePlan):
    """A factor on w for every step: weights of its own with w = 1."""

    factors: tuple[float, ...]
    """One for each step, the noisiest first."""

    def check(self, steps):
        if len(self.factors) != steps:
            raise ValueError(
                f"PerStep.factors must be as many as the steps, {steps}, got {len(self.factors)}"
            )

    def guides(self, w):
        return True

    def __call__(self, w, logsnr, grid):
        self.check(len(grid))
        return w * jnp.asarray(self.factors, jnp.float32)[_nearest(logsnr, grid)]


PLANS_BY_WORD: dict[str, GuidancePlan] = {
    "constant": Constant(),
    "interval": Interval(),
    "oscillating": Oscillating(),
}
"""What the command line calls the plans."""


def rescale(
    guided: Float[Array, " b *d"], conditional: Float[Array, " b *d"], phi: float
) -> Float[Array, " b *d"]:
    """`guided`, a part phi of the way to having the standard deviation of `conditional`.

    Both are predictions of a network, of eps, x0 or v; a deviation is over all of an example.
    phi: in [0, 1]. Guidance makes pictures over-exposed by raising it. Lin et al. 2023 ("Common
    Diffusion Noise Schedules and Sample Steps are Flawed"), eq. 15 and 16, with phi = .7.
    """
    over = tuple(range(1, guided.ndim))
    # An untrained network predicts nothing but zeros, whose deviation is 0.
    ratio = conditional.std(over, keepdims=True) / jnp.maximum(
        guided.std(over, keepdims=True), jnp.finfo(jnp.float32).tiny
    )
    return guided * (1 - phi + phi * ratio)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How x0 estimates are brought back to [-1, 1], example by example; a function of x0."""

    kind: Literal["none", "static", "dynamic"] = "dynamic"
    """What is done: "static" clips, "dynamic" clips to a percentile and rescales, "none" leaves x0
    as it is (for latents and embeddings, which have no range)."""
    percentile: float = 0.995
    """Fraction, in (0, 1), of an example's |x0| that lies below what "dynamic" clips to; see
    `dynamic_threshold`."""
    cap: float | None = None
    """The largest |x0| that "dynamic" clips to, 1 or more; None is no bound. DeepFloyd IF's is 1.5,
    with percentile .95."""

    def __post_init__(self):
        if self.kind not in ("none", "static", "dynamic"):
            raise ValueError(f'Threshold.kind: "none", "static" or "dynamic", got {self.kind!r}')
        _check(self.percentile, self.cap)

    def __call__(self, x0: Float[Array, " b *d"]) -> Float[Array, " b *d"]:
        match self.kind:
            case "none":
                return x0
            case "static":
                return static_threshold(x0)
            case _:
                return dynamic_threshold(x0, self.percentile, self.cap)


def thresholded(denoiser: Denoiser, threshold: Threshold) -> Denoiser:
    """The denoiser with its estimates thresholded. Wrap guidance, not the other way round."""

    def estimate(x_t, logsnr):
        found = estimate_of(denoiser, x_t, logsnr)
        return found._replace(x0=threshold(found.x0))

    return Detailed(estimate)


def static_threshold(x0: Float[Array, " b *d"]) -> Float[Array, " b *d"]:
    """Clip to [-1, 1]."""
    return jnp.clip(x0, -1.0, 1.0)


def dynamic_threshold(
    x0: Float[Array, " b *d"], percentile: float = 0.995, cap: float | None = None
) -> Float[Array, " b *d"]:
    """Clip each example to [-s, s] and divide by s, s the percentile of its own |x0|, at least 1.

    x0: predicted images, nominally in [-1, 1]. percentile: a fraction in (0, 1); .995 is the
    99.5th percentile (linear interpolation) over everything but the batch. cap: an upper bound for
    s, beyond which pictures are clipped rather than dimmed (DeepFloyd IF uses 1.5, with .95); 1
    makes this static thresholding. Raises ValueError. Saharia et al. 2022, sec. 2.3.

    It is there for what guidance throws beyond the range. The division dims all of the picture, its
    flat background too, for a few values that overshoot at edges; without guidance, clip instead.
    """
    _check(percentile, cap)
    x0 = x0.astype(jnp.float32)
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1, method="linear")
    s = expand(jnp.clip(s, 1.0, cap), x0)
    return jnp.clip(x0, -s, s) / s


def _nearest(logsnr: Float[Array, " b"], grid: Float[Array, " n"]) -> Int[Array, " b"]:
    return jnp.argmin(jnp.abs(logsnr[:, None] - grid), axis=1)


def _check(percentile: float, cap: float | None) -> None:
    if not 0 < percentile < 1:
        raise ValueError(f"Threshold.percentile must be in (0, 1), such as .995, got {percentile}")
    if cap is not None and cap < 1:
        raise ValueError(f"Threshold.cap must be at least 1 (static clipping), got {cap}")
