import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade import config, images, testing
from cascade.diffusion import grids, process, samplers
from cascade.diffusion.denoise import Constant, Detailed, Oscillating, PerStep, Threshold
from cascade.diffusion.loss import LearnedVariance, Loss
from cascade.diffusion.samplers import DDIM, Ancestral
from cascade.models import AutoencoderConfig, Network, NetworkConfig
from cascade.models.layers import Linear
from cascade.models.signals import TimeEmbedding
from cascade.published.schedulers import Respaced
from cascade.stage import (
    Augmentation,
    Latents,
    LowRes,
    Pixels,
    Sampling,
    Stage,
    StageConfig,
    Text,
    TextInput,
    time_of,
)

ENCODER = testing.FakeEncoder()
NONE = Threshold(kind="none")
TEXT = Text(width=8, head_width=8)
AUTOENCODER = AutoencoderConfig(widths=(8, 8), blocks=1, latent_channels=2, groups=4, scaling=0.5)
ZERO_TERMINAL = process.ZeroTerminal(schedule=process.Sigmoid(tau=0.7))


class OtherText(Text):
    name = "other"


def batch_of(n, side=8, lowres=None, seed=0):
    rng = np.random.default_rng(seed)
    text = ENCODER([f"word{i} thing" for i in range(n)])
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)),
        "text": text.values,
        "text_mask": text.mask,
    }
    if lowres:
        batch["lowres"] = jnp.asarray(rng.integers(0, 256, (n, lowres, lowres, 3), dtype=np.uint8))
    return batch


def texts(n):
    batch = batch_of(n)
    return {"text": TextInput(batch["text"], batch["text_mask"])}


def null(stage, values):
    return {c.name: c.null(values[c.name]) for c in stage.config.conditions}


def untrained(stage):
    return jax.jit(stage.init)(jax.random.key(0, impl="rbg"))


def x0_of(stage, params, values, x, logsnr, **options):
    options = {"threshold": NONE} | options
    return jax.jit(lambda x, logsnr: stage.denoiser(params, values, **options)(x, logsnr))(
        x, logsnr
    )


def changed(config, name, **fields):
    """The stage with other fields of the condition of that name."""
    conditions = tuple(
        dataclasses.replace(c, **fields) if c.name == name else c for c in config.conditions
    )
    return dataclasses.replace(config, conditions=conditions)


def watch(monkeypatch, stage, answer=None):
    """What the stage's conditions make of what they are given, by their names, and what signals
    its network gets, noted when they are asked; the network answers zeros, or what it is told to.
    """
    seen = {}
    for name, module in stage.conditions.items():

        def watched(params, *value, name=name, module=module):
            seen[name] = value
            return module(params, *value)

        monkeypatch.setitem(stage.conditions, name, watched)

    def network(params, x, time, signals, key=None):
        seen["signals"] = signals
        return jnp.zeros_like(x) if answer is None else answer(seen)

    monkeypatch.setattr(stage, "network", network)
    return seen


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def test_network_time_runs_from_0_clean_to_1000_noise_and_is_linear_in_cosine_time():
    t = jnp.linspace(0, 1, 11)
    assert np.allclose(time_of(process.Cosine().logsnr(t)), 1000 * t, atol=0.1)


def test_an_untrained_v_network_has_the_loss_of_predicting_zero():
    """The output is zero at the start, so the loss is the mean of v^2 = alpha^2 + sigma^2 x0^2."""
    stage = Stage(testing.smallest_stage())
    batch = batch_of(64) | {"image": jnp.full((64, 8, 8, 3), 255, jnp.uint8)}
    value, metrics = jax.jit(stage.loss)(untrained(stage), batch, jax.random.key(1))
    # x0 = 1 everywhere: alpha^2 + sigma^2 = 1 on average, up to the noise of 64 * 192 draws
    assert abs(float(value) - 1) < 0.05
    assert set(metrics) >= {"loss", "x0_mse"}


def test_condition_dropout_replaces_the_text_of_its_share_of_examples():
    config = changed(testing.base_stage(), "text", dropout=0.0)
    never, always = Stage(config), Stage(changed(config, "text", dropout=0.999999))
    params = testing.lively(never)
    batch, key = batch_of(8), jax.random.key(1)
    blank = batch | {"text": jnp.zeros_like(batch["text"]), "text_mask": batch["text_mask"] & False}
    loss = jax.jit(lambda stage, b: stage.loss(params, b, key)[0], static_argnums=0)
    assert loss(always, batch) == loss(never, blank)
    assert loss(never, batch) != loss(never, blank)


