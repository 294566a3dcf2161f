import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Gaussian, Mixture

from cascade.diffusion import samplers
from cascade.diffusion.denoise import Detailed, Estimate, Threshold, changed, guide, thresholded
from cascade.diffusion.process import Cosine, Schedule, corrupt
from cascade.diffusion.samplers import (
    DDIM,
    Ancestral,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    Heun,
    Leg,
    Step,
    begun,
    initial_noise,
    invert_ddim,
    sample,
    time_grid,
    walk,
)

STEPS = [Ancestral(), DDIM(), DPMSolverPP2M(), DPMSolverPP2MSDE(), Heun()]
COSINE = Cosine()
CORNERS = Mixture(means=np.eye(3), weights=np.ones(3) / 3, scale=0.3)


class Straight(Schedule):
    """Log-SNR linear in time: equal steps of it, as DPM-Solver's error terms assume."""

    def logsnr(self, t):
        return 20 - 28 * t


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def draw(denoiser, x, n, step, *, schedule=COSINE, image_keys=None, after_step=None):
    """`sample` in n steps, compiled once for each denoiser, step and shape."""
    image_keys = keys(len(x)) if image_keys is None else image_keys
    return compiled_sample(
        denoiser, x, time_grid(n), image_keys, step=step, schedule=schedule, after_step=after_step
    )


