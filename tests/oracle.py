"""Data whose optimal denoiser is known in closed form: what samplers and losses are tested on.

For x0 ~ sum_k weights_k N(means_k, scale^2 I) and x_t = alpha x0 + sigma eps,

    E[x0 | x_t] = sum_k r_k (m_k + alpha s^2 / V (x_t - alpha m_k)),   V = alpha^2 s^2 + sigma^2
    r_k ~ weights_k N(x_t; alpha m_k, V I)
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cascade.diffusion.process import alpha_sigma, expand


@dataclass(frozen=True, kw_only=True, eq=False)  # hashed by identity: a static argument of jit
class Mixture:
    """Gaussians of equal scale. means: [k, d]; weights: [k], summing to 1."""

    means: np.ndarray
    weights: np.ndarray
    scale: float

    def __call__(self, x_t, logsnr):
        """The optimal denoiser, for x_t [b, d]."""
        alpha, sigma = alpha_sigma(expand(logsnr, x_t))
        variance = alpha**2 * self.scale**2 + sigma**2
        residual = x_t[:, None] - alpha[:, None] * self.means  # [b, k, d]
        log_r = jnp.log(self.weights) - jnp.sum(residual**2, axis=-1) / (2 * variance)
        r = jax.nn.softmax(log_r, axis=-1)[..., None]
        shrunk = self.means + (alpha * self.scale**2 / variance)[:, None] * residual
        return jnp.sum(r * shrunk, axis=1)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """N(0, scale^2) in every coordinate, whatever the rank."""

    scale: float

    def __call__(self, x_t, logsnr):
        alpha, sigma = alpha_sigma(expand(logsnr, x_t))
        return alpha * self.scale**2 / (alpha**2 * self.scale**2 + sigma**2) * x_t

    def flow(self, x_t, logsnr_t: float, logsnr_s: float):
        """Where the probability flow takes x_t, exactly, in float64."""
        deviation = [
            np.sqrt(_sigmoid(l) * self.scale**2 + _sigmoid(-l)) for l in (logsnr_t, logsnr_s)
        ]
        return np.asarray(x_t, np.float64) * deviation[1] / deviation[0]

    def error(self, logsnr):
        """E|x0_hat - x0|^2 per coordinate, in float64."""
        alpha2, sigma2 = _sigmoid(logsnr), _sigmoid(-np.asarray(logsnr))
        return self.scale**2 * sigma2 / (alpha2 * self.scale**2 + sigma2)


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
