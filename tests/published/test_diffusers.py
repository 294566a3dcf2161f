"""Samplers and grids against diffusers' schedulers of the same name, step by step.

Recorded in fixtures/diffusers.npz, which is made again where diffusers is installed.
"""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_diffusers as reference

from cascade.diffusion import grids, samplers
from cascade.diffusion.denoise import Detailed, Estimate, Threshold, thresholded
from cascade.diffusion.process import Discrete, alpha_sigma, to_x0
from cascade.errors import UserError
from cascade.published.schedulers import Respaced, read_schedule, read_scheduler


@pytest.fixture(scope="module")
def recorded():
    return np.load(reference.FILE)


def denoiser(threshold, kind="eps"):
    def estimate(x_t, logsnr):
        prediction, variance = reference.network(x_t, logsnr[:, None], jnp)
        x0_hat = to_x0(prediction, kind, x_t, logsnr)
        return Estimate(x0_hat, x0_hat, (variance + 1) / 2)

    return thresholded(Detailed(estimate), threshold)


def path(step, schedule, times, threshold, monkeypatch, kind="eps"):
    """x after every step, the noise of each being the recorded run's."""
    logsnr = schedule.logsnr(times)
    n = len(times) - 1

    @jax.jit
    def once(x, memory, logsnr_t, logsnr_s, last, noise):
        monkeypatch.setattr(samplers, "_normal", lambda keys, shape: noise)
        per_image = [jnp.full(2, value) for value in (logsnr_t, logsnr_s)]
        leg = samplers.Leg(*per_image, last, jax.random.split(jax.random.key(0)))
        x_s, x0_hat, memory = step(denoiser(threshold, kind), x, leg, memory)
        return jnp.where(last, x0_hat, x_s), memory

    x = jnp.asarray(reference.noise(0))
    memory, found = step.memory(x), []
    for i in range(n):
        noise = reference.noise(i + 1)
        x, memory = once(x, memory, logsnr[i], logsnr[i + 1], i == n - 1 and times[-1] == 0, noise)
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


def test_a_finished_picture_is_not_noised_as_diffusers_noises_it(recorded, monkeypatch):
    """With gamma 1, where the last step starts above the first entry of the table."""
    schedule = Discrete(betas="linear")
    times, free = TRAILING(7, schedule), Threshold(kind="none")
    got = path(samplers.Ancestral(gamma=1.0), schedule, times, free, monkeypatch)
    got[-1] += np.asarray(alpha_sigma(schedule.logsnr(times[-2]))[1]) * reference.noise(7)
    np.testing.assert_allclose(got, recorded["large_trailing"], atol=2e-3)


def test_heun_in_the_published_variable_takes_the_steps_of_diffusers(recorded, monkeypatch):
    """Its scheduler holds x / alpha, and counts prediction and correction as two steps."""
    schedule = Discrete(betas="linear")
    times = jnp.append((jnp.linspace(999, 0, 10) + 1) / 1000, 0.0)
    step, _ = samplers.BY_WORD["heun-noise"]
    assert step == samplers.Heun(slope="noise")
    got = path(step, schedule, times, Threshold(kind="none"), monkeypatch)
    alpha = np.asarray(alpha_sigma(schedule.logsnr(times))[0])[1:, None, None]
    expected = recorded["heun"][1::2] * alpha[:-1]
    np.testing.assert_allclose(got[:-1], expected, atol=2e-3)
    np.testing.assert_allclose(got[-1], recorded["heun"][-1], atol=2e-3)


def read(case, folder, monkeypatch):
    """(x after every step with the scheduler that the file asks for, the scheduler). case: as in
    reference.FILES."""
    kind, fields, steps, arguments = case
    file = folder / "scheduler_config.json"
    file.write_text(json.dumps(fields | {"_class_name": kind}))
    found = read_scheduler(file)
    step = found.sampler
    if "eta" in arguments:
        step = dataclasses.replace(step, eta=arguments["eta"])
    if arguments.get("use_clipped_model_output"):
        step = dataclasses.replace(step, eps="rederived")
    times = found.grid(steps, found.schedule)
    given = (step, found.schedule, times, found.threshold, monkeypatch, found.prediction)
    return path(*given), found


# What is warned of, of files with which diffusers takes other steps.
OTHERWISE = {
    "ddim_trailing_uneven": "steps that do not divide the table.*divides 20 gives the same",
    "ddpm_offset_learned": "adds noise to the finished picture",
}


@pytest.mark.parametrize("name", [name for name in reference.FILES if name not in OTHERWISE])
@pytest.mark.filterwarnings("ignore:.*that do not divide the table")
def test_a_scheduler_that_is_read_takes_the_steps_of_diffusers(
    name, recorded, tmp_path, monkeypatch
):
    got, _ = read(reference.FILES[name], tmp_path, monkeypatch)
    np.testing.assert_allclose(got, recorded[name], atol=2e-3)
    assert np.abs(got - recorded[name]).mean() < 1e-4


