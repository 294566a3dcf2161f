"""Power-function averages: closed forms, the recursion, and reconstruction from snapshots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.training import ema

GAMMAS = (6.94, 16.97)


def profile(steps, step, gamma):
    """What the average after `step` takes of the weights after each of `steps` (1, 2, ...)."""
    share = np.minimum(steps / step, 1.0) ** (gamma + 1)
    return np.diff(share, prepend=0.0)


def random_walk(steps, size=64, seed=0):
    """[steps, size]: weights that start away from zero and wander."""
    moves = np.random.default_rng(seed).standard_normal((steps, size))
    return 100.0 + np.cumsum(moves, axis=0)


def snapshots(walk, count):
    """Steps, gammas and averages of `count` equally spaced snapshots of both gammas."""
    steps = np.arange(1, len(walk) + 1)
    kept = [(len(walk) * (i + 1) // count, gamma) for i in range(count) for gamma in GAMMAS]
    averages = [profile(steps, step, gamma) @ walk for step, gamma in kept]
    return [step for step, _ in kept], [gamma for _, gamma in kept], averages


# Profiles.


@pytest.mark.parametrize("sigma_rel,gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_published_widths_have_the_published_exponents(sigma_rel, gamma):
    assert ema.gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0, 16.97, 400.0])
def test_width_and_exponent_convert_both_ways_and_the_width_is_the_profiles_deviation(gamma):
    sigma = np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)  # equation (2)
    assert ema.gamma_from_sigma_rel(sigma) == pytest.approx(gamma, rel=1e-6, abs=1e-6)
    s = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * s**gamma / 200_000
    mean = density @ s
    assert sigma == pytest.approx(np.sqrt(density @ (s - mean) ** 2), rel=1e-4)


@pytest.mark.parametrize(
    "a,b",
    [((7, 2.0), (7, 2.0)), ((3, 6.94), (8, 16.97)), ((8, 16.97), (3, 6.94)), ((5, 0), (2, 9))],
)
def test_inner_products_agree_with_numerical_integration(a, b):
    s = (np.arange(200_000) + 0.5) * 8 / 200_000
    densities = [(g + 1) * s**g / t ** (g + 1) * (s < t) for t, g in (a, b)]
    wanted = densities[0] @ densities[1] * 8 / 200_000
    assert ema.inner_product(*a, *b) == pytest.approx(wanted, rel=1e-4)


# The recursion.


@pytest.mark.parametrize("gamma", [0.0, 6.94])
def test_the_recursion_is_the_weighted_mean_and_forgets_where_it_began(gamma):
    walk = random_walk(30, 4)
    mean = {"a": jnp.full(3, 1e6), "b": jnp.full(1, 1e6)}
    step_by_step = jax.jit(ema.track, static_argnums=3)
    for step, row in enumerate(jnp.asarray(walk, jnp.float32), 1):
        mean = step_by_step(mean, {"a": row[:3], "b": row[3:]}, jnp.int32(step), gamma)
    wanted = profile(np.arange(1, 31), 30, gamma) @ walk
    np.testing.assert_allclose(np.concatenate([mean["a"], mean["b"]]), wanted, rtol=1e-5)
    if gamma == 0:
        np.testing.assert_allclose(wanted, walk.mean(0), rtol=1e-12)


def test_beta_is_the_published_one():
    for step, gamma in [(1, 6.94), (2, 0.0), (50, 16.97)]:
        kept = ema.track(jnp.ones(()), jnp.zeros(()), step, gamma)
        assert kept == pytest.approx((1 - 1 / step) ** (gamma + 1), rel=1e-5)


def test_late_steps_keep_their_weight_in_float32():
    moved = ema.track(jnp.zeros(1), jnp.ones(1), jnp.int32(3_000_000), 6.94)
    assert moved[0] == pytest.approx(7.94 / 3e6, rel=1e-5)


# Reconstruction.


def test_a_stored_average_is_reconstructed_from_itself():
    steps, gammas, _ = snapshots(random_walk(64, 1), 8)
    for i in (0, 5, 15):
        weights = ema.posthoc_weights(steps, gammas, steps[i], gammas[i])
        np.testing.assert_allclose(weights, np.eye(16)[i], atol=1e-8)


@pytest.mark.parametrize("sigma_rel,step", [(0.07, 2000), (0.15, 2000), (0.2, 2000), (0.12, 1500)])
def test_an_average_that_was_not_stored_is_close_to_the_tracked_one(sigma_rel, step):
    walk = random_walk(2000)
    steps, gammas, averages = snapshots(walk, 32)
    gamma = ema.gamma_from_sigma_rel(sigma_rel)
    weights = ema.posthoc_weights(steps, gammas, step, gamma)
    got = ema.combine(weights, [{"x": average} for average in averages])["x"]
    tracked = profile(np.arange(1, 2001), step, gamma) @ walk
    error = np.sqrt(np.mean((got - tracked) ** 2))
    nearest = min(np.sqrt(np.mean((average - tracked) ** 2)) for average in averages)
    assert error < 0.05 * nearest


def test_weights_are_the_best_of_those_that_sum_to_one():
    steps, gammas, target = [30, 60, 60, 90], [6.94, 6.94, 16.97, 6.94], (90, 3.0)
    s = (np.arange(9000) + 0.5) / 100
    densities = np.stack(
        [(g + 1) * s**g / t ** (g + 1) * (s < t) for t, g in zip(steps, gammas, strict=True)]
    )
    wanted = 4.0 * s**3 / 90.0**4

    def error(weights):
        return np.sum((weights @ densities - wanted) ** 2)

    weights = ema.posthoc_weights(steps, gammas, *target)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    for move in np.random.default_rng(0).standard_normal((20, 4)):
        move = 0.05 * (move - move.mean())
        assert error(weights) < error(weights + move)


def test_equal_snapshots_share_the_weight():
    weights = ema.posthoc_weights([50, 50, 100], [6.94, 6.94, 6.94], 50, 6.94)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=1e-8)


def test_combine_is_the_weighted_sum_and_reads_trees_one_by_one():
    trees = ({"a": {"b": np.full(2, i, np.float32)}, "c": jnp.ones(1)} for i in (1, 2, 4))
    total = ema.combine([0.5, -1.0, 2.0], trees)
    np.testing.assert_array_equal(total["a"]["b"], np.full(2, 6.5, np.float32))
    np.testing.assert_array_equal(total["c"], np.full(1, 1.5, np.float32))
    assert total["c"].dtype == np.float32


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([], [], 1, 1.0), "at least one"),
        (([10, 20], [1.0], 10, 1.0), "a gamma for each"),
        (([10, 20], [1.0, 1.0], 21, 1.0), "1..20"),
        (([10, 20], [1.0, -0.5], 20, 1.0), "gamma"),
    ],
)
def test_impossible_reconstructions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ema.posthoc_weights(*arguments)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel"):
        ema.gamma_from_sigma_rel(sigma_rel)


def test_a_different_number_of_weights_and_trees_is_refused():
    with pytest.raises(ValueError):
        ema.combine([1.0, 2.0], [{"a": np.ones(1)}])
