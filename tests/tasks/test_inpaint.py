"""GLIDE's inpainting: a stage that is told what stays, begun from one that is not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import model_folder

from cascade import config, images, testing
from cascade.commands.export import export
from cascade.data import FolderData
from cascade.errors import UserError
from cascade.models import Level, UNetConfig
from cascade.runner.cascade import Cascade
from cascade.runner.edits import Edit
from cascade.stage import Stage, StageConfig, Text
from cascade.stage.conditions import Keys, TextInput
from cascade.tasks.inpaint.hole import Hole
from cascade.tasks.inpaint.training import InpaintTraining, widened
from cascade.training.job import Job
from cascade.training.loop import fit


def plain_stage(**network):
    stage = testing.smallest_stage()
    return dataclasses.replace(stage, network=dataclasses.replace(stage.network, **network))


def with_hole(stage, **fields):
    return dataclasses.replace(stage, conditions=(*stage.conditions, Hole(**fields)))


def text_of(stage, b):
    (text,) = [c for c in stage.conditions if isinstance(c, Text)]
    values = jax.random.normal(jax.random.key(5), (b, 3, text.width))
    return TextInput(values, jnp.ones((b, 3), bool))


PATCHED = UNetConfig(
    patch=2, levels=(Level(width=8, blocks=1),), head_width=8, emb_width=16, coordinates=True
)


@pytest.mark.parametrize("network", [None, PATCHED])
def test_the_first_output_is_that_of_the_stage_it_begins_from(network):
    stage = (
        plain_stage() if network is None else dataclasses.replace(plain_stage(), network=network)
    )
    wide = with_hole(stage)
    # Random, since a fresh network's output is zero whatever it is told.
    params = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3,
        jax.jit(Stage(stage).init)(jax.random.key(0, impl="rbg")),
    )
    more = widened(params, Stage(wide).abstract(), stage)
    x, logsnr = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.zeros(2)
    text = {"text": text_of(stage, 2)}
    hole = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    told = {**text, "hole": (hole[..., :3], hole[..., 3:])}
    options = {"threshold": stage.sampling.threshold}

    def x0_of(of, weights, value):
        run = jax.jit(lambda p, v: Stage(of).denoiser(p, v, **options)(x, logsnr))
        return np.asarray(run(weights, value))

    before, after = x0_of(stage, params, text), x0_of(wide, more, told)
    np.testing.assert_allclose(before, after, atol=1e-6)  # more zeros are summed
    assert np.abs(before).mean() > 0.01
    kernel = more["network"]["conv_in"]["kernel"]
    other = jax.tree.map(lambda y: y + 0.1 if y.shape == kernel.shape else y, more)
    assert (x0_of(wide, other, told) - after > 0.01).any()


def test_a_super_resolution_stage_begins_as_it_was_and_is_told_both_pictures():
    """Its channels are the small picture's first, and the hole's behind them."""
    stage = testing.super_resolution_stage(4)
    wide = with_hole(stage)
    params = testing.lively(Stage(stage))
    more = widened(params, Stage(wide).abstract(), stage)
    x, logsnr = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.zeros(2)
    small = jax.random.normal(jax.random.key(3), (2, 8, 8, 3)), jnp.full((2,), 3.0)
    told = {"text": text_of(stage, 2), "lowres": small}
    hole = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    options = {"threshold": stage.sampling.threshold}
    told_more = {**told, "hole": (hole[..., :3], hole[..., 3:])}

    def x0_of(of, weights, value):
        return jax.jit(lambda p, v: Stage(of).denoiser(p, v, **options)(x, logsnr))(weights, value)

    before, after = x0_of(stage, params, told), x0_of(wide, more, told_more)
    np.testing.assert_allclose(before, after, atol=1e-5)
    given = {"text": told["text"], "lowres": (jnp.zeros((2, 4, 4, 3)),)}
    mask = jnp.zeros((2, 8, 8, 1), bool).at[:, :4].set(True)
    picture = jax.random.uniform(jax.random.key(4), (2, 8, 8, 3), minval=-1)
    drawn = Stage(wide).sample(
        more,
        given,
        jax.random.split(jax.random.key(0), 2),
        settings=stage.sampling,
        steering=Edit(picture=picture, repaint=mask),
    )
    np.testing.assert_allclose(drawn[:, 4:], picture[:, 4:], atol=1e-6)


def test_weights_of_another_stage_are_refused():
    stage = plain_stage()
    params = jax.jit(Stage(dataclasses.replace(stage, network=PATCHED)).init)(
        jax.random.key(0, impl="rbg")
    )
    with pytest.raises((UserError, ValueError)):
        widened(params, Stage(with_hole(stage)).abstract(), stage)


def test_training_tells_what_is_outside_a_random_box():
    config = Hole(least=0.25, most=0.5, whole=0.25)
    image = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    keys = Keys(*jax.random.split(jax.random.key(0), 3))
    known, hole = config.of_batch({"image": image}, keys, None, (16, 16, 3))
    shares = np.asarray(hole).mean((1, 2, 3))
    whole = shares == 1
    assert 0.1 < whole.mean() < 0.45 and (shares[~whole] <= 0.4).all() and (shares > 0).all()
    known, gaps = np.asarray(known), np.asarray(hole)[..., 0] > 0
    for picture, true, gap in zip(known, images.to_float(image), gaps, strict=True):
        assert (picture[gap] == 0).all()
        np.testing.assert_array_equal(picture[~gap], true[~gap])
        rows, columns = np.where(gap.any(1))[0], np.where(gap.any(0))[0]
        assert gap.sum() == len(rows) * len(columns)  # a box without gaps
        assert len(rows) == np.ptp(rows) + 1 and len(columns) == np.ptp(columns) + 1


def test_a_part_of_a_batch_has_the_holes_of_the_whole():
    image = np.zeros((8, 16, 16, 3), np.uint8)
    keys = Keys(*jax.random.split(jax.random.key(0), 3))
    _, whole = Hole().of_batch({"image": image}, keys, None, (16, 16, 3))
    _, part = Hole().of_batch({"image": image[1::2]}, keys, (jnp.int32(1), 2), (16, 16, 3))
    np.testing.assert_array_equal(part, whole[1::2])


def test_drawing_tells_the_mask_of_the_edit_and_without_one_that_all_is_hole():
    picture = jnp.full((2, 8, 8, 3), 0.5)
    repaint = jnp.zeros((2, 8, 8, 1), bool).at[:, :4].set(True)
    known, hole = Hole().of_steering(Edit(picture=picture, repaint=repaint), 2, (8, 8, 3))
    assert (known[:, :4] == 0).all() and (known[:, 4:] == 0.5).all()
    np.testing.assert_array_equal(hole, repaint)
    for steering in (None, Edit(picture=picture)):
        known, hole = Hole().of_steering(steering, 2, (8, 8, 3))
        assert (known == 0).all() and (hole == 1).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny stage that was fine-tuned to fill holes, and exported."""
    folder = tmp_path_factory.mktemp("inpaint")
    stage = dataclasses.replace(plain_stage(), conditions=(Text(width=128, head_width=8),))
    model_folder(folder / "plain", stage)
    (folder / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    for i, picture in enumerate(pixels):
        images.save_png(folder / "data" / f"{i}.png", picture)
        (folder / "data" / f"{i}.txt").write_text("a red circle")
    job = InpaintTraining(
        stage=with_hole(stage),
        init=str(folder / "plain"),
        data=FolderData(path=str(folder / "data")),
        preview_prompts=("a",),
        images=16,
        batch_size=8,
        log_every_images=8,
    )
    fit(job, folder / "run")
    export([folder / "run"], folder / "filled")
    return folder


def test_it_trains_draws_previews_and_is_exported(run):
    rows = [json.loads(line) for line in (run / "run" / "metrics.jsonl").open()]
    assert [row["images"] for row in rows] == [8, 16]
    assert len(list((run / "run" / "previews").glob("*.png"))) == 1
    told = config.read_json(run / "filled" / "base8" / "config.json")
    stage = config.from_json(StageConfig, told)
    assert isinstance(stage.conditions[-1], Hole)


def test_the_exported_model_draws_with_and_without_a_mask(run):
    model = Cascade.load(run / "filled")
    init = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    (free,) = model("a red circle")
    (edited,) = model("a red circle", init=init, mask=mask)
    np.testing.assert_array_equal(edited.image[4:], init[4:])
    assert free.image.shape == (8, 8, 3) and (edited.image[:4] != init[:4]).any()


def test_its_kinds_survive_json():
    stage = with_hole(plain_stage(), least=0.3)
    job = InpaintTraining(stage=stage, data=FolderData(path="x"), images=8, batch_size=8)
    written = json.loads(json.dumps(config.to_json(job)))
    assert config.from_json(Job, written) == job
    kinds = (written["type"], written["stage"]["conditions"][-1]["type"])
    place = "cascade.tasks.inpaint"
    assert kinds == (f"{place}.training.InpaintTraining", f"{place}.hole.Hole")


def test_a_stage_without_a_hole_is_no_job_of_inpainting():
    with pytest.raises(ValueError, match="must have a Hole as its last condition"):
        InpaintTraining(stage=plain_stage(), data=FolderData(path="x"), images=8, batch_size=8)
    with pytest.raises(ValueError, match="Hole.least must be above 0"):
        Hole(least=0.9, most=0.5)