def test_augmentation_noise_reaches_the_network_and_so_does_its_level(monkeypatch):
    """What the network is handed as lowres has the variance that its level announces."""
    stage = Stage(testing.super_resolution_stage())
    params, seen = testing.lively(stage), watch(monkeypatch, stage)
    n = 256
    batch = batch_of(n, 16, 8) | {"lowres": jnp.full((n, 8, 8, 3), 255, jnp.uint8)}
    stage.loss(params, batch, jax.random.key(0))
    picture, logsnr = seen["lowres"]
    level = np.asarray(time_of(logsnr)) / 1000
    assert level.min() < 0.02 and level.max() > 0.98 and abs(level.mean() - 0.5) < 0.06
    # on the cosine schedule alpha = cos(pi level / 2) and sigma = sin(pi level / 2)
    mean = np.asarray(picture).mean((1, 2, 3))
    assert np.corrcoef(mean, np.cos(np.pi * level / 2))[0, 1] > 0.95
    spread = np.asarray(picture).std((1, 2, 3))
    assert np.corrcoef(spread, np.sin(np.pi * level / 2))[0, 1] > 0.95
    # The network gets that picture, and that level as a time of its own.
    (channels,), (vector, _) = seen["signals"].channels, seen["signals"].vectors
    np.testing.assert_array_equal(channels, picture)
    network, embed = stage.config.network, params["conditions"]["lowres"]["time"]
    np.testing.assert_allclose(
        vector,
        Network(OwnTime(network.time_width, network.embedding_width))(embed, time_of(logsnr)),
        atol=1e-3,
    )


@dataclasses.dataclass(frozen=True)
class OwnTime:
    """An embedding of a time, as a network of its own."""

    width: int
    emb_width: int

    def build(self, rngs):
        return TimeEmbedding(self.width, self.emb_width, rngs)


def test_without_augmentation_the_network_sees_the_upsampled_picture_itself(monkeypatch):
    config = testing.super_resolution_stage()
    stage = Stage(changed(config, "lowres", augmentation=Augmentation(max_level=0.0)))
    params, batch = testing.lively(stage), batch_of(4, 16, 8)
    seen = watch(monkeypatch, stage)
    stage.loss(params, batch, jax.random.key(0))
    clean = images.upsample(images.to_float(batch["lowres"]), (16, 16))
    assert np.allclose(
        seen["signals"].channels[0], clean, atol=5e-4
    )  # the schedule's clean end: sigma 5e-5


def test_noise_after_upsampling_is_independent_from_pixel_to_pixel(monkeypatch):
    """And noise before it is not: neighbours of an upsampled picture share theirs."""
    config = testing.super_resolution_stage()
    batch = batch_of(128, 16, 8) | {"lowres": jnp.full((128, 8, 8, 3), 255, jnp.uint8)}
    shared = {}
    for upsampled in (False, True):
        augmentation = Augmentation(after_upsampling=upsampled)
        stage = Stage(changed(config, "lowres", augmentation=augmentation))
        params = testing.lively(stage)
        seen = watch(monkeypatch, stage)
        stage.loss(params, batch, jax.random.key(0))
        picture, logsnr = seen["lowres"]
        level = np.asarray(time_of(logsnr))[:, None, None, None] / 1000
        noise = np.asarray(picture) - np.cos(np.pi * level / 2)
        noise /= np.sin(np.pi * level / 2)
        shared[upsampled] = np.mean(noise[:, :, 1:] * noise[:, :, :-1]) / np.mean(noise**2)
        if upsampled:
            # the deviation at each pixel is what the level says, example by example
            np.testing.assert_allclose(noise.std((1, 2, 3)), 1, atol=0.12)
    assert shared[False] > 0.5 and abs(shared[True]) < 0.02, shared


def residual_stage():
    """Residual prediction is for x0."""
    config, conditions = testing.super_resolution_stage(), []
    for condition in config.conditions:
        residual = {"residual": True} if condition.name == "lowres" else {}
        conditions.append(dataclasses.replace(condition, **residual))
    return dataclasses.replace(config, prediction="x0", conditions=tuple(conditions))


