"""The denoising loss: corrupt x0 to a random time, predict, weigh the error.

Errors of one network in the three spaces are proportional, example by example:

    (1)  |eps_hat - eps|^2 = SNR |x0_hat - x0|^2,     |v_hat - v|^2 = (SNR + 1) |x0_hat - x0|^2

so every loss of this file is a weight on the x0 error (SNR = exp(logsnr)):

    (2)  plain, in eps    SNR                 Ho et al. 2020, L_simple
         plain, in x0     1
         plain, in v      SNR + 1             Salimans & Ho 2022
         min_snr          min(SNR, gamma)     Hang et al. 2023, gamma = 5
         truncated_snr    max(SNR, 1)         Salimans & Ho 2022, sec. 4
         debiased         sqrt(SNR)           Yu et al. 2023 (arXiv:2310.08442)

A network that also predicts the variance of its steps (Nichol & Dhariwal 2021, "Improved DDPM",
eq. 15 and 16) is trained on the bound of a chain of T steps besides. The step from t to s = t - 1/T
has log variance gamma log(c sigma_t^2) + (1 - gamma) log(c sigma_s^2), c = 1 - SNR_t / SNR_s, so

    (3)  vb_t = KL(q(x_s | x_t, x0) || p(x_s | x_t))
              = (e^-k - 1 + k + (SNR_s - SNR_t) e^-k |x0_hat - x0|^2) / 2,
         k = gamma log(sigma_t^2 / sigma_s^2)

a coordinate; the first step has the likelihood of 8-bit data in its place, as in Ho et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Array, Float, Int, Key

from cascade import ranges
from cascade.diffusion.process import (
    MOST_ENTRIES,
    Prediction,
    Schedule,
    alpha_sigma,
    corrupt,
    expand,
    to_x0,
)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Which weight of equation (2) the error carries."""

    space: Prediction = "v"
    """Where the plain mean squared error is taken; the other weightings are the same in every
    space, and do not read it."""
    weighting: Literal["plain", "min_snr", "truncated_snr", "debiased"] = "plain"
    """Which line of equation (2): how the weight on the x0 error depends on the SNR."""
    gamma: float = 5.0
    """The cap of min_snr, an SNR (not a log-SNR) above 0; 5 is that of Hang et al. 2023."""
    norm: Literal["l2", "l1"] = "l2"
    """"l2" takes the squared error with that weight, "l1" the absolute error with its root: what is
    drawn is then less varied (Saharia et al. 2022, "Palette", sec. 4.2)."""

    def __post_init__(self):
        if self.weighting not in ("plain", "min_snr", "truncated_snr", "debiased"):
            raise ValueError(
                'Loss.weighting: "plain", "min_snr", "truncated_snr" or "debiased", '
                f"got {self.weighting!r}"
            )
        if self.norm not in ("l2", "l1"):
            raise ValueError(f'Loss.norm: "l2" or "l1", got {self.norm!r}')
        ranges.real(self, -1e12, 1e12, "gamma")
        if self.gamma <= 0:
            raise ValueError(f"Loss.gamma must be positive (an SNR), got {self.gamma}")

    def weight(self, logsnr: Float[Array, " b"], kind: Prediction) -> Float[Array, " b"]:
        """The weight on |error|^2 in the network's own space `kind`, by equations (1) and (2).

        It is bounded where the loss suits the network: a weight in the network's own space is 1,
        v networks and min_snr stay below max(1, gamma) throughout. It is not for an x0 network
        with the eps, v, truncated_snr or debiased loss (SNR as t -> 0, or its root) nor for an eps
        network with the x0, v, truncated_snr or debiased loss (1/SNR as t -> 1, or its root): there
        the range of the schedule is the only bound, exp(20) by default, so narrow logsnr_min and
        logsnr_max.
        """
        match self.weighting:
            case "plain":
                on_x0 = _log_ratio(logsnr, self.space)
            case "min_snr":
                on_x0 = jnp.minimum(logsnr, jnp.log(self.gamma))
            case "truncated_snr":
                on_x0 = jnp.maximum(logsnr, 0.0)
            case "debiased":
                on_x0 = logsnr / 2
        # A difference of logarithms: SNR / SNR is exactly 1, and exp(20) never meets exp(-20).
        return jnp.exp(on_x0 - _log_ratio(logsnr, kind))