def test_ddim_that_is_told_to_rederives_eps_as_diffusers_can(recorded, tmp_path, monkeypatch):
    got, found = read(reference.FILES["ddim_rederived"], tmp_path, monkeypatch)
    assert found.sampler == samplers.BY_WORD["ddim-predicted"][0] == samplers.DDIM(eps="predicted")
    assert samplers.BY_WORD["ddim"][0] == samplers.DDIM(eps="rederived")
    apart = np.abs(got - recorded["ddim_clipped"]).max()
    assert apart > 0.5 > 1000 * np.abs(got - recorded["ddim_rederived"]).max()


@pytest.mark.parametrize("seed", range(16))
def test_any_file_that_is_not_warned_of_is_sampled_as_diffusers_samples_it(
    seed, tmp_path, monkeypatch
):
    pytest.importorskip("diffusers")
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    kind = ("DDIMScheduler", "DDPMScheduler")[seed % 2]
    fields = {
        "prediction_type": one_of("epsilon", "v_prediction", "sample"),
        "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
        "num_train_timesteps": (entries := one_of(100, 1000)),
        "timestep_spacing": (spacing := one_of("leading", "trailing")),
        "steps_offset": one_of(0, 1, 3),
        "clip_sample": one_of(True, False),
        "thresholding": one_of(True, False),
        "dynamic_thresholding_ratio": one_of(0.9, 0.995),
        "sample_max_value": one_of(1.0, 1.5),
    }
    arguments = {}
    if kind == "DDIMScheduler":
        fields["set_alpha_to_one"] = one_of(True, False)
        arguments["eta"] = one_of(0.0, 0.6)
    elif spacing == "leading" and not fields["steps_offset"]:
        fields["variance_type"] = one_of("fixed_small", "learned_range")
    even = kind == "DDIMScheduler" and spacing == "trailing"
    case = (kind, fields, one_of(5, 20) if even else one_of(7, 20, entries // 2 + 10), arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if even else "error")
        got, _ = read(case, tmp_path, monkeypatch)
    theirs = reference.walked(*case)
    np.testing.assert_allclose(got, theirs, atol=5e-3 * max(1, np.abs(theirs).max()))
    assert np.abs(got - theirs).mean() < 2e-4 * max(1, np.abs(theirs).mean())


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_file_with_which_diffusers_takes_other_steps_is_warned_of(
    name, recorded, tmp_path, monkeypatch
):
    with pytest.warns(UserWarning, match=OTHERWISE[name]):
        got, _ = read(reference.FILES[name], tmp_path, monkeypatch)
    apart = np.abs(got - recorded[name]).max((1, 2))
    if name == "ddpm_offset_learned":
        assert apart[:-1].max() < 2e-3 < 0.01 < apart[-1]  # in the finished picture alone
    else:
        assert apart.max() > 0.1
    # The table of a scheduler that nothing is sampled with says nothing of it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_schedule(tmp_path / "scheduler_config.json")


@pytest.mark.parametrize("name", reference.LISTS)
def test_named_lists_are_those_of_deepfloyd_if(name, recorded):
    grid = Respaced(name=name)
    np.testing.assert_array_equal(grid.entries, recorded[name])
    times = grid(grid.steps, Discrete())
    np.testing.assert_allclose(times, np.append((recorded[name] + 1.0) / 1000, 0), atol=1e-7)


@pytest.mark.parametrize("spacing, steps", reference.SPACINGS)
def test_spacings_on_a_table_are_those_of_diffusers(spacing, steps, recorded):
    times = grids.OnTable(spacing=spacing)(steps, Discrete())
    entries = recorded[f"{spacing}{steps}"][:steps]  # 61 steps are 62 there, by a rounding
    np.testing.assert_allclose(times, np.append((entries + 1.0) / 1000, 0), atol=1e-7)


def test_the_recording_is_what_diffusers_gives(recorded):
    pytest.importorskip("diffusers")
    live = reference.record()
    assert set(live) == set(recorded)
    for name, values in live.items():
        np.testing.assert_allclose(values, recorded[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("field", ["rescale_betas_zero_snr", "set_alpha_to_one"])
def test_a_field_that_would_draw_otherwise_is_refused_by_name(tmp_path, field):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", field: 1}))
    with pytest.raises(UserError, match=rf"scheduler_config.json: {field} must be"):
        read_scheduler(file)


def test_an_offset_is_of_leading_steps_alone(tmp_path):
    offsets = {}
    for spacing in ("leading", "trailing"):
        file = tmp_path / "scheduler_config.json"
        fields = {"timestep_spacing": spacing, "steps_offset": 3}
        file.write_text(json.dumps({"_class_name": "DDPMScheduler", **fields}))
        offsets[spacing] = read_scheduler(file).grid.offset
    assert offsets == {"leading": 3, "trailing": 0}
