import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascade import images, testing
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.runner.cascade import Cascade, check_chain
from cascade.stage import Stage, StageConfig, Start, Steering, TextInput


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


@pytest.fixture(scope="module")
def red(cascade):
    return cascade("red circle", seed=3)[0]


def test_a_picture_has_every_size_and_what_made_it(red):
    assert {side: image.shape for side, image in red.images.items()} == {
        side: (side, side, 3) for side in (8, 16, 32)
    }
    assert (red.seed, red.prompt, red.metadata["seed"]) == (3, "red circle", 3)
    assert red.metadata["stages"]["base8"]["guidance"] == 2.0
    assert red.pil().size == (32, 32) and np.array_equal(red.image, red.images[32])


def test_the_same_prompt_and_seed_is_the_same_picture_among_any_others(cascade, red):
    many = cascade(["blue square", "red circle"], seed=2, num=2)
    assert [(p.prompt, p.seed) for p in many] == [
        ("blue square", 2),
        ("blue square", 3),
        ("red circle", 2),
        ("red circle", 3),
    ]
    for side in red.images:
        assert np.array_equal(many[3].images[side], red.images[side])


def test_a_picture_is_the_same_whatever_is_drawn_together_with_it(cascade, red):
    batched = cascade(["blue square", "red circle"], seed=3, batch_size=4)[1]
    # other batch sizes are other programs; they may round the last bit of a sum elsewhere
    difference = batched.images[32].astype(int) - red.images[32]
    assert np.abs(difference).max() <= 1


def test_pictures_whose_rows_are_split_over_devices_are_the_same(cascade, red):
    shared = cascade("red circle", seed=3, split_rows=4)[0]
    for side, picture in red.images.items():
        assert np.abs(shared.images[side].astype(int) - picture).max() <= 1
    # The stage itself: each device holds a quarter of the rows, of activations too.
    stage, params = cascade.stages[2]
    mesh = sharding.rows_mesh(4)
    keys, text = jax.vmap(jax.random.key)(np.arange(1)), cascade.encoder(["red circle"])
    given = {
        "text": TextInput(text.values, text.mask),
        "lowres": (images.to_float(jnp.asarray(red.images[16][None])),),
    }
    settings = stage.config.sampling
    rows = jax.device_put(params, sharding.replicated(mesh))
    drawn = stage.sample(rows, given, keys, settings=settings, place=sharding.ByRows(mesh))
    assert {s.data.shape for s in drawn.addressable_shards} == {(1, 8, 32, 3)}
    np.testing.assert_allclose(
        drawn, stage.sample(params, given, keys, settings=settings), atol=1e-4
    )


def test_seeds_prompts_and_negatives_each_change_the_picture(cascade, red):
    others = [
        cascade("red circle", seed=4)[0],
        cascade("red square", seed=3)[0],
        cascade("red circle", seed=3, negative="blue")[0],
    ]
    for other in others:
        assert not np.array_equal(other.images[8], red.images[8])


def test_stopping_early_draws_the_same_smaller_pictures(cascade, red):
    early = cascade("red circle", seed=3, until=16)[0]
    assert list(early.images) == [8, 16]
    assert np.array_equal(early.images[16], red.images[16])


@pytest.mark.parametrize("side", [8, 16])
def test_starting_from_a_picture_goes_on_as_the_cascade_would(cascade, red, side):
    started = cascade("red circle", seed=3, lowres=red.images[side])[0]
    assert min(started.images) == 2 * side
    assert np.array_equal(started.images[32], red.images[32])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"split_rows": 9}, "split_rows=9: must be 1, or up to the number of devices here, 8"),
        ({"split_rows": 3}, "split_rows=3: must divide the 16 rows of sr16"),
        ({"until": 64}, "until=64: this model draws 8, 16, 32 px"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"lowres": np.zeros((8, 8, 3), np.uint8), "until": 8}, "has that side already"),
    ],
)
def test_impossible_requests_are_refused(cascade, options, message):
    with pytest.raises(UserError, match=message):
        cascade("red circle", **options)


