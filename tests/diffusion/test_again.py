"""Walking parts of a grid again: SDEdit's repeats and RePaint's jumps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.diffusion.process import Cosine, alpha_sigma, corrupt, noised_on
from cascade.diffusion.samplers import (
    DDIM,
    Ancestral,
    DPMSolverPP2M,
    again,
    initial_noise,
    sample,
    time_grid,
)

COSINE = Cosine()
CORRELATED = np.array([[1, 0.9], [0.9, 1]], np.float32)


def keys(n):
    return jax.random.split(jax.random.key(0), n)


def correlated(x_t, logsnr):
    """The denoiser of two numbers of variance 1 and correlation .9."""
    alpha, sigma = alpha_sigma(logsnr[0])
    gain = alpha * CORRELATED @ jnp.linalg.inv(alpha**2 * CORRELATED + sigma**2 * jnp.eye(2))
    return x_t @ gain.T


@pytest.mark.parametrize(
    "repeats,length,wanted",
    [
        (1, None, [0, 1, 2, 3]),
        (2, None, [0, 1, 2, 3, 0, 1, 2, 3]),
        (2, 2, [0, 1, 2, 0, 1, 2, 3, 2, 3]),
        (3, 1, [0, 1, 0, 1, 0, 1, 2, 1, 2, 1, 2, 3, 2, 3, 2, 3]),
    ],
)
def test_each_part_of_the_grid_is_walked_so_often(repeats, length, wanted):
    np.testing.assert_array_equal(again(jnp.arange(4.0), repeats, length), wanted)


@pytest.mark.parametrize("repeats,length", [(0, 1), (1, 0), (1, 4)])
def test_other_repeats_are_refused(repeats, length):
    with pytest.raises(ValueError, match="repeats must be at least 1 and length in 1..3"):
        again(jnp.arange(4.0), repeats, length)


def test_noising_on_comes_to_the_law_of_noising_at_once():
    eps = jax.random.normal(jax.random.key(0), (2, 4, 50_000))
    levels = jnp.array([6.0, 2.0, 2.0, -20.0]), jnp.array([-1.0, 1.9, -20.0, -21.0])
    found = noised_on(corrupt(0.7 * jnp.ones((4, 50_000)), eps[0], levels[0]), eps[1], *levels)
    alpha, sigma = alpha_sigma(levels[1])
    np.testing.assert_allclose(found.mean(1), 0.7 * alpha, atol=0.02)
    np.testing.assert_allclose(found.std(1), sigma, atol=0.02)


def test_where_times_rise_the_denoiser_is_not_asked_and_memory_begins_anew():
    asked = []

    def seen(x_t, logsnr):
        jax.debug.callback(lambda level: asked.append(float(level)), logsnr[0])
        return correlated(x_t, logsnr)

    x, times = initial_noise(keys(3), (2,)), time_grid(4, 0.8)
    options = {"schedule": COSINE, "keys": keys(3), "step": DPMSolverPP2M()}
    twice = jax.jit(lambda x: sample(seen, x, times=again(times, 2), rises=True, **options))(x)
    once = sample(correlated, x, times=times, **options)
    # The noise of a rise is that of the step it stands for, which is the fifth.
    drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 5), (2,)))(keys(3))
    level = [jnp.broadcast_to(COSINE.logsnr(t), 3) for t in (times[-1], times[0])]
    wanted = sample(correlated, noised_on(once, drawn, *level), times=times, **options)
    np.testing.assert_allclose(twice, wanted, atol=1e-5)
    assert len(asked) == 8
    np.testing.assert_allclose(asked, 2 * [float(COSINE.logsnr(t)) for t in times[:4]], rtol=1e-5)


def drawn_beside(known, repeats, length=None):
    """The second number, where the first one is kept: 2000 samples by replacement."""
    b, times = 2000, time_grid(20)

    def keep(x_s, logsnr_s, after):
        noised = corrupt(jnp.full((b, 2), known), initial_noise(after, (2,)), logsnr_s)
        return jnp.where(jnp.array([True, False]), noised, x_s)

    plan = {"times": again(times, repeats, length), "rises": True, "after_step": keep}
    options = {"schedule": COSINE, "keys": keys(b), "step": Ancestral(gamma=0.0)}
    run = jax.jit(lambda x: sample(correlated, x, **plan, **options))
    return np.asarray(run(initial_noise(keys(b), (2,))))[:, 1]


def test_jumps_bring_a_part_to_its_law_given_the_part_that_is_kept():
    """The law is N(.9 * 1.5, 1 - .81). Replacement alone falls short of that mean."""
    plain, jumped = drawn_beside(1.5, 1), drawn_beside(1.5, 10, 2)
    assert abs(jumped.mean() - 1.35) < 0.1 < 0.2 < abs(plain.mean() - 1.35)
    assert abs(jumped.std() - 0.19**0.5) < 0.1


def test_a_run_that_is_repeated_as_a_whole_leaves_its_beginning_behind():
    """SDEdit's repeats: each draws the picture further away from the guide."""
    guide, times = jnp.full((500, 2), 2.0), time_grid(8, 0.5)
    options = {"schedule": COSINE, "keys": keys(500), "step": DDIM()}
    begun = corrupt(guide, initial_noise(keys(500), (2,)), jnp.full(500, COSINE.logsnr(times[0])))
    far = [
        float(
            sample(correlated, begun, times=again(times, k), rises=True, **options).mean(),
        )
        for k in (1, 2, 4)
    ]
    assert 2 > far[0] > far[1] > far[2] > 0
