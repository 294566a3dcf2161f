r"""Averages of the weights over training whose length is chosen after training.

The average of the weights theta after step t with a power-function profile of exponent gamma
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", sec. 3):

    mean_gamma(t) = (gamma + 1) / t^(gamma + 1)  int_0^t  s^gamma theta(s) ds

    mean(t) = beta mean(t - 1) + (1 - beta) theta(t)      beta = (1 - 1/t)^(gamma + 1)        (1)

The recursion is the integral, exactly, if theta(i) holds from step i - 1 to i. Steps count from 1;
at step 1 beta is 0, so the first weights leave no trace. A profile grows with the run: it always
reaches back over the same share of it, unlike the usual average with a constant beta. Its width is
called sigma_rel, the profile's standard deviation as a part of t:

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                                   (2)

A run that keeps some snapshots of two such averages gives any other one afterwards (app. C): as the
sum of snapshots whose profiles come nearest to the wanted one. Profiles of (t, gamma), zero after
their own t, have the inner product, for t_a <= t_b,

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)  (t_a / t_b)^gamma_b / t_b          (3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def track(mean: Any, params: Any, step: Any, gamma: float) -> Any:
    """(1) on a pytree: the average after `step` from the average before it.

    It takes the rate 1 - beta, since beta itself is 1 but for the last bits late in training.
    """
    rate = _rate(step, gamma)
    return jax.tree.map(lambda m, p: m + rate * (p - m), mean, params)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The gamma of equation (2), 0 or more, of a width in (0, 0.2886]; 0.05 gives 16.97."""
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel must lie in (0, 0.2886], got {sigma_rel}")
    # (2) is the cubic x^3 + x^2 - a x + a = 0 of x = gamma + 2, whose largest root is the one.
    a = sigma_rel**-2
    return max(0.0, float(np.roots([1.0, 1.0, -a, a]).real.max()) - 2)


def inner_product(step_a: Any, gamma_a: Any, step_b: Any, gamma_b: Any) -> Any:
    """(3), for numbers or arrays that broadcast; float64, in units of 1 / step."""
    step_a, gamma_a, step_b, gamma_b = (
        np.asarray(x, np.float64) for x in (step_a, gamma_a, step_b, gamma_b)
    )
    exponent = np.where(step_a <= step_b, gamma_b, gamma_a)
    first, last = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * (first / last) ** exponent / last


def posthoc_weights(
    snapshot_steps: Sequence[int],
    snapshot_gammas: Sequence[float],
    target_step: int,
    target_gamma: float,
) -> Float[np.ndarray, " n"]:
    """Weights of the snapshots whose sum is nearest to the average (target_step, target_gamma).

    Snapshot i is the average with snapshot_gammas[i] after snapshot_steps[i]. Nearest in the
    integral of the squared difference of the profiles, among the weights that sum to 1. The paper
    leaves their sum to the fit and its networks do not mind, being blind to the scale of their
    weights; ours are not. Weights may be negative.
    """
    steps, gammas = np.asarray(snapshot_steps, np.float64), np.asarray(snapshot_gammas, np.float64)
    if not len(steps) or steps.shape != gammas.shape:
        raise ValueError(
            f"posthoc_weights: needs a gamma for each of at least one snapshot, got {len(gammas)} "
            f"for {len(steps)}"
        )
    if steps.min() < 1 or not 1 <= target_step <= steps.max():
        raise ValueError(
            f"posthoc_weights: target_step must lie in 1..{int(steps.max())}, the last snapshot's, "
            f"got {target_step}"
        )
    _check_gammas(*gammas, target_gamma)
    # Profiles of length 1 keep the equations well-conditioned; the last one is for the sum.
    length = np.sqrt(inner_product(steps, gammas, steps, gammas))
    system, wanted = np.zeros((len(steps) + 1,) * 2), np.ones(len(steps) + 1)
    gram = inner_product(steps[:, None], gammas[:, None], steps, gammas)
    system[:-1, :-1] = gram / (length[:, None] * length)
    system[-1, :-1] = system[:-1, -1] = length.min() / length
    wanted[:-1] = inner_product(steps, gammas, target_step, target_gamma) / length
    wanted[:-1] /= length.min()
    # Equal snapshots leave it singular; then the solution of least norm shares out the weight.
    solution = np.linalg.lstsq(system, wanted)[0]
    return solution[:-1] * length.min() / length


def combine(weights: Sequence[float] | np.ndarray, trees: Iterable[Any]) -> Any:
    """The weighted sum of pytrees of arrays, added in float64 and returned as float32 NumPy arrays.

    trees may be read one after the other: no two need to be in memory at once.
    """
    total = None
    for weight, tree in zip(weights, trees, strict=True):
        part = jax.tree.map(lambda x, w=float(weight): w * np.asarray(x, np.float64), tree)
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None:
        raise ValueError("combine: needs at least one tree, got none")
    return jax.tree.map(lambda x: np.asarray(x, np.float32), total)


def _rate(step: Any, gamma: float) -> jax.Array:
    """1 - beta, to full relative precision."""
    step = jnp.asarray(step, jnp.float32)
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / step))


def _check_gammas(*gammas: float) -> None:
    if min(gammas) < 0:
        raise ValueError(f"gamma must not be negative, got {min(gammas)}")
