import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cascade.diffusion.process import (
    Cosine,
    Discrete,
    InterpolatedCosine,
    LinearVP,
    Sigmoid,
    ZeroTerminal,
    alpha_sigma,
    corrupt,
    eps_from_x0,
    from_x0,
    resolution_shift,
    to_x0,
)

SHAPES = [(2, 5), (2, 8, 8, 3), (2, 4, 8, 8, 3)]
KINDS = ["eps", "x0", "v"]
SCHEDULES = [
    Cosine(),
    Cosine(shift=-5.5),
    InterpolatedCosine(
        shift_clean=resolution_shift(512, 32), shift_noise=resolution_shift(512, 256)
    ),
    InterpolatedCosine(shift_clean=-6.0, shift_noise=0.0, logsnr_max=6.0),
    LinearVP(),
    Sigmoid(),
    Discrete(betas="cosine"),
    Discrete(betas="linear"),
]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("shift", [0.0, -2.77, 1.5])
@pytest.mark.parametrize("low, high", [(-20.0, 20.0), (-15.0, 12.0)])
def test_cosine_ends_at_its_range_whatever_the_shift(low, high, shift):
    schedule = Cosine(logsnr_min=low, logsnr_max=high, shift=shift)
    np.testing.assert_allclose(schedule.logsnr(jnp.array([0.0, 1.0])), [high, low], atol=1e-5)


def test_cosine_is_its_float64_formula_up_to_the_very_ends():
    t = np.array([0.0, 1e-6, 1e-4, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 2.0**-12, 1 - 2.0**-20, 1.0])
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    expected = -2 * np.log(np.tan(a * t + b))
    np.testing.assert_allclose(Cosine().logsnr(jnp.asarray(t, jnp.float32)), expected, atol=1e-4)


