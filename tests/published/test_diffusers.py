"""Samplers and grids against diffusers' schedulers of the same name, step by step.

Recorded in fixtures/diffusers.npz, which is made again where diffusers is installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_diffusers as reference

from cascade.diffusion import grids, samplers
from cascade.diffusion.denoise import Threshold, WithVariance, thresholded
from cascade.diffusion.process import Discrete, alpha_sigma, to_x0
from cascade.published.schedulers import Respaced


@pytest.fixture(scope="module")
def recorded():
    return np.load(reference.FILE)


def denoiser(threshold):
    def estimate(x_t, logsnr):
        eps, variance = reference.network(x_t, logsnr[:, None], jnp)
        return to_x0(eps, "eps", x_t, logsnr), (variance + 1) / 2

    return thresholded(WithVariance(estimate), threshold)


def path(step, schedule, times, threshold, monkeypatch):
    """x after every step, the noise of each being the recorded run's."""
    logsnr = schedule.logsnr(times)
    n = len(times) - 1

    @jax.jit
    def once(x, memory, logsnr_t, logsnr_s, last, noise):
        monkeypatch.setattr(samplers, "_normal", lambda keys, shape: noise)
        per_image = [jnp.full(2, value) for value in (logsnr_t, logsnr_s)]
        leg = samplers.Leg(*per_image, last, jax.random.split(jax.random.key(0)))
        x_s, x0_hat, memory = step(denoiser(threshold), x, leg, memory)
        return jnp.where(last, x0_hat, x_s), memory

    x = jnp.asarray(reference.noise(0))
    memory, found = step.memory(x), []
    for i in range(n):
        noise = reference.noise(i + 1)
        x, memory = once(x, memory, logsnr[i], logsnr[i + 1], i == n - 1, noise)
        found.append(np.asarray(x))
    return np.stack(found)


LEADING, TRAILING = grids.OnTable(spacing="leading"), grids.OnTable(spacing="trailing")


@pytest.mark.parametrize(
    "name, step, grid, steps",
    [
        ("learned", samplers.Ancestral(gamma="learned"), Respaced(name="smart27"), 27),
        ("small", samplers.Ancestral(gamma=0.0), LEADING, 10),
        ("large", samplers.Ancestral(gamma=1.0), LEADING, 10),
        ("ddim", samplers.DDIM(), LEADING, 10),
        ("ddim_eta", samplers.DDIM(eta=0.7), LEADING, 10),
        ("dpm++", samplers.DPMSolverPP2M(), TRAILING, 10),
        ("dpm++_sde", samplers.DPMSolverPP2MSDE(), TRAILING, 10),
    ],
)
def test_sampler_takes_the_steps_of_diffusers(name, step, grid, steps, recorded, monkeypatch):
    schedule = Discrete(betas="cosine" if name == "learned" else "linear")
    threshold = Threshold(percentile=0.95, cap=1.5) if name == "learned" else Threshold(kind="none")
    got = path(step, schedule, grid(steps, schedule), threshold, monkeypatch)
    np.testing.assert_allclose(got, recorded[name], atol=2e-3)
    assert np.abs(got - recorded[name]).mean() < 1e-4


def test_heun_in_the_published_variable_takes_the_steps_of_diffusers(recorded, monkeypatch):
    """Its scheduler holds x / alpha, and counts prediction and correction as two steps."""
    schedule = Discrete(betas="linear")
    times = jnp.append((jnp.linspace(999, 0, 10) + 1) / 1000, 0.0)
    step = samplers.Heun(slope="noise")
    got = path(step, schedule, times, Threshold(kind="none"), monkeypatch)
    alpha = np.asarray(alpha_sigma(schedule.logsnr(times))[0])[1:, None, None]
    expected = recorded["heun"][1::2] * alpha[:-1]
    np.testing.assert_allclose(got[:-1], expected, atol=2e-3)
    np.testing.assert_allclose(got[-1], recorded["heun"][-1], atol=2e-3)


@pytest.mark.parametrize("name", reference.LISTS)
def test_named_lists_are_those_of_deepfloyd_if(name, recorded):
    grid = Respaced(name=name)
    np.testing.assert_array_equal(grid.entries, recorded[name])
    times = grid(grid.steps, Discrete())
    np.testing.assert_allclose(times, np.append((recorded[name] + 1.0) / 1000, 0), atol=1e-7)


@pytest.mark.parametrize("spacing, steps", reference.SPACINGS)
def test_spacings_on_a_table_are_those_of_diffusers(spacing, steps, recorded):
    times = grids.OnTable(spacing=spacing)(steps, Discrete())
    entries = recorded[f"{spacing}{steps}"]
    np.testing.assert_allclose(times, np.append((entries + 1.0) / 1000, 0), atol=1e-7)


def test_the_recording_is_what_diffusers_gives(recorded):
    pytest.importorskip("diffusers")
    live = reference.record()
    assert set(live) == set(recorded)
    for name, values in live.items():
        np.testing.assert_allclose(values, recorded[name], atol=1e-5, err_msg=name)
