"""What a stage is told: by the two conditions that are here, and by any that a reader writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade import images, testing
from cascade.diffusion import process
from cascade.models import Signals, Widths
from cascade.runner.cascade import Cascade
from cascade.stage import (
    Augmentation,
    Condition,
    LowRes,
    Pixels,
    Sampling,
    Stage,
    StageConfig,
    Text,
    TextInput,
    time_of,
)
from cascade.stage.conditions import Keys
from cascade.text import TextEmbedding

TEXT = Text(width=8, head_width=8)
KEYS = Keys(*jax.random.split(jax.random.key(0), 3))


def text_batch(n, tokens=3):
    text = jax.random.normal(jax.random.key(1), (n, tokens, 8))
    return {"text": text, "text_mask": jnp.arange(tokens) < 1 + jnp.arange(n)[:, None] % tokens}


def picture_batch(n, side, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))


# Text.


def test_the_dropped_share_of_texts_is_nothing_and_the_others_are_as_they_were():
    batch, text = text_batch(4000), dataclasses.replace(TEXT, dropout=0.3)
    value = text.of_batch(batch, KEYS, None, (8, 8, 3))
    dropped = ~np.asarray(value.mask).any(axis=1)
    assert abs(dropped.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 4000)
    assert not value.tokens[dropped].any()
    np.testing.assert_array_equal(value.tokens[~dropped], batch["text"][~dropped])
    np.testing.assert_array_equal(value.mask[~dropped], batch["text_mask"][~dropped])
    # To draw from, nothing is dropped.
    whole = text.of_examples(batch)
    np.testing.assert_array_equal(whole.tokens, batch["text"])
    np.testing.assert_array_equal(whole.mask, batch["text_mask"])


def test_what_is_dropped_is_dropped_together():
    class Other(Text):
        name = "other"

    config = dataclasses.replace(
        testing.smallest_stage(), conditions=(TEXT, Other(**vars(TEXT) | {"dropout": 0.5}))
    )
    batch = text_batch(200)
    values = [c.of_batch(batch, KEYS, None, (8, 8, 3)) for c in config.conditions]
    rare, often = (~np.asarray(value.mask).any(axis=1) for value in values)
    assert 0 < rare.sum() < often.sum() and (often | ~rare).all()


@pytest.mark.parametrize("name", ["text", "lowres"])
def test_the_rows_of_a_part_are_told_what_they_are_in_the_whole_batch(name):
    """So that microbatches learn from what one batch would have been."""
    condition = {"text": dataclasses.replace(TEXT, dropout=0.5), "lowres": LowRes(resolution=4)}
    batch = text_batch(12) | {"lowres": picture_batch(12, 4)}
    whole = condition[name].of_batch(batch, KEYS, None, (8, 8, 3))
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i::3], batch)
        value = condition[name].of_batch(part, KEYS, (jnp.int32(i), 3), (8, 8, 3))
        for own, all_ in zip(value, whole, strict=True):
            np.testing.assert_allclose(own, all_[i::3], atol=1e-6)


def test_no_text_is_tokens_of_zero_masked_or_the_null_prompts():
    value = TEXT.of_examples(text_batch(2))
    null = TEXT.null(value)
    assert not null.tokens.any() and not null.mask.any() and null.tokens.shape == (2, 3, 8)
    prompted = dataclasses.replace(TEXT, null_prompt="none")
    with pytest.raises(ValueError, match="guidance needs `negative`, the embedding of .none."):
        prompted.null(value)
    # Whoever embeds its text drops it.
    batch = text_batch(50)
    kept = dataclasses.replace(prompted, dropout=0.99).of_batch(batch, KEYS, None, (8, 8, 3))
    np.testing.assert_array_equal(kept.mask, batch["text_mask"])


def test_prompts_are_embedded_and_so_is_what_guidance_moves_away_from():
    def embed(texts):
        lengths = jnp.array([[len(text)] for text in texts])
        return TextEmbedding(values=lengths[:, :, None] * jnp.ones(8), mask=lengths > 0)

    value = TEXT.of_prompts(["a", "abc"], embed)
    np.testing.assert_array_equal(value.tokens[:, 0, 0], [1, 3])
    assert value.mask.all()
    assert TEXT.away(None, embed) is None
    assert TEXT.away(["four"], embed).tokens[:, 0, 0] == 4
    prompted = dataclasses.replace(TEXT, null_prompt="")
    assert prompted.away(None, embed).tokens[:, 0, 0] == 0
    assert prompted.away(["four"], embed).tokens[:, 0, 0] == 4
    # A smaller picture is no matter of prompts, nor are these of it.
    low = LowRes(resolution=4)
    assert low.of_prompts(["a"], embed) is None and low.away(["a"], embed) is None
    assert TEXT.of_lowres(jnp.zeros((1, 4, 4, 3))) is None


def test_guidance_without_a_null_is_away_from_the_negative_that_is_given():
    config = dataclasses.replace(
        testing.smallest_stage(), conditions=(dataclasses.replace(TEXT, null_prompt=""),)
    )
    stage, batch = Stage(config), text_batch(1)
    params, given = testing.lively(stage), {"text": TEXT.of_examples(batch)}
    settings = dataclasses.replace(config.sampling, guidance=3.0)
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="guidance needs `negative`"):
        stage.sample(params, given, keys, settings=settings)
    blurry = {"text": TextInput(-batch["text"], batch["text_mask"])}
    guided = stage.sample(params, given, keys, settings=settings, negative=blurry)
    plain = stage.sample(params, given, keys, settings=config.sampling)
    assert abs(guided - plain).max() > 1e-2


def test_an_encoder_of_another_width_is_refused():
    TEXT.check_encoder(8, "e", "base8")
    with pytest.raises(ValueError, match=r"encoder e: its embeddings are 9 wide, and stage base8"):
        TEXT.check_encoder(9, "e", "base8")


# LowRes.


@pytest.mark.parametrize("schedule", [process.Cosine(), process.LinearVP()])
def test_the_log_snr_of_an_augmented_picture_is_what_the_network_is_told(schedule):
    """Measured on pictures that are white, whatever the schedule calls a level."""
    low = LowRes(resolution=8, augmentation=Augmentation(schedule=schedule, after_upsampling=True))
    levels = jnp.array([0.2, 0.35, 0.5])
    given = low.of_lowres(jnp.ones((3, 8, 8, 3)))
    keys = jax.random.split(jax.random.key(0), 3)
    value = low.drawn(given, keys, (32, 32, 3), levels)
    assert value.picture.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(value.logsnr, schedule.logsnr(levels), atol=1e-4)
    means = np.asarray(value.picture).mean((1, 2, 3))
    measured = 2 * np.log(means / np.asarray(value.picture).std((1, 2, 3)))
    np.testing.assert_allclose(value.logsnr, measured, atol=0.35)
    module = Stage(testing.super_resolution_stage(text_width=0)).conditions
    params = testing.lively(module["lowres"])
    told = module["lowres"](params, *value)
    assert told.tokens is None and told.channels[0] is value.picture
    # Pictures with one level are told one thing, and another level is another thing.
    (again,) = module["lowres"](params, value.picture, value.logsnr[:1].repeat(3)).vectors
    np.testing.assert_allclose(again, again[:1].repeat(3, axis=0), atol=1e-6)
    np.testing.assert_allclose(again[0], told.vectors[0][0], atol=1e-5)
    assert abs(told.vectors[0] - again)[1:].max(axis=1).min() > 1e-3


def test_levels_of_training_are_uniform_up_to_the_highest():
    low = LowRes(resolution=4, augmentation=Augmentation(max_level=0.4))
    batch = {"lowres": picture_batch(500, 4)}
    _, logsnr = low.of_batch(batch, KEYS, None, (8, 8, 3))
    levels = np.asarray(time_of(logsnr)) / 1000  # the cosine's own time
    assert levels.min() < 0.01 and 0.39 < levels.max() <= 0.4001
    assert abs(levels.mean() - 0.2) < 3 * 0.4 / np.sqrt(12 * 500)


@pytest.mark.parametrize("crop", [None, 8])
def test_a_smaller_picture_is_cropped_as_the_large_one_is(crop):
    stage = testing.super_resolution_stage()  # 8 -> 16 px
    shapes = stage.batch_shapes(2, 5, crop)
    assert shapes["image"].shape == (2, crop or 16, crop or 16, 3)
    assert shapes["lowres"].shape == (2, (crop or 16) // 2, (crop or 16) // 2, 3)
    assert shapes["text"].shape == (2, 5, 8) and shapes["text_mask"].shape == (2, 5)
    assert set(shapes) == {"image", "lowres", "text", "text_mask"}


def test_only_a_residual_stage_has_a_first_guess():
    value = LowRes(resolution=4).drawn(
        (jnp.ones((1, 4, 4, 3)),), jax.random.split(jax.random.key(0), 1), (8, 8, 3), jnp.zeros(1)
    )
    assert LowRes(resolution=4).guess(value) is None
    guess = LowRes(resolution=4, residual=True).guess(value)
    np.testing.assert_allclose(guess, 1, atol=1e-3)
    assert TEXT.guess(TEXT.of_examples(text_batch(1))) is None


# Any.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask(Condition):
    """A channel: where there is something. Without parameters."""

    name = "hole"

    def widths(self, network):
        return Widths(channels=1)

    def build(self, network, *, rngs):
        return _Passed()

    def shapes(self, space, b, tokens, crop):
        side = crop or space.resolution
        return {"hole": jax.ShapeDtypeStruct((b, side, side, 1), jnp.uint8)}

    def of_batch(self, batch, keys, part, shape):
        return self.of_examples(batch)

    def of_examples(self, batch):
        return (images.to_float(batch["hole"]),)


class _Passed(nnx.Module):
    def __call__(self, hole):
        return Signals(channels=(hole,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count(Condition):
    """A vector: one of so many kinds, the number of words of a prompt; without one, kind 0."""

    name = "count"

    kinds: int

    def widths(self, network):
        return Widths()

    def build(self, network, *, rngs):
        return _Table(self.kinds, network.embedding_width, rngs)

    def shapes(self, space, b, tokens, crop):
        return {"count": jax.ShapeDtypeStruct((b,), jnp.int32)}

    def of_batch(self, batch, keys, part, shape):
        drop = jax.random.bernoulli(keys.drop, 0.5, batch["count"].shape)
        return (jnp.where(drop, 0, batch["count"]),)

    def of_examples(self, batch):
        return (batch["count"],)

    def of_prompts(self, prompts, embed):
        return (jnp.array([len(prompt.split()) for prompt in prompts]),)

    def null(self, value):
        return (jnp.zeros_like(value[0]),)


class _Table(nnx.Module):
    def __init__(self, kinds, width, rngs):
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (kinds, width)))

    def __call__(self, count):
        return Signals(vectors=(self.rows[...][count],))


BASE = testing.smallest_stage()


def of(*conditions: Any, **fields: Any) -> StageConfig:
    return dataclasses.replace(BASE, conditions=conditions, **fields)


def own_batch(n=4):
    return {
        "image": picture_batch(n, 8),
        "hole": picture_batch(n, 8, seed=1)[..., :1],
        "count": jnp.arange(n) % 3 + 1,
        **text_batch(n),
    }


def test_parameters_lie_under_the_name_of_their_condition():
    def held(config):
        params, abstract = (
            jax.jit(Stage(config).init)(jax.random.key(0, impl="rbg")),
            Stage(config).abstract(),
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )
        return {name: set(part) for name, part in params.items() if name != "network"}

    assert held(of()) == held(of(Mask())) == {}
    assert held(of(TEXT)) == {"conditions": {"text"}}
    assert held(of(Count(kinds=5), Mask(), TEXT)) == {"conditions": {"count", "text"}}
    assert held(testing.super_resolution_stage()) == {"conditions": {"lowres", "text"}}
    made = jax.jit(Stage(of(Count(kinds=5))).init)(jax.random.key(0, impl="rbg"))
    rows = made["conditions"]["count"]["rows"]
    assert rows.shape == (5, 64) and rows.dtype == jnp.float32 and rows.std() > 0.5


def test_widths_of_all_conditions_are_what_the_network_is_built_for():
    assert of().widths == Widths()
    assert of(Mask(), LowRes(resolution=4), Count(kinds=2)).widths == Widths(channels=4)
    narrow = dataclasses.replace(TEXT, context_width=6)
    assert of(Mask(), narrow).widths == Widths(channels=1, tokens=6)


@pytest.mark.parametrize("name", ["hole", "count"])
def test_a_readers_own_condition_is_learned_from_and_drawn_from(name):
    """One that gives channels, and one that gives a vector; they reach the output."""
    config = of(Count(kinds=5), Mask())
    stage, batch = Stage(config), own_batch()
    assert set(config.batch_shapes(4, 7)) == {"image", "hole", "count"}
    params, key = testing.lively(stage), jax.random.key(5)
    moved = batch | {name: (batch[name] + 1) % 5}
    loss = jax.jit(lambda params, batch: stage.loss(params, batch, key)[0])
    assert abs(loss(params, batch) - loss(params, moved)) > 1e-6
    keys = jax.random.split(jax.random.key(0), 4)
    given, other = ({c.name: c.of_examples(b) for c in config.conditions} for b in (batch, moved))
    drawn, again = (stage.sample(params, g, keys, settings=config.sampling) for g in (given, other))
    assert drawn.shape == (4, 8, 8, 3)
    assert abs(drawn - again).max(axis=(1, 2, 3)).min() > 1e-4


def test_a_readers_condition_has_gradients_for_those_that_it_was_not_dropped_for():
    stage, batch = Stage(of(Count(kinds=5))), own_batch(16)
    batch["count"] = jnp.full(16, 3)
    loss = jax.jit(jax.grad(lambda params: stage.loss(params, batch, jax.random.key(1))[0]))
    rows = abs(loss(testing.lively(stage))["conditions"]["count"]["rows"]).max(axis=1)
    assert [bool(row > 1e-8) for row in rows] == [True, False, False, True, False]


def test_a_readers_condition_is_what_guidance_moves_away_from():
    stage = Stage(of(Count(kinds=5)))
    params, x, logsnr = testing.lively(stage), picture_batch(2, 8) / 255.0, jnp.zeros(2)
    none = dataclasses.replace(BASE.sampling.threshold, kind="none")

    @jax.jit
    def x0s():
        def x0(count, **options):
            values = {"count": (jnp.full(2, count),)}
            return stage.denoiser(params, values, threshold=none, **options)(x, logsnr)

        negative = {"count": (jnp.full(2, 4),)}
        return x0(2), x0(0), x0(4), x0(2, guidance=3.0), x0(2, guidance=3.0, negative=negative)

    two, null, four, guided, away = x0s()
    np.testing.assert_allclose(guided, null + 3 * (two - null), atol=1e-4)
    np.testing.assert_allclose(away, four + 3 * (two - four), atol=1e-4)
    assert abs(guided - away).max() > 1e-3


def test_two_conditions_of_one_name_are_refused():
    class Twin(Mask):
        pass

    of(Mask(), Count(kinds=2))
    with pytest.raises(ValueError, match="StageConfig.conditions must have one hole, got 2"):
        of(Mask(), Twin())


def test_a_condition_says_which_stages_it_is_for():
    class Even(Mask):
        def check(self, space, prediction):
            if space.resolution % 16:
                raise ValueError("Even wants 16 px")

    of(Even(), space=Pixels(resolution=16))
    with pytest.raises(ValueError, match="Even wants 16 px"):
        of(Even())


def test_a_cascade_draws_from_a_readers_condition_on_prompts():
    """Without a text encoder, since no stage of it asks one."""
    config = of(Count(kinds=5), sampling=Sampling(steps=2, guidance=2.0))
    stage = Stage(config)
    model = Cascade([(stage, testing.lively(stage))], None)
    one, other, two = (model(prompt, seed=1)[0].image for prompt in ("red", "blue", "a b"))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, two)


def test_a_negative_of_a_condition_that_the_stage_has_not_is_refused():
    stage = Stage(testing.base_stage())
    text = testing.FakeEncoder()(["red"])
    given = {"text": TextInput(text.values, text.mask)}
    with pytest.raises(ValueError, match="negative: stage base8 is told text, not txet"):
        stage.sample(
            testing.lively(stage),
            given,
            jax.random.split(jax.random.key(0), 1),
            settings=stage.config.sampling,
            negative={"txet": given["text"]},
        )
