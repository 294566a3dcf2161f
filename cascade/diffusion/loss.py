"""The denoising loss: corrupt x0 to a random time, predict, weigh the error.

Errors of one network in the three spaces are proportional, example by example:

    (1)  |eps_hat - eps|^2 = SNR |x0_hat - x0|^2,     |v_hat - v|^2 = (SNR + 1) |x0_hat - x0|^2

so every loss of this file is a weight on the x0 error (SNR = exp(logsnr)):

    (2)  plain, in eps    SNR                 Ho et al. 2020, L_simple
         plain, in x0     1
         plain, in v      SNR + 1             Salimans & Ho 2022
         min_snr          min(SNR, gamma)     Hang et al. 2023, gamma = 5
         truncated_snr    max(SNR, 1)         Salimans & Ho 2022, sec. 4
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from cascade.diffusion.process import Prediction, Schedule, alpha_sigma, corrupt, expand, to_x0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Which weight of equation (2) the error carries.

    space: where the plain mean squared error is taken; the other two weightings are the same in
        every space, and do not read it.
    gamma: the cap of min_snr, an SNR (not a log-SNR).
    """

    space: Prediction = "v"
    weighting: Literal["plain", "min_snr", "truncated_snr"] = "plain"
    gamma: float = 5.0

    def __post_init__(self):
        if self.weighting not in ("plain", "min_snr", "truncated_snr"):
            raise ValueError(
                f'Loss.weighting: "plain", "min_snr" or "truncated_snr", got {self.weighting!r}'
            )
        if self.gamma <= 0:
            raise ValueError(f"Loss.gamma must be positive (an SNR), got {self.gamma}")

    def weight(self, logsnr: Float[Array, " b"], kind: Prediction) -> Float[Array, " b"]:
        """The weight on |error|^2 in the network's own space `kind`, by equations (1) and (2).

        It is bounded where the loss suits the network: a weight in the network's own space is 1,
        v networks and min_snr stay below max(1, gamma) throughout. It is not for an x0 network
        with the eps, v or truncated_snr loss (SNR as t -> 0) nor for an eps network with the x0,
        v or truncated_snr loss (1/SNR as t -> 1): there the range of the schedule is the only
        bound, exp(20) by default, so narrow logsnr_min and logsnr_max.
        """
        match self.weighting:
            case "plain":
                on_x0 = _log_ratio(logsnr, self.space)
            case "min_snr":
                on_x0 = jnp.minimum(logsnr, jnp.log(self.gamma))
            case "truncated_snr":
                on_x0 = jnp.maximum(logsnr, 0.0)
        # A difference of logarithms: SNR / SNR is exactly 1, and exp(20) never meets exp(-20).
        return jnp.exp(on_x0 - _log_ratio(logsnr, kind))


def denoising_loss(
    predict: Callable[[Float[Array, " b *d"], Float[Array, " b"]], Float[Array, " b *d"]],
    x0: Float[Array, " b *d"],
    *,
    kind: Prediction,
    schedule: Schedule,
    loss: Loss,
    key: Key[Array, ""],
    part: Part | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean weighted error of `predict` on a batch, at times stratified over it.

    predict(x_t, logsnr) returns a prediction of the `kind` named, in any float dtype. The error is
    taken in that space, against a target made from x0 and eps, so nothing is divided by a
    vanishing alpha or sigma whatever space the loss is stated in. part: of which x0 is, see `draw`.

    Returns the scalar to differentiate, and metrics: "loss", and "x0_mse", the unweighted error
    of x0_hat clipped to the range of the batch (unclipped, an eps network's error near t=1 is
    multiplied by up to exp(20) and drowns the rest).
    """
    k_time, k_noise = jax.random.split(key)
    x0 = x0.astype(jnp.float32)
    t = draw(lambda shape: stratified_times(k_time, shape[0]), x0.shape[:1], part)
    logsnr = schedule.logsnr(t)
    eps = draw(lambda shape: jax.random.normal(k_noise, shape), x0.shape, part)
    x_t = corrupt(x0, eps, logsnr)
    prediction = predict(x_t, logsnr).astype(jnp.float32)

    error = _mean_square(prediction - _target(kind, x0, eps, logsnr))
    value = jnp.mean(loss.weight(logsnr, kind) * error)
    bound = jnp.max(jnp.abs(x0))
    x0_hat = jnp.clip(to_x0(prediction, kind, x_t, logsnr), -bound, bound)
    x0_mse = jnp.mean(_mean_square(x0_hat - x0))
    return value, {"loss": value, "x0_mse": jax.lax.stop_gradient(x0_mse)}


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


def _mean_square(x: Float[Array, " b *d"]) -> Float[Array, " b"]:
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))