@pytest.mark.parametrize("size,side", [((9, 9), 8), ((8, 16), 8), ((40, 20), 16), ((3, 5), 8)])
def test_a_picture_of_another_size_is_fitted_with_a_warning(cascade, size, side):
    given = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match=f"{size[1]}x{size[0]} px .* {side}x{side} px; this model"):
        fitted = cascade.fitted(given)
    np.testing.assert_array_equal(fitted, images.square(Image.fromarray(given), side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cascade.fitted(fitted) is fitted


def test_a_picture_that_no_stage_enlarges_is_refused_by_its_size(cascade):
    base = Cascade(cascade.stages[:1], cascade.encoder)
    with pytest.raises(UserError, match="lowres='5x3 px': no stage that draws enlarges it"):
        base("red circle", lowres=np.zeros((3, 5, 3), np.uint8))


def test_each_stage_is_guided_away_from_what_its_own_network_takes_for_no_text(cascade):
    """A network with a null token of its own, beside a public one that was taught "" for it."""
    (native, _), *_ = cascade.stages
    text = dataclasses.replace(native.config.text, null_prompt="")
    public = Stage(dataclasses.replace(native.config, name="public", conditions=(text,)))
    (_, none), (_, empty) = cascade._told([native, public], ["red circle"])
    assert none == {}
    np.testing.assert_array_equal(empty["text"].tokens, cascade.encoder([""]).values)
    blurry = cascade.encoder(["blurry"]).values
    for _, negative in cascade._told([native, public], ["red circle"], ["blurry"]):
        np.testing.assert_array_equal(negative["text"].tokens, blurry)


def test_what_stands_for_no_text_is_what_a_picture_is_drawn_away_from(cascade):
    (stage, params), *_ = cascade.stages

    def drawn(null_prompt, **options):
        text = dataclasses.replace(stage.config.text, null_prompt=null_prompt)
        own = Stage(dataclasses.replace(stage.config, conditions=(text,)))
        return Cascade([(own, params)], cascade.encoder)("red circle", seed=3, **options)[0].image

    nothing, grey = drawn(None), drawn("grey")
    assert not np.array_equal(nothing, grey)
    np.testing.assert_array_equal(grey, drawn(None, negative="grey"))
    np.testing.assert_array_equal(grey, drawn("blue", negative="grey"))


def test_weights_that_are_not_finite_draw_no_picture(cascade):
    (base, params), *_ = cascade.stages
    damaged = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
    with pytest.raises(UserError, match="stage base8 drew values that are not finite"):
        Cascade([(base, damaged)], cascade.encoder)("red circle", seed=3)


def test_a_picture_of_infinite_values_is_no_picture(cascade, monkeypatch):
    def infinite(self, params, given, keys, **options):
        return jnp.full((len(keys), 8, 8, 3), jnp.inf)

    monkeypatch.setattr(Stage, "sample", infinite)
    with pytest.raises(UserError, match="stage base8 drew values that are not finite"):
        cascade("red circle", until=8)


def test_stages_must_meet():
    full = testing.cascade()
    with pytest.raises(UserError, match="sr32 enlarges 16 px, but base8 before it draws 8 px"):
        Cascade([full.stages[0], full.stages[2]], full.encoder)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tinted(Steering):
    """Every step leaves the first channel at a value that each picture has alike."""

    tint: Any

    def start(self, noise, schedule, times):
        def after_step(x, logsnr, keys):
            return x.at[..., 0].set(self.tint[:, None, None])

        return Start(noise, times, after_step)


def test_a_stage_that_is_steered_draws_otherwise_and_the_others_as_they_would(cascade, red):
    steering = [None, Tinted(jnp.float32(1.0)), None]
    first, second = cascade(["red circle", "blue"], seed=3, steering=steering, batch_size=2)
    np.testing.assert_array_equal(first.images[8], cascade("red circle", seed=3)[0].images[8])
    for picture in (first, second):
        assert (picture.images[16][..., 0] == 255).all()
        assert (picture.images[8][..., 0] != 255).any()
    # What comes after goes on from what was drawn.
    assert not np.array_equal(first.images[32], red.images[32])
    np.testing.assert_array_equal(
        cascade("red circle", seed=3, steering=[None] * 3)[0].image, red.image
    )
    with pytest.raises(ValueError, match="steering: 2 for 3 stages"):
        cascade("red circle", steering=[None, None])
    with pytest.raises(ValueError, match="settings: 1 for 3 stages"):
        cascade("red circle", settings=cascade.settings[:1])


def test_a_prompt_is_embedded_once_for_all_stages(cascade, monkeypatch):
    asked, encoder = [], cascade.encoder

    def counted(texts):
        asked.append(list(texts))
        return encoder(texts)

    monkeypatch.setattr(cascade, "encoder", counted)
    stages = [stage for stage, _ in cascade.stages]
    told = cascade._told(stages, ["red", "blue"], ["grey"])
    assert asked == [["red", "blue"], ["grey"]]
    assert [set(given) for given, _ in told] == [{"text"}] * 3


def test_stages_that_draw_from_text_alone_make_no_cascade_with_others():
    configs: list[StageConfig] = testing.stage_configs()
    base = dataclasses.replace(configs[0], name="other")
    with pytest.raises(UserError, match="other draws from text alone, as only the first may"):
        check_chain([configs[0], base])
    check_chain(configs)