def test_cosine_has_the_alpha_of_its_name():
    t = np.linspace(0, 1, 101)
    alpha, sigma = alpha_sigma(Cosine().logsnr(jnp.asarray(t, jnp.float32)))
    np.testing.assert_allclose(alpha, np.cos(np.pi / 2 * t), atol=1e-4)
    np.testing.assert_allclose(sigma, np.sin(np.pi / 2 * t), atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_decrease_strictly(schedule):
    t = jnp.linspace(0, 1, 2001)
    logsnr = np.asarray(schedule.logsnr(t))
    assert np.all(np.diff(logsnr) < 0)
    assert logsnr[0] <= 20.00001 and logsnr[-1] >= -20.00001
    assert np.all(np.diff(ZeroTerminal(schedule=schedule).logsnr(t)) < 0)


def test_interpolated_cosine_goes_from_one_shift_to_the_other():
    # Hoogeboom et al. 2023: t of the schedule shifted for 256 px, 1 - t of that for 32 px.
    t = np.array([0.05, 0.3, 0.5, 0.9])
    cosine = -2 * np.log(np.tan(np.pi * t / 2))
    fine, coarse = 2 * math.log(32 / 512), 2 * math.log(256 / 512)
    schedule = InterpolatedCosine(shift_clean=fine, shift_noise=coarse)
    expected = cosine + (1 - t) * fine + t * coarse
    np.testing.assert_allclose(schedule.logsnr(jnp.asarray(t, jnp.float32)), expected, atol=0.01)
    np.testing.assert_allclose(schedule.logsnr(jnp.array([0.0, 1.0])), [20, -20], atol=1e-5)


def test_sigmoid_is_its_formula_in_float64_and_ends_at_its_range():
    t = np.array([1e-4, 0.01, 0.2, 0.5, 0.8, 0.99, 0.999])
    s = lambda u: 1 / (1 + np.exp(-u / 0.7))  # noqa: E731
    alpha2 = (s(3) - s(-1 + 4 * t)) / (s(3) - s(-1))
    logsnr = Sigmoid(start=-1.0, end=3.0, tau=0.7).logsnr(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(logsnr, np.log(alpha2 / (1 - alpha2)), atol=1e-3)
    np.testing.assert_array_equal(Sigmoid().logsnr(jnp.array([0.0, 1.0])), [20, -20])
    np.testing.assert_allclose(Sigmoid().logsnr(jnp.array([0.5])), 0, atol=1e-5)


def test_discrete_tables_are_the_published_products():
    t, linear, cosine = np.arange(1, 1001) / 1000, 1.0, 1.0
    f = lambda i: math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    for i in range(1000):
        linear *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        cosine *= max(f(i + 1) / f(i), 0.001)
        if i in (0, 1, 30, 500, 900, 999):
            here = jnp.asarray(t[i : i + 1], jnp.float32)
            for betas, alpha2 in [("linear", linear), ("cosine", cosine)]:
                logsnr = Discrete(betas=betas).logsnr(here)
                np.testing.assert_allclose(logsnr, math.log(alpha2 / (1 - alpha2)), atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_ends_in_noise_alone_and_begins_where_it_did(schedule):
    t = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
    before, after = schedule.logsnr(t), ZeroTerminal(schedule=schedule).logsnr(t)
    np.testing.assert_allclose(after[0], before[0], atol=1e-3)
    eps = normal(0, (1, 50))
    np.testing.assert_array_equal(corrupt(jnp.ones((1, 50)), eps, after[-1:]), eps)
    # Lin et al. 2023, algorithm 1, in float64.
    old, new = (1 / np.sqrt(1 + np.exp(-np.asarray(l, np.float64))) for l in (before, after))
    np.testing.assert_allclose(new, (old - old[-1]) * old[0] / (old[0] - old[-1]), atol=1e-6)


def test_zero_terminal_takes_away_what_linear_vp_leaves_of_the_picture():
    x0, level = jnp.ones((1, 4)), LinearVP().logsnr(jnp.ones(1))
    np.testing.assert_allclose(corrupt(x0, jnp.zeros((1, 4)), level), 0.00657, atol=1e-4)


def test_linear_vp_values():
    t = jnp.array([0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0])
    expected = [20.0, 6.2, 2.16, -0.42, -2.46, -6.45, -10.05]
    np.testing.assert_allclose(LinearVP().logsnr(t), expected, atol=0.02)


def test_linear_vp_is_the_limit_of_a_thousand_ddpm_steps():
    alpha2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    discrete = np.log(alpha2 / (1 - alpha2))[9:]
    continuous = LinearVP().logsnr(jnp.arange(10, 1001) / 1000)
    np.testing.assert_allclose(continuous, discrete, atol=0.07)


def test_linear_vp_keeps_precision_where_alpha_rounds_to_one():
    t = 1e-6
    beta = 0.1 * t + 19.9 * t**2 / 2
    np.testing.assert_allclose(LinearVP().logsnr(jnp.array([t])), -math.log(math.expm1(beta)), 1e-5)


@pytest.mark.parametrize("resolution, shift", [(128, -1.386), (256, -2.773), (1024, -5.545)])
def test_resolution_shift_adds_to_the_cosine(resolution, shift):
    assert resolution_shift(resolution) == pytest.approx(shift, abs=1e-3)
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = Cosine(shift=resolution_shift(resolution)).logsnr(t)
    np.testing.assert_allclose(shifted, Cosine().logsnr(t) + shift, atol=0.02)


def test_alpha_and_sigma_keep_relative_precision_at_the_ends():
    logsnr = np.array([-20.0, -10, 0, 10, 20])
    alpha, sigma = alpha_sigma(jnp.asarray(logsnr, jnp.float32))
    np.testing.assert_allclose(alpha, 1 / np.sqrt(1 + np.exp(-logsnr)), rtol=1e-6)
    np.testing.assert_allclose(sigma, 1 / np.sqrt(1 + np.exp(logsnr)), rtol=1e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_corrupt_gives_each_example_its_own_level(shape):
    x0, eps = normal(0, shape), normal(1, shape)
    x_t = corrupt(x0, eps, jnp.array([20.0, math.log(0.36 / 0.64)]))
    np.testing.assert_allclose(x_t[0], x0[0], atol=1e-3)
    np.testing.assert_allclose(x_t[1], 0.6 * x0[1] + 0.8 * eps[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_conversions_find_what_made_x_t(shape):
    x0, eps = normal(0, shape), normal(1, shape)
    x_t = 0.6 * x0 + 0.8 * eps
    made_of = {"x0": x0, "eps": eps, "v": 0.6 * eps - 0.8 * x0}
    logsnr = jnp.full(2, math.log(0.36 / 0.64))
    for kind in KINDS:
        np.testing.assert_allclose(to_x0(made_of[kind], kind, x_t, logsnr), x0, atol=2e-6)
        np.testing.assert_allclose(from_x0(x0, kind, x_t, logsnr), made_of[kind], atol=2e-6)


@pytest.mark.parametrize("a, b", list(itertools.product(KINDS, KINDS)))
def test_predictions_round_trip(a, b):
    # The prediction need have nothing to do with x_t: the algebra alone is claimed.
    logsnr = jnp.array([-6.0, -1.0, 0.0, 2.0, 6.0])
    prediction, x_t = normal(0, (5, 7)), normal(1, (5, 7))
    as_b = from_x0(to_x0(prediction, a, x_t, logsnr), b, x_t, logsnr)
    back = from_x0(to_x0(as_b, b, x_t, logsnr), a, x_t, logsnr)
    np.testing.assert_allclose(back, prediction, atol=1e-4)


@pytest.mark.parametrize("logsnr", [-20.0, 20.0])
def test_x0_and_the_eps_derived_from_it_make_x_t_at_the_ends(logsnr):
    x_t, x0, level = normal(0, (3, 9)), normal(1, (3, 9)), jnp.full(3, logsnr)
    np.testing.assert_allclose(corrupt(x0, eps_from_x0(x_t, x0, level), level), x_t, atol=1e-6)


@pytest.mark.parametrize("logsnr", [-20.0, 20.0])
def test_v_gives_x0_without_amplifying_error_at_the_ends(logsnr):
    x0, eps, level = normal(0, (3, 9)), normal(1, (3, 9)), jnp.full(3, logsnr)
    alpha, sigma = alpha_sigma(level[:, None])
    v, x_t = alpha * eps - sigma * x0, corrupt(x0, eps, level)
    np.testing.assert_allclose(to_x0(v, "v", x_t, level), x0, atol=1e-6)
    np.testing.assert_allclose(to_x0(v + 0.01, "v", x_t, level), x0, atol=0.011)


def test_low_precision_predictions_are_converted_in_float32():
    x_t, v = normal(0, (2, 6)), normal(1, (2, 6)).astype(jnp.bfloat16)
    x0 = to_x0(v, "v", x_t, jnp.zeros(2))
    assert x0.dtype == jnp.float32
    np.testing.assert_allclose(x0, (x_t - v.astype(jnp.float32)) / math.sqrt(2), atol=1e-6)


def test_mistakes_are_refused_by_name():
    with pytest.raises(ValueError, match="logsnr_min"):
        Cosine(logsnr_min=5.0, logsnr_max=-5.0)
    with pytest.raises(ValueError, match="beta_min"):
        LinearVP(beta_min=0.0)
    with pytest.raises(ValueError, match="would rise"):
        InterpolatedCosine(shift_clean=-7.0, shift_noise=0.0)
    with pytest.raises(ValueError, match="logsnr_min"):
        InterpolatedCosine(shift_clean=-1.0, shift_noise=0.0, logsnr_min=5.0, logsnr_max=-5.0)
    with pytest.raises(ValueError, match="start"):
        Sigmoid(start=3.0, end=-3.0)
    with pytest.raises(ValueError, match="tau"):
        Sigmoid(tau=0.0)
    with pytest.raises(ValueError, match="steps"):
        Discrete(steps=1)


def test_a_schedule_says_whether_it_ends_in_noise_alone():
    for schedule in SCHEDULES:
        alpha, _ = alpha_sigma(schedule.logsnr(jnp.ones(1)))
        assert not schedule.ends_in_noise and alpha[0] > 1e-5
        assert ZeroTerminal(schedule=schedule).ends_in_noise