def test_an_untrained_residual_stage_draws_the_enlargement_itself():
    config = residual_stage()
    stage, low = Stage(config), images.to_float(batch_of(2, 16, 8)["lowres"])
    settings = dataclasses.replace(config.sampling, threshold=NONE, aug_level=0.0)
    given = texts(2) | {"lowres": (low,)}
    drawn = stage.sample(untrained(stage), given, keys(0, 1), settings=settings)
    assert np.allclose(drawn, images.upsample(low, (16, 16)), atol=1e-3)


def test_a_residual_network_is_told_to_add_what_the_enlargement_lacks(monkeypatch):
    """The loss vanishes for the network that returns x0 minus alpha times the noisy enlargement."""
    stage, batch = Stage(residual_stage()), batch_of(4, 16, 8)
    params = testing.lively(stage)

    def oracle(seen):
        picture, logsnr = seen["lowres"]
        alpha = np.cos(np.pi / 2 * np.asarray(time_of(logsnr)) / 1000)[:, None, None, None]
        return images.to_float(batch["image"]) - alpha * picture

    watch(monkeypatch, stage, oracle)
    assert stage.loss(params, batch, jax.random.key(0))[0] < 1e-9


def test_guidance_in_one_pass_equals_two_passes():
    stage = Stage(testing.base_stage())
    params = testing.lively(stage)
    values, x = texts(3), jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    logsnr = jnp.array([-2.0, 0.0, 3.0])
    conditional = x0_of(stage, params, values, x, logsnr)
    unconditional = x0_of(stage, params, null(stage, values), x, logsnr)
    both = x0_of(stage, params, values, x, logsnr, guidance=jnp.float32(5.0))
    assert np.allclose(both, unconditional + 5 * (conditional - unconditional), atol=2e-4)
    assert not np.allclose(conditional, unconditional, atol=1e-3)
    # a weight for every level, and the contrast of the conditional prediction, v here
    planned = x0_of(
        stage, params, values, x, logsnr, guidance=lambda l: jnp.where(l > 2, 5.0, 1.0), rescale=1.0
    )
    np.testing.assert_allclose(planned[:2], conditional[:2], atol=2e-4)
    deviation = [process.from_x0(x0, "v", x, logsnr)[2].std() for x0 in (planned, conditional)]
    np.testing.assert_allclose(*deviation, rtol=1e-3)
    assert not np.allclose(planned[2], both[2], atol=1e-3)


def test_negative_text_replaces_the_null_condition():
    stage = Stage(testing.base_stage())
    params = testing.lively(stage)
    values, x = texts(2), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    logsnr = jnp.zeros(2)
    # away from itself, at any weight, is no guidance at all
    same = x0_of(stage, params, values, x, logsnr, guidance=9.0, negative=values)
    assert np.allclose(same, x0_of(stage, params, values, x, logsnr), atol=1e-3)


def test_thresholding_comes_after_guidance():
    stage = Stage(testing.base_stage())
    params = testing.lively(stage)
    values, x = texts(2), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    static = Threshold(kind="static")
    got = x0_of(stage, params, values, x, jnp.zeros(2), guidance=50.0, threshold=static)
    assert float(jnp.abs(got).max()) == 1.0