@functools.partial(jax.jit, static_argnames=("denoiser", "step", "schedule", "after_step"))
def compiled_sample(denoiser, x, times, image_keys, **options):
    return sample(denoiser, x, times=times, keys=image_keys, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_step(step, denoiser, x_t, logsnr_t, logsnr_s, memory=None):
    """A single step in the middle of a grid: -> (x_s, x0_hat, memory)."""
    b = len(x_t)
    leg = Leg(jnp.full(b, logsnr_t), jnp.full(b, logsnr_s), jnp.array(False), keys(b))
    return step(denoiser, x_t, leg, step.memory(x_t) if memory is None else memory)


def point(x_t, logsnr):
    """The denoiser of data that is .7 everywhere."""
    return jnp.full_like(x_t, 0.7)


def slope(errors, ns):
    return -np.polyfit(np.log(ns), np.log(errors), 1)[0]


# The oracle, on which the rest stands.


def test_oracle_is_the_posterior_mean():
    weights, means = np.array([0.3, 0.7]), np.array([-1.0, 0.5])
    mixture = Mixture(means=means[:, None], weights=weights, scale=0.2)
    logsnr, x_t = np.repeat([-3.0, 0.0, 3.0], 3), np.tile([-0.7, 0.1, 0.6], 3)
    out = jax.jit(mixture)(jnp.asarray(x_t[:, None], jnp.float32), jnp.asarray(logsnr, jnp.float32))

    x0 = np.linspace(-3, 3, 6001)  # numerical integration over the only coordinate
    prior = np.exp(-((x0[:, None] - means) ** 2) / (2 * 0.2**2)) @ weights
    alpha, sigma2 = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / (1 + np.exp(logsnr))
    likelihood = np.exp(-((x_t[:, None] - alpha[:, None] * x0) ** 2) / (2 * sigma2[:, None]))
    posterior = prior * likelihood
    mean = posterior @ x0 / posterior.sum(axis=1)
    np.testing.assert_allclose(out[:, 0], mean, atol=1e-4)


# Every sampler.


@pytest.mark.parametrize("shape", [(2, 5), (2, 8, 8, 3), (2, 4, 8, 8, 3)])
def test_a_perfect_denoiser_is_recovered_exactly(shape):
    x0, x = normal(0, shape), normal(1, shape)

    @jax.jit
    def run():
        options = {"schedule": COSINE, "times": time_grid(3), "keys": keys(2)}
        return [sample(lambda x_t, logsnr: x0, x, step=step, **options) for step in STEPS]

    for out in run():
        np.testing.assert_array_equal(out, x0)


@pytest.mark.parametrize("step", [Ancestral(), DPMSolverPP2M(), Heun()])
def test_a_picture_is_the_same_in_any_batch(step):
    image_keys = keys(4)
    x = initial_noise(image_keys, (3,))
    out = draw(CORNERS, x, 8, step, image_keys=image_keys)
    order = jnp.array([2, 0, 3, 1])
    reordered = draw(CORNERS, x[order], 8, step, image_keys=image_keys[order])
    alone = draw(CORNERS, x[2:3], 8, step, image_keys=image_keys[2:3])
    np.testing.assert_allclose(reordered, out[order], atol=1e-5)
    np.testing.assert_allclose(alone[0], out[2], atol=1e-5)
    assert not np.any(np.isclose(out[0], out[1], atol=1e-3))


def test_noise_follows_the_key_of_the_image():
    out = draw(
        CORNERS, jnp.ones((4, 3)), 8, Ancestral(), image_keys=keys(2)[jnp.array([0, 1, 0, 1])]
    )
    np.testing.assert_allclose(out[:2], out[2:], atol=1e-6)
    assert not np.any(np.isclose(out[0], out[1], atol=1e-3))


@pytest.mark.parametrize("step", [DDIM(), DPMSolverPP2M(), Heun()])
def test_deterministic_steps_ignore_the_keys(step):
    x = normal(0, (4, 3))
    a = draw(CORNERS, x, 8, step, image_keys=keys(4, seed=1))
    b = draw(CORNERS, x, 8, step, image_keys=keys(4, seed=2))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", STEPS)
def test_eps_is_derived_again_from_the_thresholded_x0(step):
    # A denoiser far too bright, clipped to x0. The mean of every step must be what x0, and the eps
    # that with x0 makes x_t, are carried to; eps from before the clipping is far from that eps.
    x_t, far = normal(0, (200, 50)), 3 * normal(1, (200, 50))
    denoiser = thresholded(lambda x_t, logsnr: far, Threshold(kind="static"))
    x_s, x0_hat, _ = one_step(step, denoiser, x_t, -0.5, 0.5)
    x0 = np.clip(far, -1, 1)
    np.testing.assert_array_equal(x0_hat, x0)

    alpha_t, sigma_t = np.sqrt(1 / (1 + np.exp(0.5))), np.sqrt(1 / (1 + np.exp(-0.5)))
    alpha_s, sigma_s = sigma_t, alpha_t
    noisy = isinstance(step, Ancestral | DPMSolverPP2MSDE)
    kept = np.exp(-1.0) if noisy else 1.0  # the rest of sigma_s is noise
    eps, stale = (x_t - alpha_t * x0) / sigma_t, (x_t - alpha_t * far) / sigma_t
    error, stale_error = (
        np.mean((x_s - alpha_s * x0 - sigma_s * np.sqrt(kept) * e) * (eps - stale))
        for e in (eps, stale)
    )
    assert abs(error) < 0.02 and abs(stale_error) > 0.5, (error, stale_error)
    if kept == 1.0:
        np.testing.assert_allclose(x_s, alpha_s * x0 + sigma_s * eps, atol=1e-5)


@pytest.mark.parametrize("step", [DPMSolverPP2M(), Heun()])
def test_thresholded_guidance_ends_in_range(step):
    denoiser = thresholded(lambda x, _: guide(jnp.sin(3 * x), jnp.cos(x), 8.0), Threshold())
    out = draw(denoiser, normal(0, (2, 4, 4, 3)), 8, step)
    assert float(jnp.max(jnp.abs(out))) == 1.0


def test_sampling_traces_the_denoiser_once_and_compiles_once():
    traces = []

    def denoiser(x_t, logsnr):
        traces.append(x_t.shape)
        return 0.5 * x_t

    @jax.jit
    def run(x, times, image_keys):
        return sample(denoiser, x, schedule=COSINE, times=times, step=DDIM(), keys=image_keys)

    for seed, start in [(0, 1.0), (1, 1.0), (2, 0.5)]:
        image_keys = keys(2, seed)
        run(initial_noise(image_keys, (4,)), time_grid(50, start), image_keys)
    assert len(traces) == 1
    assert run._cache_size() == 1


# Orders of convergence, on the exact solution of the probability flow.


@pytest.mark.parametrize(
    "step, schedule, ns, order",
    [
        (DDIM(), COSINE, [16, 32, 64], 1),
        (Heun(), COSINE, [16, 32, 64], 2),
        (Heun(slope="noise"), Straight(), [64, 128, 256], 2),
        (DPMSolverPP2M(), Straight(), [64, 128, 256], 2),
    ],
)
def test_order_of_convergence(step, schedule, ns, order):
    gaussian, x = Gaussian(scale=0.5), normal(0, (4, 5))
    exact = gaussian.flow(x, float(schedule.logsnr(jnp.float32(1))), 100.0)
    outs = [draw(gaussian, x, n, step, schedule=schedule) for n in ns]
    errors = [np.sqrt(np.mean((out - exact) ** 2)) for out in outs]
    assert abs(slope(errors, ns) - order) < 0.15, errors


def test_order_of_convergence_where_noise_is_added(monkeypatch):
    """In the drift: x0_hat depends on the level alone, and the noise that is added is 0."""
    monkeypatch.setattr(samplers, "_normal", lambda keys, shape: jnp.zeros((len(keys), *shape)))

    def denoiser(x, logsnr):  # at the last level shows x itself, which `sample` then returns
        return jnp.where(logsnr[:, None] > 11.59, x, jnp.sin(logsnr / 4)[:, None])

    @functools.partial(jax.jit, static_argnums=0)
    def run(step, times):
        options = {"schedule": Straight(), "keys": keys(1), "times": times}
        return sample(denoiser, jnp.ones((1, 1)), step=step, **options)[0, 0]

    def end(step, n):
        return float(run(step, jnp.append(jnp.linspace(1.0, 0.3, n + 1), 0.0)))

    first, second = Ancestral(gamma=0.0), DPMSolverPP2MSDE()
    exact, ns = end(second, 1024), [32, 64, 128]
    for step, order in [(first, 1), (second, 2)]:
        errors = [abs(end(step, n) - exact) for n in ns]
        assert abs(slope(errors, ns) - order) < 0.25, errors


@pytest.mark.parametrize("step", [DPMSolverPP2M(), Heun()])
def test_second_order_beats_first_at_equal_steps(step):
    mixture = Mixture(
        means=np.array([[-1.0, 0.2], [0.3, -0.8], [1.0, 1.0]]),
        weights=np.array([0.2, 0.5, 0.3]),
        scale=0.2,
    )
    x = normal(0, (64, 2))
    exact = draw(mixture, x, 1000, DDIM())
    error, first = (np.mean(np.abs(draw(mixture, x, 24, s) - exact)) for s in (step, DDIM()))
    assert error < first / 2


def test_2m_is_the_published_formula_in_half_log_snr():
    b, previous = 2, normal(0, (2, 6))
    x_t, x0 = normal(1, (2, 6)), normal(2, (2, 6))
    l_prev, l_t, l_s = -2.0, -0.5, 0.4
    memory = (previous, jnp.full(b, l_prev))
    x_s, _, kept = one_step(DPMSolverPP2M(), lambda x, l: x0, x_t, l_t, l_s, memory)

    h, r = (l_s - l_t) / 2, (l_t - l_prev) / (l_s - l_t)
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
    sigma_t, sigma_s = 1 / np.sqrt(1 + np.exp(l_t)), 1 / np.sqrt(1 + np.exp(l_s))
    alpha_s = 1 / np.sqrt(1 + np.exp(-l_s))
    expected = sigma_s / sigma_t * x_t - alpha_s * (np.exp(-h) - 1) * d
    np.testing.assert_allclose(x_s, expected, atol=1e-5)
    np.testing.assert_array_equal(kept[0], x0)
    np.testing.assert_array_equal(kept[1], jnp.full(b, l_t))


def test_2m_starts_with_a_step_of_ddim():
    x_t, gaussian = normal(0, (2, 6)), Gaussian(scale=0.5)
    a, _, _ = one_step(DPMSolverPP2M(), gaussian, x_t, -2.0, 0.5)
    b, _, _ = one_step(DDIM(), gaussian, x_t, -2.0, 0.5)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_heun_agrees_with_the_edm_rule_for_short_steps():
    x_t, gaussian, l_t, l_s = normal(0, (2, 6)), Gaussian(scale=0.5), 0.0, 0.02
    x_s, _, _ = one_step(Heun(), gaussian, x_t, l_t, l_s)
    ddim, _, _ = one_step(DDIM(), gaussian, x_t, l_t, l_s)
    # Karras et al. 2022, algorithm 1, in x / alpha and sigma / alpha.
    alpha_t, alpha_s = (1 / np.sqrt(1 + np.exp(-l)) for l in (l_t, l_s))
    noise_t, noise_s = np.exp(-l_t / 2), np.exp(-l_s / 2)
    x = np.asarray(x_t, np.float64) / alpha_t
    d = (x - gaussian(x_t, jnp.full(2, l_t))) / noise_t
    euler = x + (noise_s - noise_t) * d
    d_end = (euler - gaussian(jnp.float32(alpha_s * euler), jnp.full(2, l_s))) / noise_s
    edm = alpha_s * (x + (noise_s - noise_t) * (d + d_end) / 2)
    assert np.max(np.abs(x_s - edm)) < 0.05 * np.max(np.abs(ddim - edm))


@pytest.mark.parametrize("step, calls", [(DDIM(), 6), (DPMSolverPP2M(), 6), (Heun(), 11)])
def test_number_of_evaluations_in_six_steps(step, calls):
    seen = []

    def denoiser(x_t, logsnr):
        jax.debug.callback(lambda l: seen.append(float(l)), logsnr[0])
        return 0.5 * x_t

    draw(denoiser, normal(0, (2, 4)), 6, step).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == calls


# Noise.


@pytest.mark.parametrize(
    "step", [Ancestral(gamma=0.0), Ancestral(gamma=1.0), DPMSolverPP2MSDE(), Heun(churn=0.2)]
)
def test_sampling_with_noise_has_the_moments_of_the_data(step):
    mixture = Mixture(
        means=np.array([[-1.0, 0.5], [1.0, 0.0]]), weights=np.array([0.35, 0.65]), scale=0.25
    )
    n = 4096
    out = np.asarray(draw(mixture, initial_noise(keys(n, 7), (2,)), 256, step))
    mean = mixture.weights @ mixture.means
    centred = mixture.means - mean
    variance = mixture.weights @ centred**2 + 0.25**2
    fourth = mixture.weights @ (centred**4 + 6 * centred**2 * 0.25**2 + 3 * 0.25**4)
    error_mean = np.abs(out.mean(axis=0) - mean) / np.sqrt(variance / n)
    error_variance = np.abs(out.var(axis=0) - variance) / np.sqrt((fourth - variance**2) / n)
    assert np.all(error_mean < 3) and np.all(error_variance < 3), (error_mean, error_variance)


@pytest.mark.parametrize(
    "step, share",
    [
        (DDIM(eta=1.0), 0.0),
        (Ancestral(gamma=0.0), 0.0),
        (Ancestral(gamma=0.3), 0.3),
        (Ancestral(gamma=1.0), 1.0),
    ],
)
def test_one_step_has_the_mean_and_variance_of_ddpm(step, share):
    # Ho et al. 2020, equations 6 and 7, with beta = 1 - abar_t / abar_s.
    l_t, l_s = -1.0, 0.3
    abar_t, abar_s = 1 / (1 + np.exp(-l_t)), 1 / (1 + np.exp(-l_s))
    beta = 1 - abar_t / abar_s
    posterior = (1 - abar_s) / (1 - abar_t) * beta
    mean = (
        np.sqrt(abar_s) * beta / (1 - abar_t) * 0.7
        + np.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t) * -0.4
    )
    x_t = jnp.full((200, 200), -0.4)
    x_s, _, _ = one_step(step, point, x_t, l_t, l_s)
    variance = posterior ** (1 - share) * beta**share
    assert abs(np.mean(x_s) - mean) < 3 * np.sqrt(variance / x_s.size)
    assert abs(np.var(x_s) - variance) < 3 * variance * np.sqrt(2 / x_s.size)


