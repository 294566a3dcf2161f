import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Gaussian

from cascade.diffusion.loss import LearnedVariance, Loss, bound, denoising_loss, stratified_times
from cascade.diffusion.process import Cosine, Discrete, LinearVP, corrupt, from_x0, to_x0

KINDS = ["eps", "x0", "v"]
LOSSES = [Loss(space=kind) for kind in KINDS] + [
    Loss(weighting="min_snr"),
    Loss(weighting="truncated_snr"),
    Loss(weighting="debiased"),
]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weight_on_x0(loss, snr):
    """The table at the head of loss.py, in float64."""
    match loss.weighting:
        case "min_snr":
            return np.minimum(snr, loss.gamma)
        case "truncated_snr":
            return np.maximum(snr, 1)
        case "debiased":
            return np.sqrt(snr)
    return {"x0": np.ones_like(snr), "eps": snr, "v": snr + 1}[loss.space]


@pytest.mark.parametrize("b", [1, 7, 64])
def test_each_stratum_of_time_is_visited_once(b):
    for seed in range(5):
        t = np.asarray(stratified_times(jax.random.key(seed), b))
        assert t.min() >= 0 and t.max() <= 1
        assert sorted(np.floor(t * b).astype(int)) == list(range(b))


@pytest.fixture(scope="module")
def many_times():
    """[2000, 16]: the times of 2000 batches of 16."""
    keys = jax.random.split(jax.random.key(0), 2000)
    return np.asarray(jax.jit(jax.vmap(lambda key: stratified_times(key, 16)))(keys))


def test_every_row_of_the_batch_sees_uniform_times(many_times):
    for row in many_times.T[:4]:
        # Kolmogorov-Smirnov distance to uniform; 1.63 / sqrt(n) is its 1 % level.
        distance = np.max(np.abs(np.sort(row) - (np.arange(2000) + 0.5) / 2000))
        assert distance < 1.63 / np.sqrt(2000)


def test_stratified_means_vary_less_than_independent_ones(many_times):
    independent = np.random.default_rng(0).uniform(size=many_times.shape)
    assert np.std(np.mean(many_times**2, axis=1)) < np.std(np.mean(independent**2, axis=1)) / 8


@pytest.mark.parametrize("loss, kind", list(itertools.product(LOSSES, KINDS)))
def test_weighted_error_is_the_stated_weight_on_the_x0_error(loss, kind):
    logsnr = jnp.array([-6.0, -2.0, 0.0, 1.5, 1.7, 5.0])
    x0, eps, guess = normal(0, (6, 50)), normal(1, (6, 50)), normal(2, (6, 50))
    x_t = corrupt(x0, eps, logsnr)
    target = from_x0(x0, kind, x_t, logsnr)
    mse = np.mean((guess - target) ** 2, axis=1)
    x0_mse = np.mean((to_x0(guess, kind, x_t, logsnr) - x0) ** 2, axis=1)
    expected = weight_on_x0(loss, np.exp(np.asarray(logsnr, np.float64))) * x0_mse
    np.testing.assert_allclose(loss.weight(logsnr, kind) * mse, expected, rtol=2e-3)