def test_the_second_half_of_a_learned_variance_networks_channels_is_its_gamma():
    """From the conditional half under guidance, and untouched by thresholds."""
    config = testing.base_stage()
    stage = Stage(
        dataclasses.replace(
            config,
            network=dataclasses.replace(config.network, out_channels=6),
            variance=LearnedVariance(),
            sampling=dataclasses.replace(config.sampling, sampler=Ancestral(gamma="learned")),
        )
    )
    params, values = testing.lively(stage), texts(2)
    x, logsnr = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([-1.0, 2.0])

    @jax.jit
    def run(x):
        static = Threshold(kind="static")
        denoiser = stage.denoiser(params, values, guidance=jnp.float32(7.0), threshold=static)
        assert isinstance(denoiser, Detailed)
        told = [
            stage.conditions["text"](params["conditions"]["text"], *v["text"])
            for v in (values, null(stage, values))
        ]
        both = [stage.network(params["network"], x, time_of(logsnr), signals) for signals in told]
        return denoiser.estimate(x, logsnr), both

    (x0, free, gamma), (output, unguided) = run(x)
    prediction = 7 * output[..., :3] - 6 * unguided[..., :3]
    expected = jnp.clip(process.to_x0(prediction, "v", x, logsnr), -1, 1)
    np.testing.assert_allclose(x0, expected, atol=1e-3)
    np.testing.assert_allclose(free, process.to_x0(prediction, "v", x, logsnr), atol=1e-3)
    assert np.abs(free).max() > 1.5  # the threshold did something
    np.testing.assert_allclose(gamma, (output[..., 3:] + 1) / 2, atol=1e-5)
    assert not np.allclose(output[..., 3:], unguided[..., 3:], atol=1e-2)
    assert "vb" in jax.eval_shape(stage.loss, params, batch_of(4), jax.random.key(0))[1]
    settings = stage.config.sampling
    # Other samplers leave the variance alone.
    for chosen in (settings, dataclasses.replace(settings, sampler=DDIM())):
        drawn = jax.eval_shape(
            lambda chosen=chosen: stage.sample(params, values, keys(1, 2), settings=chosen)
        )
        assert drawn.shape == (2, 8, 8, 3)


def test_sampling_visits_the_times_of_its_grid(monkeypatch):
    stage, seen = Stage(testing.smallest_stage()), []
    params = testing.lively(stage)

    def spy(params, x, time, signals, key=None):
        jax.debug.callback(lambda t: seen.append(float(t)), time[0])
        return jnp.zeros_like(x)

    monkeypatch.setattr(Stage, "__init__", lambda self, config: vars(self).update(vars(stage)))
    monkeypatch.setattr(stage, "network", spy)
    settings = Sampling(steps=27, grid=Respaced(name="smart27"), guidance=1.0, sampler=Ancestral())
    with jax.disable_jit():  # as what is compiled with the spy would stay for other tests
        jax.block_until_ready(stage.sample(params, texts(1), keys(0), settings=settings))
    jax.effects_barrier()
    expected = np.array(Respaced(name="smart27").entries) + 1
    np.testing.assert_allclose(sorted(seen, reverse=True), expected, atol=0.1)


def test_a_picture_depends_on_its_own_key_and_row_alone():
    config = testing.super_resolution_stage()
    stage = Stage(config)
    params = testing.lively(stage)
    low = jax.random.uniform(jax.random.key(3), (3, 8, 8, 3), minval=-1)
    given = texts(3) | {"lowres": (low,)}
    all3 = stage.sample(params, given, keys(5, 6, 7), settings=config.sampling)
    order = np.array([2, 0, 1])
    turned = stage.sample(
        params,
        jax.tree.map(lambda a: a[order], given),
        keys(7, 5, 6),
        settings=config.sampling,
    )
    assert np.allclose(all3[order], turned, atol=1e-5)
    assert not np.allclose(all3[0], all3[1], atol=1e-2)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"space": Pixels(resolution=12)},
            "LowRes.resolution must divide the stage's 12 px, got 8",
        ),
        (
            {"space": Pixels(resolution=15), "conditions": (TEXT,)},
            r"stage sr16 of 15 px: image sides must be multiples of 2 .* got 15x15",
        ),
        ({"conditions": (LowRes(resolution=0),)}, "LowRes.resolution must divide"),
        ({"conditions": (LowRes(resolution=8),)}, "text_attention needs tokens"),
        ({"conditions": (TEXT, TEXT)}, "StageConfig.conditions must have one text, got 2"),
        (
            {"conditions": (TEXT, OtherText(width=9, head_width=8))},
            r"tokens of one width, got \[8, 9\]",
        ),
        (
            {"conditions": (Text(width=8, head_width=5),)},
            "Text.head_width=5 .* must divide the network's embedding_width, 32",
        ),
        (
            {"space": Latents(resolution=16, autoencoder=AUTOENCODER)},
            "network.in_channels must be the 2 channels of Latents, got 3",
        ),
        ({"prediction": "eps", "schedule": ZERO_TERMINAL}, "says nothing of x0"),
        (
            {"prediction": "v", "conditions": (LowRes(resolution=8, residual=True), TEXT)},
            'LowRes.residual is for prediction="x0"',
        ),
        ({"variance": LearnedVariance()}, "out_channels must be 6 with learned variance, got 3"),
        (
            {"sampling": Sampling(sampler=Ancestral(gamma="learned"))},
            "needs a network that has learned the variance",
        ),
        (
            {"schedule": ZERO_TERMINAL, "sampling": Sampling(grid=grids.Karras())},
            "begins short of t=1",
        ),
    ],
)
def test_contradicting_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(testing.super_resolution_stage(), **change)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"guidance_rescale": 2.0}, "Sampling.guidance_rescale must be in"),
        (
            {"guidance_plan": PerStep(factors=(1.0,))},
            "Sampling.PerStep.factors must be as many as the steps, 32, got 1",
        ),
        ({"grid": Respaced(name="smart50")}, "Sampling.steps must be 50"),
    ],
)
def test_contradicting_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Text(width=8, dropout=1.0), r"Text.dropout must be in \[0, 1\), got 1.0"),
        (lambda: Text(width=0), "Text.width must be at least 1, got 0"),
        (lambda: Augmentation(max_level=1.5), r"Augmentation.max_level must be in \[0, 1\]"),
        (lambda: Pixels(resolution=0), "Pixels.resolution must be at least 1, got 0"),
        (
            lambda: Latents(resolution=9, autoencoder=AUTOENCODER),
            "Latents.resolution must be a multiple of 2, .* got 9",
        ),
    ],
)
def test_contradicting_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stage_with_a_schedule_in_a_schedule_survives_json():
    stage = dataclasses.replace(testing.base_stage(), prediction="v", schedule=ZERO_TERMINAL)
    assert config.from_json(StageConfig, json.loads(json.dumps(config.to_json(stage)))) == stage