def test_churn_goes_back_up_to_the_level_it_announces():
    """Data of unit variance has unit variance at every level, hence also x_t after churn."""
    x_t, seen = normal(0, (300, 200)), []

    def denoiser(x, logsnr):
        seen.append((x, logsnr))
        return x

    leg = Leg(jnp.full(300, -1.0), jnp.full(300, 0.5), jnp.array(True), keys(300))
    Heun(churn=0.4, churn_noise=1.0)(denoiser, x_t, leg, ())
    x_hat, logsnr = seen[0]
    np.testing.assert_allclose(logsnr, -1.0 - 2 * np.log(1.4), rtol=1e-5)
    assert abs(np.var(x_hat) - 1) < 0.02
    moved = np.corrcoef(np.ravel(x_hat), np.ravel(x_t))[0, 1]
    alphas = np.sqrt((1 + np.exp(1.0)) / (1 + 1.4**2 * np.exp(1.0)))
    assert abs(moved - alphas) < 0.02
    # Outside its interval there is none.
    seen.clear()
    Heun(churn=0.4, churn_within=(0.01, 1.0))(denoiser, x_t, leg, ())
    np.testing.assert_allclose(seen[0][0], x_t, atol=1e-6)


def test_learned_variance_is_each_coordinates_own():
    """A gamma of 0, .3 and 1 in thirds of the coordinates gives each the variance of Ancestral."""
    gammas = [0.0, 0.3, 1.0]
    columns = jnp.repeat(jnp.array(gammas), 100)

    def estimate(x_t, logsnr):
        x0_hat = point(x_t, logsnr)
        return Estimate(x0_hat, x0_hat, jnp.broadcast_to(columns, x_t.shape))

    denoiser = Detailed(estimate)
    # Its x0_hat is changed on the way, as guidance and thresholds do; the variance is not.
    denoiser = changed(denoiser, lambda x0, x_t, l: guide(x0, point(x_t, l), 3.0))
    denoiser = thresholded(denoiser, Threshold(kind="static"))
    x_t = jnp.full((50, 300), -0.4)
    learned, _, _ = one_step(Ancestral(gamma="learned"), denoiser, x_t, -1.0, 0.3)
    for i, gamma in enumerate(gammas):
        third = slice(100 * i, 100 * i + 100)
        fixed, _, _ = one_step(Ancestral(gamma=gamma), point, x_t, -1.0, 0.3)
        np.testing.assert_allclose(learned[:, third], fixed[:, third], atol=1e-6)


