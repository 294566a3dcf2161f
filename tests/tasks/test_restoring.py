"""Palette: what a picture of any size becomes, and what is measured of it, part by part."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_restore import noisy, stage_of

from cascade import images, testing
from cascade.diffusion.process import Cosine
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.picture import Picture
from cascade.stage import Stage
from cascade.tasks.restore import figures
from cascade.tasks.restore.damage import (
    DamagedData,
    Grey,
    Holes,
    Jpeg,
    Sides,
    boxes,
    brushed,
    grey,
)
from cascade.tasks.restore.restoring import source_of, whole_picture
from cascade.tasks.restore.source import Restoring, Source
from cascade.tasks.restore.tints import TintsData, is_common


class Asked(Cascade):
    """A model that notes what it is asked to draw, and draws what is left."""

    def __call__(self, prompt, **options):
        self.options = options
        (steering,) = options["steering"]
        return [Picture(prompt, 0, {8: images.to_uint8(steering.source)}, {})]


def asked(picture, task, **options):
    """(source uint8, hole bool [h, w]) that the model was shown of a picture."""
    model = Asked([(Stage(stage_of()), {})], None, name="m")
    made = whole_picture(model, Image.fromarray(picture), task, **options)
    (steering,) = model.options["steering"]
    assert model.options["size"] == steering.source.shape[:2] == steering.hole.shape[:2]
    return images.to_uint8(steering.source), steering.hole[..., 0], made


def test_sides_are_filled_up_with_what_is_at_the_edge():
    picture = noisy(1, 9)[0, :, :7]
    multiple = stage_of().network.side_multiple
    assert 9 % multiple and 7 % multiple
    source, hole, made = asked(picture, "jpeg")
    # Where all is drawn it stays so, or the stage would be shown noise for the whole picture.
    assert hole.all() and made.image.shape == picture.shape
    np.testing.assert_array_equal(source[:9, :7], picture)
    np.testing.assert_array_equal(source[9:, :7], np.repeat(picture[-1:], len(source) - 9, 0))
    np.testing.assert_array_equal(source[:, 7:], np.repeat(source[:, 6:7], source.shape[1] - 7, 1))


def test_the_stage_is_shown_grey_to_colour_and_a_mask_from_its_middle_on():
    picture = noisy(1)[0]
    source, hole, made = asked(picture, "colouring")
    np.testing.assert_array_equal(source, grey(picture))
    assert hole.all() and made.metadata["task"] == "colouring"
    levels = np.zeros((8, 8), np.uint8)
    levels[0, :3] = 127, 128, 255
    _, hole, _ = asked(picture, "inpainting", mask=Image.fromarray(levels))
    assert hole[0, :3].tolist() == [False, True, True] and hole.sum() == 2


def test_a_model_that_draws_more_than_the_picture_restores_none():
    stage, larger = stage_of(), dataclasses.replace(testing.super_resolution_stage(), name="larger")
    assert source_of(Cascade([(Stage(stage), {})], None)) == Source()
    with pytest.raises(UserError, match="restores no pictures"):
        source_of(Cascade([(Stage(stage), {}), (Stage(larger), {})], None))


def test_what_is_known_is_noised_as_the_step_is_and_exact_at_the_end():
    schedule, times = Cosine(logsnr_min=-2.0, logsnr_max=2.0), jnp.linspace(1.0, 0.0, 3)
    source = jnp.full((1, 32, 32, 3), 0.5)
    hole = jnp.zeros((1, 32, 32, 1), bool)
    step = Restoring(source=source, hole=hole).start(source, schedule, times).after_step
    keys = jax.random.split(jax.random.key(0), 1)
    half = np.asarray(step(source, jnp.zeros(1), keys))  # alpha = sigma = sqrt(1/2)
    assert half.mean() == pytest.approx(0.5**1.5, abs=0.05)
    assert half.std() == pytest.approx(0.5**0.5, abs=0.05)
    np.testing.assert_array_equal(step(0 * source, jnp.full(1, 2.0), keys), source)


def test_boxes_are_up_to_five_and_make_up_for_one_another():
    rng = np.random.default_rng(0)
    holes = [boxes(32, 32, rng, (0.3, 0.3)) for _ in range(200)]
    # One box alone fills what it spans; several seldom do.
    spans = []
    for hole in holes:
        y, x = np.nonzero(hole)
        spans.append(hole.sum() / ((np.ptp(y) + 1) * (np.ptp(x) + 1)))
    assert 0.1 < np.mean(np.array(spans) == 1) < 0.5
    # What overlaps is made up for, and what is covered already is wanted no more.
    covered = [hole.mean() for hole in holes]
    assert np.mean(covered) > 0.27 and max(covered) < 0.33


def test_strokes_always_leave_a_mark():
    rng = np.random.default_rng(0)
    assert all(brushed(1, w, rng).any() for w in (1, 2) for _ in range(200))


def test_a_dataset_damages_each_picture_otherwise_and_passes_on_what_it_knows():
    whole = TintsData(size=40)
    source = DamagedData(whole=whole, damages=(Holes(), Sides())).open(8)
    assert len({source[i]["hole"].tobytes() for i in range(8)}) > 4
    np.testing.assert_array_equal(source[3]["hole"], source[3]["hole"])
    plain = whole.open(8)
    assert source.captions_of(2) == plain.captions_of(2)
    np.testing.assert_array_equal(source.hashes(), plain.hashes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jpeg(scale=0.0), "Jpeg.scale must be above 0"),
        (lambda: Holes(strokes=1.5), r"Holes.strokes must be in \[0, 1\]"),
        (lambda: Holes(covered=(0.4, 0.1)), "Holes.covered must be two shares"),
        (lambda: Sides(kept=1.0), "Sides.kept must be between 0 and 1"),
        (lambda: Source(damages=()), "Source.damages must be one or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_are_in_levels_where_the_picture_is_drawn():
    true, hole = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1), bool)
    hole[0, :2], hole[1] = True, True
    drawn = np.full_like(true, 10)
    drawn[1] = 30
    np.testing.assert_allclose(figures._error(drawn, true, hole), [10, 30])


def test_figures_are_of_the_worst_jpeg_and_of_sets_that_take_turns(monkeypatch):
    model = Cascade([(Stage(stage_of(damages=(Jpeg(),))), {})], None, name="m")
    true = np.asarray([images.to_uint8(np.zeros((8, 8, 3))) for _ in range(6)])
    true[:, ::2] = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 3))
    monkeypatch.setattr(figures, "drawn_of", lambda model, source, hole, desc: true + 0)
    found, tiles = figures.restorations(model, true)
    before = found["jpeg"].figures["damaged"]
    worst = []
    for picture in true:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=5)
        off = np.asarray(Image.open(file)).astype(float) - picture
        worst.append((off**2).mean() ** 0.5)
    np.testing.assert_allclose(before, [worst[::2], worst[1::2]], rtol=0.05)
    assert (found["jpeg"].figures["restored"] == 0).all() and found["jpeg"].claims[0].mean > 0
    assert len(tiles) == 3 * figures.SHOWN


def test_each_picture_is_damaged_by_itself_and_always_alike():
    true = np.repeat(noisy(1), 4, axis=0)
    source, hole = figures.damaged(Sides(), true)
    assert len({one.tobytes() for one in hole}) > 1
    np.testing.assert_array_equal(figures.damaged(Sides(), true)[1], hole)
    np.testing.assert_array_equal(source, true)


def test_tints_are_of_models_that_colour_and_do_nothing_else():
    both = Cascade([(Stage(stage_of(damages=(Grey(), Jpeg()))), {})], None, name="both")
    with pytest.raises(UserError, match="--tints both: must have learned colouring alone"):
        figures.proportion(both)
    figures.check_tints(Cascade([(Stage(stage_of(damages=(Grey(),))), {})], None))


def test_the_ground_is_no_part_of_a_square():
    picture = np.full((8, 8, 3), 242, np.uint8)
    picture[:2, :2] = (100, 150, 100)  # a small pale square on a ground more like red
    assert not is_common(picture)