def test_a_stage_is_guided_if_any_of_its_steps_is():
    plans = [Constant(), Oscillating(), Oscillating(low=3.0), PerStep(factors=(2.0,))]
    guided = [Sampling(steps=1, guidance=1.0, guidance_plan=plan).guided for plan in plans]
    assert guided == [False, False, True, True]


def test_a_picture_is_drawn_with_all_of_its_settings(monkeypatch):
    noise = jax.random.normal(jax.random.key(9), (2, 8, 8, 3))
    monkeypatch.setattr(samplers, "initial_noise", lambda keys, shape: noise)
    schedule = process.Cosine(shift=-3.0)
    stage = Stage(dataclasses.replace(testing.smallest_stage(), schedule=schedule))
    params, values = testing.lively(stage), texts(2)
    factors, threshold = (1.0, 0.0, 2.0, 0.5), Threshold(percentile=0.9, cap=1.7)
    grid = grids.Quadratic()
    settings = Sampling(
        steps=4,
        grid=grid,
        guidance=3.0,
        guidance_plan=PerStep(factors=factors),
        guidance_rescale=0.5,
        sampler=DDIM(),
        threshold=threshold,
    )
    drawn = stage.sample(params, values, keys(1, 2), settings=settings)
    times = grid(4, schedule)
    starts = schedule.logsnr(times[:-1])

    def weight(logsnr):
        return 3 * jnp.array(factors)[jnp.argmin(abs(starts - logsnr[0]))] * jnp.ones(2)

    denoiser = stage.denoiser(params, values, guidance=weight, rescale=0.5, threshold=threshold)
    expected = jax.jit(
        lambda: samplers.sample(
            denoiser, noise, schedule=schedule, times=times, step=DDIM(), keys=keys(1, 2)
        )
    )()
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_all_that_a_config_says_of_training_changes_the_loss():
    config = changed(testing.smallest_stage(), "text", dropout=0.0)
    changes = [
        {},
        {"schedule": process.Cosine(shift=-3.0)},
        {"loss": Loss(weighting="min_snr", gamma=1.0)},
        {"prediction": "eps"},
        {"network": dataclasses.replace(config.network, dropout=0.5)},
    ]
    params, batch = testing.lively(Stage(config)), batch_of(8)
    loss = jax.jit(lambda stage: stage.loss(params, batch, jax.random.key(1))[0], static_argnums=0)
    values = [float(loss(Stage(dataclasses.replace(config, **change)))) for change in changes]
    assert len({round(v, 4) for v in values}) == len(values), values


