"""Guidance by the gradient of log p(c | x_t), on mixtures where all of it has a closed form.

For a class c that is some of the components, grad log p(c | x_t) takes E[x0 | x_t] to
E[x0 | x_t, c], which is the denoiser of those components alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Mixture

from cascade.diffusion.denoise import Detailed, Estimate, estimate_of, guide, pulled
from cascade.diffusion.process import Cosine, alpha_sigma, corrupt, expand
from cascade.diffusion.samplers import DDIM, Ancestral, Heun, initial_noise, sample, time_grid

MEANS = np.array([[-1.0, 0.3], [0.2, -0.6], [0.9, 0.1], [0.4, 1.1]])
WEIGHTS = np.array([0.4, 0.3, 0.1, 0.2])
EVERYTHING = Mixture(means=MEANS, weights=WEIGHTS, scale=0.15)
CLASS = Mixture(means=MEANS[2:], weights=WEIGHTS[2:] / 0.3, scale=0.15)
LOGSNRS = [-20.0, -6.0, -2.0, 0.0, 3.0, 8.0]


def log_p(x_t, logsnr):
    """log p(c | x_t) of the class, exactly: the share of it in the likelihood of x_t."""
    alpha, sigma = alpha_sigma(expand(logsnr, x_t))
    variance = alpha**2 * EVERYTHING.scale**2 + sigma**2
    apart = jnp.sum((x_t[:, None] - alpha[:, None] * MEANS) ** 2, axis=-1)
    log_r = jax.nn.log_softmax(jnp.log(WEIGHTS) - apart / (2 * variance), axis=-1)
    return jax.nn.logsumexp(log_r[:, 2:], axis=-1)


def points(logsnr, n=64):
    rng = np.random.default_rng(0)
    x0 = MEANS[rng.integers(0, 4, n)] + 0.15 * rng.standard_normal((n, 2))
    eps = jnp.asarray(rng.standard_normal((n, 2)), jnp.float32)
    levels = jnp.full(n, logsnr)
    return corrupt(jnp.asarray(x0, jnp.float32), eps, levels), levels


@pytest.mark.parametrize("logsnr", LOGSNRS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_the_denoiser_goes_from_that_of_all_through_that_of_the_class_and_beyond(scale, logsnr):
    x_t, levels = points(logsnr)
    found = pulled(EVERYTHING, log_p, scale)(x_t, levels)
    closed = guide(CLASS(x_t, levels), EVERYTHING(x_t, levels), scale)
    # The shift divides float32's rounding of the gradient by alpha, 22000 times at -20.
    atol = 1e-3 + 5e-7 * np.exp(-logsnr / 2)
    np.testing.assert_allclose(found, closed, atol=atol * max(1, scale))


def test_the_noise_moves_by_sigma_times_the_gradient():
    """eps_hat - s sigma grad log p, as Dhariwal & Nichol 2021 write it, the gradient by
    differences in float64."""
    x_t, levels = points(-1.0)
    alpha, sigma = alpha_sigma(expand(levels, x_t))

    def eps(denoiser):
        return np.asarray((x_t - alpha * denoiser(x_t, levels)) / sigma)

    def exact(x):
        a2 = 1 / (1 + np.exp(1.0))
        variance = a2 * 0.15**2 + 1 - a2
        apart = ((x[:, None] - a2**0.5 * MEANS) ** 2).sum(-1)
        p = WEIGHTS * np.exp(-apart / (2 * variance))
        return np.log(p[:, 2:].sum(1) / p.sum(1))

    x = np.asarray(x_t, np.float64)
    steps = 1e-5 * np.eye(2)
    gradient = np.stack([(exact(x + h) - exact(x - h)) / 2e-5 for h in steps], axis=-1)
    moved = eps(pulled(EVERYTHING, log_p, 2.0)) - eps(EVERYTHING)
    np.testing.assert_allclose(moved, -2.0 * np.asarray(sigma) * gradient, atol=1e-4)


@pytest.mark.parametrize(
    "step,steps", [(Ancestral(gamma=0.0), 300), (DDIM(), 300), (Heun(), 100)], ids=repr
)
def test_what_is_drawn_has_the_law_of_the_class(step, steps):
    n = 4000
    keys = jax.random.split(jax.random.key(3), n)
    draw = jax.jit(
        lambda denoiser, x: sample(
            denoiser,
            x,
            schedule=Cosine(),
            times=time_grid(steps),
            step=step,
            keys=keys,
        ),
        static_argnums=0,
    )
    out = np.asarray(draw(pulled(EVERYTHING, log_p, 1.0), initial_noise(keys, (2,))))
    nearest = ((out[:, None] - MEANS) ** 2).sum(-1).argmin(1)
    shares = np.bincount(nearest, minlength=4) / n
    # 4 standard errors, and what so many steps leave of the sampler's own error.
    np.testing.assert_allclose(shares, [0, 0, 1 / 3, 2 / 3], atol=0.04)
    for k in (2, 3):
        own = out[nearest == k]
        np.testing.assert_allclose(own.mean(0), MEANS[k], atol=0.025)
        np.testing.assert_allclose(own.std(0), 0.15, atol=0.015)


def test_scales_may_differ_between_examples_and_no_example_sees_another():
    x_t, levels = points(-2.0, 3)
    found = pulled(EVERYTHING, log_p, jnp.array([0.0, 1.0, 4.0]))(x_t, levels)
    for i, scale in enumerate([0.0, 1.0, 4.0]):
        alone = pulled(EVERYTHING, log_p, scale)(x_t[i : i + 1], levels[i : i + 1])
        np.testing.assert_allclose(found[i], alone[0], atol=1e-6)


def test_the_variance_that_a_network_has_learned_stays_and_both_estimates_move():
    x_t, levels = points(0.0, 4)
    inner = Detailed(lambda x, l: Estimate(x, 2 * x, 0.3 * x))
    x0, free, gamma = estimate_of(pulled(inner, log_p, 1.0), x_t, levels)
    shift = pulled(EVERYTHING, log_p, 1.0)(x_t, levels) - EVERYTHING(x_t, levels)
    assert np.abs(shift).min() > 1e-6
    np.testing.assert_allclose(x0 - x_t, shift, atol=1e-5)
    np.testing.assert_allclose(free - 2 * x_t, shift, atol=1e-5)
    np.testing.assert_array_equal(gamma, 0.3 * x_t)