def test_a_denoiser_with_variance_is_any_samplers_denoiser():
    plain, x = Gaussian(scale=0.5), normal(0, (2, 3))
    extra = Detailed(lambda x, l: Estimate(*[plain(x, l)] * 2, x))
    np.testing.assert_array_equal(draw(extra, x, 4, DDIM()), draw(plain, x, 4, DDIM()))
    with pytest.raises(ValueError, match="needs a variance; the denoiser has none"):
        one_step(Ancestral(gamma="learned"), plain, x, -1.0, 0.3)


def test_ddim_draws_eta_squared_of_the_posterior_variance():
    x_t = jnp.full((200, 200), -0.4)
    half, full = (np.var(one_step(DDIM(eta=eta), point, x_t, -1.0, 0.3)[0]) for eta in (0.5, 1.0))
    np.testing.assert_allclose(half, full / 4, rtol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginal_for_any_eta(eta):
    l_t, l_s = -1.0, 0.3
    x_t = corrupt(jnp.full((200, 200), 0.7), normal(0, (200, 200)), jnp.full(200, l_t))
    x_s, _, _ = one_step(DDIM(eta=eta), point, x_t, l_t, l_s)
    alpha_s, sigma_s = 1 / np.sqrt(1 + np.exp(-l_s)), 1 / np.sqrt(1 + np.exp(l_s))
    assert abs(np.mean(x_s) - 0.7 * alpha_s) < 3 * sigma_s / np.sqrt(x_s.size)
    assert abs(np.var(x_s) / sigma_s**2 - 1) < 3 * np.sqrt(2 / x_s.size)


def test_noise_of_different_steps_and_images_is_independent():
    # Where x0_hat is x_t, the path shows what the hook left there: noise of its own keys in one
    # half, and in the other what the step had made of the first half, which is half noise itself.
    d = 5000

    def hook(x, logsnr, hook_keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(hook_keys)
        return jnp.concatenate([noise[:, :d], x[:, :d]], axis=1)

    image_keys = keys(2)
    x = initial_noise(image_keys, (2 * d,))
    last, path = path_of(
        lambda x, _: x,
        x,
        schedule=COSINE,
        times=time_grid(3),
        step=Ancestral(),
        keys=image_keys,
        after_step=hook,
    )
    np.testing.assert_array_equal(path[0], x)
    noise = np.concatenate([*np.asarray(path[..., :d]), np.asarray(last[:, :d])])
    assert np.max(np.abs(np.corrcoef(noise) - np.eye(8))) < 0.06
    for image in path[1]:
        assert abs(np.corrcoef(image[:d], image[d:])[0, 1]) < 0.06


def test_a_step_has_the_keys_that_pictures_of_its_seed_were_always_drawn_with():
    def noise(image_keys):
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(image_keys)

    class Noise(Step):
        def __call__(self, denoiser, x_t, leg, memory):
            return noise(leg.keys), noise(leg.keys), memory

    (key,), run = keys(1), begun(normal(0, (1, 3)), Noise())
    options = {"schedule": COSINE, "times": time_grid(3), "step": Noise(), "keys": keys(1)}
    for i in range(3):
        own, after = jax.random.split(jax.random.fold_in(key, i + 1))
        found = walk(CORNERS, run, (i, i + 1), **options, after_step=lambda x, _, k: x - noise(k))
        np.testing.assert_allclose(found.x, noise(own[None]) - noise(after[None]), atol=1e-6)


def test_initial_noise_is_standard_normal_and_each_images_own():
    image_keys = keys(50)
    x = np.asarray(initial_noise(image_keys, (8, 8, 3)))
    assert x.shape == (50, 8, 8, 3)
    assert abs(x.mean()) < 3 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 3 * np.sqrt(2 / x.size)
    np.testing.assert_array_equal(initial_noise(image_keys[7:8], (8, 8, 3))[0], x[7])


# Guidance.


def test_guidance_sharpens_the_class_monotonically():
    # Two classes on a line, each of two overlapping components; one guidance weight a row.
    means = np.array([[-1.5], [-0.3], [0.3], [1.5]])
    everything = Mixture(means=means, weights=np.ones(4) / 4, scale=0.5)
    positive = Mixture(means=means[2:], weights=np.ones(2) / 2, scale=0.5)
    x = initial_noise(keys(2000), (1,))
    w = jnp.repeat(jnp.array([1.0, 1.5, 2.5, 4.0]), 2000)

    def guided(x_t, logsnr):
        return guide(positive(x_t, logsnr), everything(x_t, logsnr), w)

    out = draw(guided, jnp.tile(x, (4, 1)), 50, DDIM()).reshape(4, 2000)
    purity, shift = list(np.mean(out > 0, axis=1)), list(np.mean(out, axis=1))
    assert purity == sorted(purity) and shift == sorted(shift), (purity, shift)
    assert purity[0] < 0.9 and purity[-1] > 0.99
    assert abs(shift[0] - 0.9) < 0.1  # the mean of the class itself
    np.testing.assert_allclose(out[0], draw(positive, x, 50, DDIM())[:, 0], atol=1e-4)


# Beginnings, ends, hooks, the way back.


def path_of(denoiser, x, *, step, times, **options):
    """The sample, and what the denoiser thought x0 was at each step."""
    run, path = begun(x, step), []
    for i in range(len(times) - 1):
        run = walk(denoiser, run, (i, i + 1), step=step, times=times, **options)
        path.append(run.x0_hat)
    return run.x, np.stack(path)


def test_sampling_can_start_from_a_corrupted_image():
    gaussian, x = Gaussian(scale=0.5), normal(0, (2, 6))
    level = float(COSINE.logsnr(jnp.float32(0.4)))
    out = sample(gaussian, x, schedule=COSINE, times=time_grid(64, 0.4), step=Heun(), keys=keys(2))
    np.testing.assert_allclose(out, gaussian.flow(x, level, 100.0), atol=1e-3)


def test_path_holds_every_x0_hat_and_ends_in_the_sample():
    x, grid = normal(0, (4, 3)), time_grid(8)
    out, path = path_of(CORNERS, x, schedule=COSINE, times=grid, step=DDIM(), keys=keys(4))
    assert path.shape == (8, 4, 3)
    np.testing.assert_array_equal(path[-1], out)
    np.testing.assert_allclose(path[0], CORNERS(x, jnp.full(4, -20.0)), atol=1e-6)
    np.testing.assert_allclose(out, draw(CORNERS, x, 8, DDIM()), atol=1e-6)


def test_a_run_is_the_same_in_one_part_or_many_and_of_one_program():
    x, options = normal(0, (4, 3)), {"schedule": COSINE, "step": Heun(churn=0.1), "keys": keys(4)}

    @jax.jit
    def part(run, steps):
        return walk(CORNERS, run, steps, times=time_grid(8), **options)

    ends = []
    for cuts in ((0, 8), (0, 3, 8), range(9)):
        run = begun(x, options["step"])
        for steps in itertools.pairwise(cuts):
            run = part(run, steps)
        ends.append(run)
    for run in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, ends[0])
    assert part._cache_size() == 1
    np.testing.assert_allclose(run.x, draw(CORNERS, x, 8, options["step"]), atol=1e-5)


def test_after_step_runs_after_every_step_with_the_level_reached():
    # A denoiser that keeps what the hook writes: the number of the step, and its log-SNR.
    def write(x, logsnr, hook_keys):
        return jnp.stack([jnp.round(x[:, 0]) + 1, logsnr], axis=1)

    x, grid = jnp.zeros((2, 2)), time_grid(5)
    out, path = path_of(
        lambda x, _: x, x, schedule=COSINE, times=grid, step=DDIM(), keys=keys(2), after_step=write
    )
    np.testing.assert_allclose(path[1:, 0, 1], COSINE.logsnr(grid)[1:-1], atol=1e-5)
    np.testing.assert_allclose(out, [[5, 20], [5, 20]], atol=1e-5)


def test_after_step_can_hold_known_pixels():
    x, known = normal(0, (3, 6)), normal(1, (3, 6))

    def paste(x, logsnr, hook_keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(hook_keys)
        return jnp.where(jnp.arange(6) < 3, corrupt(known, noise, logsnr), x)

    out = draw(Gaussian(scale=0.5), x, 8, DDIM(), after_step=paste)
    free = draw(Gaussian(scale=0.5), x, 8, DDIM())
    np.testing.assert_allclose(out[:, :3], known[:, :3], atol=1e-3)
    np.testing.assert_allclose(out[:, 3:], free[:, 3:], atol=1e-5)


def test_inversion_follows_the_flow_and_sampling_brings_it_back():
    gaussian, x0 = Gaussian(scale=0.5), 0.5 * normal(0, (4, 5))
    exact = gaussian.flow(x0, 100.0, -20.0)
    ns, apart, lost = [16, 64], [], []
    for n in ns:
        x = jax.jit(lambda x0, times: invert_ddim(gaussian, x0, schedule=COSINE, times=times))(
            x0, time_grid(n)
        )
        apart.append(np.sqrt(np.mean((x - exact) ** 2)))
        lost.append(np.sqrt(np.mean((draw(gaussian, x, n, DDIM()) - x0) ** 2)))
    assert slope(apart, ns) > 0.85 and slope(lost, ns) > 0.85, (apart, lost)
    assert apart[-1] < 0.1 and lost[-1] < 0.02, (apart, lost)


def test_time_grid_runs_down_to_zero():
    np.testing.assert_allclose(time_grid(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(time_grid(2, 0.5), [0.5, 0.25, 0])


def test_mistakes_are_refused_by_name():
    with pytest.raises(ValueError, match="steps"):
        time_grid(0)
    with pytest.raises(ValueError, match="start"):
        time_grid(4, 1.5)
    run, options = begun(normal(0, (2, 3)), DDIM()), {"schedule": COSINE, "step": DDIM()}
    with pytest.raises(ValueError, match=r"keys must be one for each image, \[2\] .* shape \(3,\)"):
        walk(CORNERS, run, (0, 2), times=time_grid(2), keys=keys(3), **options)
    with pytest.raises(ValueError, match="gamma"):
        Ancestral(gamma=1.5)
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=-0.1)
    with pytest.raises(ValueError, match="Heun.churn must"):
        Heun(churn=0.5)
    with pytest.raises((ValueError, TypeError), match="slope"):
        Heun(slope="sigma")
    with pytest.raises(ValueError, match="Heun.churn_within"):
        Heun(churn_within=(2.0, 1.0))