def test_noise_of_augmentation_is_added_in_sampling_and_told(monkeypatch):
    config = testing.super_resolution_stage()
    stage, seen = Stage(config), []
    told, params = dict(stage.conditions), testing.lively(stage)

    def spy(params, picture, logsnr):
        jax.debug.callback(
            lambda l, t: seen.append((np.asarray(l), float(t[0]))), picture, time_of(logsnr)
        )
        return told["lowres"](params, picture, logsnr)

    monkeypatch.setattr(Stage, "__init__", lambda self, config: vars(self).update(vars(stage)))
    monkeypatch.setitem(stage.conditions, "lowres", spy)
    settings = dataclasses.replace(config.sampling, steps=3, aug_level=0.5)
    given = texts(1) | {"lowres": (jnp.ones((1, 8, 8, 3)),)}
    with jax.disable_jit():  # another test may have compiled the same sampling, without the spy
        jax.block_until_ready(stage.sample(params, given, keys(0), settings=settings))
    jax.effects_barrier()
    assert len(seen) == 3
    for lowres, time in seen:  # drawn once: the same at every step
        np.testing.assert_array_equal(lowres, seen[0][0])
        assert abs(time - 500) < 0.1
    noise = (seen[0][0] - np.sqrt(0.5)) / np.sqrt(0.5)
    assert abs(noise.mean()) < 0.2 and 0.4 < noise.std() < 1.1


@pytest.mark.parametrize(
    "given, missing",
    [
        ({}, "lowres, text"),
        ({"text": ()}, "lowres"),
        ({"text": (), "lowres": (), "mask": ()}, "mask"),
    ],
)
def test_a_stage_is_given_exactly_what_it_is_told(given, missing):
    stage = Stage(testing.super_resolution_stage())
    with pytest.raises(ValueError, match=rf"told lowres, text: give exactly that.*\({missing}\)"):
        stage.sample({}, given, keys(0), settings=stage.config.sampling)


def test_noise_of_another_shape_is_refused():
    stage, noise = Stage(testing.smallest_stage(text_width=0)), np.zeros((1, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match=r"must have the shape \[1, 8, 8, 3\], got \[1, 4, 4, 3\]"):
        stage.sample({}, {}, keys(0), settings=stage.config.sampling, noise=noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointwise(NetworkConfig):
    """The least network: a matrix for each pixel and its channels, a vector for time and text."""

    @property
    def embedding_width(self):
        return 8

    def check(self, widths):
        if not widths.tokens:
            raise ValueError("Pointwise wants tokens")

    def build(self, widths, *, rngs):
        return _Pointwise(self, widths, rngs)


class _Pointwise(nnx.Module):
    def __init__(self, config, widths, rngs):
        self.pixel = Linear(config.in_channels + widths.channels, config.out_channels, rngs=rngs)
        self.vector = Linear(config.embedding_width, config.out_channels, rngs=rngs)

    def __call__(self, x, time, signals, key=None):
        vector = self.vector(sum(signals.vectors) + time[:, None] / 1000)
        pixels = jnp.concatenate([x, *signals.channels], axis=-1)
        return self.pixel(pixels) + vector[:, None, None]


def test_a_readers_own_network_is_told_what_the_conditions_say():
    conditions = (LowRes(resolution=4), TEXT)
    config = dataclasses.replace(
        testing.smallest_stage(), network=Pointwise(), conditions=conditions
    )
    stage = Stage(config)
    params = testing.lively(stage)
    assert params["network"]["pixel"]["kernel"].shape == (6, 3)
    assert params["conditions"]["lowres"]["time"]["hidden"]["kernel"].shape == (2, 8)
    batch = batch_of(3, 8, 4)
    gradient = jax.jit(jax.grad(lambda p: stage.loss(p, batch, jax.random.key(0))[0]))(params)
    for path, g in jax.tree.leaves_with_path(gradient["network"]):
        assert abs(g).max() > 1e-6, jax.tree_util.keystr(path)
    given = {c.name: c.of_examples(batch) for c in conditions}
    drawn = stage.sample(params, given, keys(1, 2, 3), settings=config.sampling)
    assert drawn.shape == (3, 8, 8, 3) and drawn.std() > 1e-2
    with pytest.raises(ValueError, match="Pointwise wants tokens"):
        dataclasses.replace(config, conditions=())