def test_min_snr_weights_are_those_published():
    logsnr = jnp.linspace(-8, 8, 9)
    snr = np.exp(np.asarray(logsnr, np.float64))
    loss = Loss(weighting="min_snr")
    np.testing.assert_allclose(loss.weight(logsnr, "x0"), np.minimum(snr, 5), rtol=1e-5)
    np.testing.assert_allclose(loss.weight(logsnr, "eps"), np.minimum(snr, 5) / snr, rtol=1e-5)
    np.testing.assert_allclose(loss.weight(logsnr, "v"), np.minimum(snr, 5) / (snr + 1), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_in_the_networks_own_space_has_weight_one(kind):
    weight = Loss(space=kind).weight(jnp.linspace(-20, 20, 41), kind)
    np.testing.assert_array_equal(weight, np.ones(41))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_v_network_has_bounded_weights_under_every_loss(loss):
    weight = loss.weight(jnp.linspace(-20, 20, 41), "v")
    assert np.all(np.isfinite(weight)) and np.max(weight) <= 1.0


def test_loss_does_not_depend_on_what_the_network_calls_its_estimate():
    schedule = Cosine(logsnr_min=-8.0, logsnr_max=8.0)
    denoiser = Gaussian(scale=0.5)
    x0 = 0.5 * normal(0, (32, 6))

    def values(kind):
        def predict(x_t, logsnr):
            return from_x0(0.9 * denoiser(x_t, logsnr), kind, x_t, logsnr)

        key = jax.random.key(0)
        return [
            denoising_loss(predict, x0, kind=kind, schedule=schedule, loss=loss, key=key)[1]
            for loss in LOSSES
        ]

    by_kind = jax.jit(lambda: {kind: values(kind) for kind in KINDS})()
    for a, b in itertools.combinations(KINDS, 2):
        for of_a, of_b in zip(by_kind[a], by_kind[b], strict=True):
            np.testing.assert_allclose(of_a["loss"], of_b["loss"], rtol=1e-3)
            np.testing.assert_allclose(of_a["x0_mse"], of_b["x0_mse"], rtol=1e-3)
    losses = [float(metrics["loss"]) for metrics in by_kind["v"]]
    assert len({round(value, 4) for value in losses}) == len(LOSSES)


@pytest.mark.parametrize("schedule", [Cosine(), LinearVP()])
def test_loss_of_the_optimal_denoiser_is_the_known_floor(schedule):
    oracle, b = Gaussian(scale=0.5), 8192
    x0 = 0.5 * normal(0, (b, 16))
    t = np.linspace(0, 1, 4001)
    logsnr = np.asarray(schedule.logsnr(jnp.asarray(t, jnp.float32)), np.float64)
    floor = np.trapezoid((np.exp(logsnr) + 1) * oracle.error(logsnr), t)

    @jax.jit
    def value(factor):
        def predict(x_t, logsnr):
            return from_x0(factor * oracle(x_t, logsnr), "v", x_t, logsnr)

        return denoising_loss(
            predict, x0, kind="v", schedule=schedule, loss=Loss(), key=jax.random.key(0)
        )[0]

    # The error of a coordinate is Gaussian: its square has standard deviation sqrt(2) of its mean.
    assert abs(float(value(1.0)) - floor) < 3 * np.sqrt(2 / (b * 16)) * floor
    assert float(value(0.95)) > 1.05 * floor


@pytest.mark.parametrize("shape", [(2, 5), (2, 8, 8, 3), (2, 4, 8, 8, 3)])
def test_predicting_nothing_costs_what_x0_weighs(shape):
    x0 = normal(0, shape)
    value, metrics = jax.jit(
        lambda: denoising_loss(
            lambda x_t, logsnr: jnp.zeros_like(x_t),
            x0,
            kind="x0",
            schedule=Cosine(),
            loss=Loss(space="x0"),
            key=jax.random.key(0),
        )
    )()
    assert set(metrics) == {"loss", "x0_mse"}
    for number in (value, metrics["loss"], metrics["x0_mse"]):
        np.testing.assert_allclose(number, np.mean(x0**2), rtol=1e-5)


def test_value_and_gradient_are_finite_over_the_whole_schedule():
    # bfloat16 predictions, log-SNR up to +-20: the weight of the matching loss is 1.
    def value(scale, kind):
        return denoising_loss(
            lambda x_t, logsnr: (scale * x_t).astype(jnp.bfloat16),
            jnp.ones((64, 4)),
            kind=kind,
            schedule=Cosine(),
            loss=Loss(space=kind),
            key=jax.random.key(0),
        )

    @jax.jit
    def run(scale):
        return [jax.grad(value, has_aux=True)(scale, kind) for kind in KINDS]

    for gradient, metrics in run(jnp.float32(0.5)):
        assert np.isfinite(gradient) and abs(gradient) < 100
        assert metrics["loss"] < 10 and metrics["x0_mse"] <= 4.0


def test_the_key_decides_times_and_noise():
    @jax.jit
    def seen(key):
        record = []
        denoising_loss(
            lambda x_t, logsnr: record.append((x_t, logsnr)) or x_t,
            jnp.zeros((4, 3)),
            kind="v",
            schedule=Cosine(),
            loss=Loss(),
            key=key,
        )
        return record[0]

    (x_a, t_a), (x_b, t_b), (x_c, _) = (seen(jax.random.key(seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(x_a, x_c)
    assert not np.any(np.isclose(x_a, x_b))
    assert not np.any(np.isclose(t_a, t_b))


# Learned variance.


def test_the_bound_is_the_divergence_from_the_posterior_of_ddpm():
    """Against Ho et al. 2020, eq. 6 and 7, and Nichol & Dhariwal 2021, eq. 15, in float64."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    entries = np.array([1, 9, 400, 998, 999])
    gamma = np.array([0.5, -0.2, 1.1, 0.3, 0.9])
    x0, x0_hat, x_t = (np.asarray(normal(s, (5, 40)), np.float64) for s in range(3))
    expected = []
    for i, g, x, x_hat, noisy in zip(entries, gamma, x0, x0_hat, x_t, strict=True):
        below = 1 - abar[i - 1]
        posterior = below / (1 - abar[i]) * betas[i]

        def mean(x, i=i, below=below, noisy=noisy):
            part = np.sqrt(abar[i - 1]) * betas[i] * x + np.sqrt(1 - betas[i]) * below * noisy
            return part / (1 - abar[i])

        variance = betas[i] ** g * posterior ** (1 - g)
        nats = np.log(variance / posterior) + posterior / variance - 1
        nats = (nats + (mean(x) - mean(x_hat)) ** 2 / variance) / 2
        expected.append(nats.mean() / np.log(2))
    per_coordinate = jnp.asarray(np.repeat(gamma[:, None], 40, 1), jnp.float32)
    t = jnp.asarray((entries + 1) / 1000, jnp.float32)
    got = bound(
        per_coordinate, jnp.float32(x0_hat), jnp.float32(x0), t, Discrete(betas="linear"), 1000
    )
    np.testing.assert_allclose(got, expected, rtol=5e-3)


@pytest.mark.parametrize("x0_hat", [-1.02, 0.1, 0.999])
def test_the_first_steps_term_is_a_distribution_over_256_levels(x0_hat):
    levels = jnp.linspace(-1, 1, 256)[:, None]
    bits = bound(
        jnp.full((256, 1), 0.7),
        jnp.full((256, 1), x0_hat),
        levels,
        jnp.full(256, 1e-3),
        Discrete(),
        1000,
    )
    assert abs(np.sum(2.0 ** -np.asarray(bits, np.float64)) - 1) < 1e-4
    assert abs(float(levels[np.argmin(bits), 0]) - np.clip(x0_hat, -1, 1)) < 2 / 255


@pytest.mark.parametrize("scale, best", [(0.0, 0.0), (1.0, 1.0)])
def test_the_bound_is_least_at_the_variance_known_to_be_right(scale, best):
    """That of the posterior for a single point, of the forward process for unit variance."""
    b, gammas = 20_000, [best - 0.2, best, best + 0.2]
    t = jnp.full(b, 0.3)
    x0 = scale * normal(0, (b, 1)) + (0.4 if scale == 0 else 0.0)
    logsnr = Cosine().logsnr(t)
    x0_hat = (
        x0 if scale == 0 else Gaussian(scale=scale)(corrupt(x0, normal(1, (b, 1)), logsnr), logsnr)
    )
    values = [
        float(jnp.mean(bound(jnp.full((b, 1), g), x0_hat, x0, t, Cosine(), 20))) for g in gammas
    ]
    assert np.argmin(values) == 1, values


def test_the_hybrid_loss_teaches_the_variance_and_leaves_the_mean_alone():
    variance = LearnedVariance(steps=100, weight=0.02)

    def value(p, variance):
        seen = []

        def predict(x_t, logsnr):
            seen.append(logsnr)
            prediction = p["mean"] * x_t
            return prediction if variance is None else (prediction, p["gamma"] + 0 * x_t)

        loss, metrics = denoising_loss(
            predict,
            jnp.clip(normal(0, (64, 4)), -1, 1),
            kind="eps",
            schedule=Cosine(),
            loss=Loss(space="eps"),
            variance=variance,
            key=jax.random.key(0),
        )
        return loss, metrics | {"logsnr": seen[0]}

    p = {"mean": jnp.float32(0.9), "gamma": jnp.float32(0.5)}
    run = jax.jit(jax.value_and_grad(value, has_aux=True), static_argnums=1)
    (_, plain), alone = run(p, None)
    (_, hybrid), both = run(p, variance)
    assert alone["gamma"] == 0 and both["gamma"] != 0
    # The times differ, being rounded up to hundredths; the same ones give the mean its gradient.
    hundredths = np.asarray(jax.vmap(lambda l: jnp.argmin(jnp.abs(GRID - l)))(hybrid["logsnr"]))
    np.testing.assert_allclose(hybrid["logsnr"], GRID[hundredths], rtol=1e-5)
    eps = jax.random.normal(jax.random.split(jax.random.key(0))[1], (64, 4))
    x_t = corrupt(jnp.clip(normal(0, (64, 4)), -1, 1), eps, hybrid["logsnr"])
    np.testing.assert_allclose(both["mean"], 2 * np.mean((0.9 * x_t - eps) * x_t), rtol=1e-3)
    assert hybrid["loss"] == pytest.approx(
        float(np.mean((0.9 * x_t - eps) ** 2) + 0.02 * 100 * hybrid["vb"]), rel=1e-3
    )
    assert set(hybrid) - {"logsnr"} == {"loss", "x0_mse", "vb"} and "vb" not in plain


GRID = Cosine().logsnr(jnp.arange(1, 101) / 100)


def test_mistakes_are_refused_by_name():
    with pytest.raises(ValueError, match="gamma"):
        Loss(weighting="min_snr", gamma=-1.0)
    with pytest.raises(ValueError, match="LearnedVariance.steps"):
        LearnedVariance(steps=1)
    with pytest.raises(ValueError, match="LearnedVariance.weight"):
        LearnedVariance(weight=0.0)


def constant_guess(loss, x0, where=None):
    """The constant, of 0, .01 ... 1, that costs least as a prediction of x0 at all times."""

    def value(guess):
        def predict(x_t, logsnr):
            return jnp.full_like(x_t, guess)

        options = {"schedule": Cosine(logsnr_min=-3.0, logsnr_max=3.0), "where": where}
        key = jax.random.key(0)
        return denoising_loss(predict, x0, kind="x0", loss=loss, key=key, **options)[0]

    guesses = jnp.linspace(0.0, 1.0, 101)
    return float(guesses[jnp.argmin(jax.jit(jax.vmap(value))(guesses))])


def test_l2_is_least_at_the_mean_and_l1_at_the_median():
    x0 = jnp.tile(jnp.array([0.1, 0.1, 1.0]), (512, 1))
    assert constant_guess(Loss(space="x0"), x0) == pytest.approx(0.4)
    assert constant_guess(Loss(space="x0", norm="l1"), x0) == pytest.approx(0.1)


def test_l1_weighs_an_error_with_the_root_of_what_its_square_weighs():
    """Twice |error| in one space is twice |error| in any, so with one weight the two norms of an
    error that is the same everywhere are root and square."""
    x0 = jnp.zeros((64, 5))

    def value(norm, between):
        return denoising_loss(
            lambda x_t, logsnr: jnp.full_like(x_t, 0.25),
            x0,
            kind="x0",
            schedule=Cosine(logsnr_min=-3.0, logsnr_max=3.0),
            loss=Loss(space="v", norm=norm),
            key=jax.random.key(0),
            between=between,
        )[0]

    for t in (0.3, 0.7):
        squared, absolute = (value(norm, (t, t)) for norm in ("l2", "l1"))
        assert absolute**2 == pytest.approx(float(squared), rel=1e-5)


def test_errors_count_where_they_are_said_to_and_each_example_as_much():
    x0 = jnp.array([[0.2, 0.9, 0.9], [0.4, 0.4, 0.9]] * 256)
    where = jnp.array([[1.0, 0, 0], [1, 1, 0]] * 256)
    # The mean of .2 and .4, not of .2, .4 and .4.
    assert constant_guess(Loss(space="x0"), x0, where) == pytest.approx(0.3)
    assert constant_guess(Loss(space="x0"), x0) > 0.5
    nowhere = jnp.zeros_like(where)
    value, metrics = denoising_loss(
        lambda x_t, logsnr: x_t,
        x0,
        kind="x0",
        schedule=Cosine(),
        loss=Loss(space="x0"),
        key=jax.random.key(0),
        where=nowhere,
    )
    assert value == metrics["x0_mse"] == 0


def test_the_bound_counts_where_errors_do():
    x0, t = jnp.array([[0.2, -0.5, 0.9]]), jnp.full(1, 0.5)
    off = jnp.array([[0.0, 0.3, -0.7]])
    schedule, gamma = Cosine(), jnp.full_like(x0, 0.4)
    told = bound(gamma, x0 + off, x0, t, schedule, 10, where=jnp.array([[1.0, 1, 0]]))
    alone = bound(gamma[:, :2], (x0 + off)[:, :2], x0[:, :2], t, schedule, 10)
    np.testing.assert_allclose(told, alone, rtol=1e-5)

    def vb(where):
        return denoising_loss(
            lambda x_t, logsnr: (x_t, jnp.full_like(x_t, 0.4)),
            x0,
            kind="x0",
            schedule=schedule,
            loss=Loss(space="x0"),
            variance=LearnedVariance(),
            key=jax.random.key(0),
            where=where,
        )[1]["vb"]

    assert vb(jnp.zeros_like(x0)) == 0 < vb(None)