@dataclass(frozen=True, kw_only=True)
class LearnedVariance:
    """The hybrid loss of a network that predicts gamma of equation (3): plain + weight * bound."""

    steps: int = 1000
    """T of the chain whose bound it is, 2 or more; training times are rounded up to its steps."""
    weight: float = 0.001
    """Factor, above 0, on the whole bound, in bits a coordinate, summed over T steps. With .001 and
    1000 steps (Nichol & Dhariwal 2021, sec. 3.2) a step's own term has weight 1: DeepFloyd IF's
    "rescaled" loss."""

    def __post_init__(self):
        ranges.whole(self, 2, MOST_ENTRIES, "steps")
        ranges.real(self, -1e12, 1e12, "weight")
        if self.weight <= 0:
            raise ValueError(f"LearnedVariance.weight must be positive, got {self.weight}")


def denoising_loss(
    predict: Callable[[Float[Array, " b *d"], Float[Array, " b"]], Any],
    x0: Float[Array, " b *d"],
    *,
    kind: Prediction,
    schedule: Schedule,
    loss: Loss,
    variance: LearnedVariance | None = None,
    key: Key[Array, ""],
    part: Part | None = None,
    between: tuple[Any, Any] | None = None,
    where: Float[Array, " b *k"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean weighted error of `predict` on a batch, at times stratified over it.

    predict(x_t, logsnr) returns a prediction of the `kind` named, in any float dtype; with a
    `variance`, that and the gamma of equation (3), of equal shapes. The error is taken in the
    network's space, against a target made from x0 and eps, so nothing is divided by a vanishing
    alpha or sigma whatever space the loss is stated in. part: of which x0 is, see `draw`. between:
    the range of the times, a part of [0, 1], which None is the whole of. where: 1 where errors
    count and 0 where they do not, of a shape that broadcasts with x0's; None is everywhere. Each
    example's error is the mean over where they count.

    Returns the scalar to differentiate, and metrics: "loss", and "x0_mse", the unweighted error
    of x0_hat clipped to the range of the batch (unclipped, an eps network's error near t=1 is
    multiplied by up to exp(20) and drowns the rest); with a `variance`, "vb", the mean term of the
    bound in bits a coordinate.
    """
    k_time, k_noise = jax.random.split(key)
    x0 = x0.astype(jnp.float32)
    t = draw(lambda shape: stratified_times(k_time, shape[0]), x0.shape[:1], part)
    if between is not None:
        t = between[0] + (between[1] - between[0]) * t
    if variance is not None:
        t = jnp.maximum(jnp.ceil(t * variance.steps), 1) / variance.steps
    logsnr = schedule.logsnr(t)
    eps = draw(lambda shape: jax.random.normal(k_noise, shape), x0.shape, part)
    x_t = corrupt(x0, eps, logsnr)
    output: Any = predict(x_t, logsnr)
    prediction, gamma = output if variance is not None else (output, jnp.zeros(()))
    prediction = prediction.astype(jnp.float32)

    error, weight = prediction - _target(kind, x0, eps, logsnr), loss.weight(logsnr, kind)
    if loss.norm == "l1":
        value = jnp.mean(jnp.sqrt(weight) * _mean(jnp.abs(error), where))
    else:
        value = jnp.mean(weight * _mean(jnp.square(error), where))
    x0_hat = jax.lax.stop_gradient(to_x0(prediction, kind, x_t, logsnr))
    metrics = {}
    if variance is not None:
        vb = jnp.mean(bound(gamma, x0_hat, x0, t, schedule, variance.steps, where))
        value += variance.weight * variance.steps * vb
        metrics["vb"] = vb
    largest = jnp.max(jnp.abs(x0))
    off = jnp.square(jnp.clip(x0_hat, -largest, largest) - x0)
    x0_mse = jnp.mean(_mean(off, where))
    return value, {"loss": value, "x0_mse": x0_mse, **metrics}


def bound(
    gamma: Float[Array, " b *d"],
    x0_hat: Float[Array, " b *d"],
    x0: Float[Array, " b *d"],
    t: Float[Array, " b"],
    schedule: Schedule,
    steps: int,
    where: Float[Array, " b *k"] | None = None,
) -> Float[Array, " b"]:
    """Equation (3) at the times t = 1/steps, 2/steps, ... 1, in bits a coordinate.

    At t = 1/steps it is -log2 of what the step gives to the level of x0, one of 256 from -1 to 1,
    with x0_hat for its mean. No variance given x0 exists there, x_0 being x0: the lower bound is
    that of the step before (Nichol & Dhariwal 2021, as published with the paper). Pass x0_hat
    without its gradient, as they do: the bound is a noisy teacher of means. where: of which
    coordinates it is the mean, as for `denoising_loss`.
    """
    gamma = gamma.astype(jnp.float32)
    s, second = jnp.maximum(t - 1 / steps, 0), jnp.full_like(t, 2 / steps)
    logsnr_t, logsnr_s, logsnr_2 = (expand(schedule.logsnr(u), x0) for u in (t, s, second))
    # log sigma^2 = -softplus(logsnr), to full relative precision where sigma is almost 1.
    log_sigma2_t, log_sigma2_s = -jax.nn.softplus(logsnr_t), -jax.nn.softplus(logsnr_s)

    k = gamma * (log_sigma2_t - log_sigma2_s)
    gained = -jnp.exp(logsnr_s) * jnp.expm1(logsnr_t - logsnr_s)
    kl = (jnp.expm1(-k) + k + gained * jnp.exp(-k) * jnp.square(x0_hat - x0)) / 2

    # At the first step upper = sigma_t^2, and lower = (1 - SNR_2 / SNR_t) sigma_t^2.
    ratio = jnp.minimum(logsnr_2 - logsnr_t, -1e-6)
    log_variance = log_sigma2_t + (1 - gamma) * jnp.log(-jnp.expm1(ratio))
    nats = jnp.where(expand(t, x0) < 1.5 / steps, -_log_likelihood(x0, x0_hat, log_variance), kl)
    return _mean(nats, where) / jnp.log(2.0)


Part = tuple[Int[Array, ""], int]
"""(i, n): rows i, i + n, i + 2n ... of a batch n times as large."""


def draw(
    sample: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], part: Part | None
) -> Array:
    """sample(shape); for a part of a batch, its rows of what is drawn for the whole one.

    So gradients accumulated over parts of a batch are those of the batch. Rows are dealt out and
    not cut in pieces, because a batch lies in pieces on devices: each deals from its own.
    """
    if part is None:
        return sample(shape)
    i, n = part
    return sample((n * shape[0], *shape[1:])).reshape(shape[0], n, *shape[1:])[:, i]


def stratified_times(key: Key[Array, ""], b: int) -> Float[Array, " b"]:
    """b uniform times in [0, 1], one in each [i/b, (i+1)/b], from a random row on.

    Unbiased like independent times, with far less variance (compare Kingma et al. 2021, App. I.1).
    The rotation makes every row uniform. Rows belong to processes: one that always saw its own
    share of the data at its own share of the times would bias training.
    """
    k_first, k_within = jax.random.split(key)
    strata = (jnp.arange(b) + jax.random.randint(k_first, (), 0, b)) % b
    return (strata + jax.random.uniform(k_within, (b,))) / b


def _log_ratio(logsnr: Float[Array, " b"], space: Prediction) -> Float[Array, " b"]:
    """log of |error in space|^2 / |error in x0|^2, equation (1)."""
    match space:
        case "x0":
            return jnp.zeros_like(logsnr)
        case "eps":
            return logsnr
        case "v":
            return jax.nn.softplus(logsnr)
    raise ValueError(f'prediction must be "eps", "x0" or "v", got {space!r}')


def _target(
    kind: Prediction,
    x0: Float[Array, " b *d"],
    eps: Float[Array, " b *d"],
    logsnr: Float[Array, " b"],
) -> Float[Array, " b *d"]:
    match kind:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            alpha, sigma = alpha_sigma(expand(logsnr, x0))
            return alpha * eps - sigma * x0


def _log_likelihood(
    x0: Float[Array, " b *d"], mean: Float[Array, " b *d"], log_variance: Float[Array, " b *d"]
) -> Float[Array, " b *d"]:
    """log of what N(mean, variance) gives to the level of x0, the outermost two reaching on."""
    scale, half = jnp.exp(-log_variance / 2), 1 / 255
    below, above = (x0 - half - mean) * scale, (x0 + half - mean) * scale
    # Where both are far above 0 their difference is taken on the other, precise side.
    flip = x0 > mean
    low, high = jnp.where(flip, -above, below), jnp.where(flip, -below, above)
    inside = jnp.log(jnp.maximum(ndtr(high) - ndtr(low), 1e-12))
    return jnp.where(x0 < -0.999, log_ndtr(above), jnp.where(x0 > 0.999, log_ndtr(-below), inside))


def _mean(x: Float[Array, " b *d"], where: Float[Array, " b *k"] | None) -> Float[Array, " b"]:
    """Each example's mean, over where `where` is 1; 0 where it is 1 nowhere."""
    over = tuple(range(1, x.ndim))
    if where is None:
        return jnp.mean(x, axis=over)
    where = jnp.broadcast_to(where.astype(x.dtype), x.shape)
    return jnp.sum(where * x, axis=over) / jnp.maximum(jnp.sum(where, axis=over), 1)
