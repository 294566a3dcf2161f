"""Steps that are taken again, and what lies around a picture: `cascade edit`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascade import cli, images, testing
from cascade.runner.cascade import Cascade
from cascade.runner.edits import Edit, edits
from cascade.tasks.edit import widened


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


@pytest.fixture
def folder(tmp_path, monkeypatch, cascade):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save("a.png")
    return tmp_path


def record(folder):
    return json.loads((folder / "samples" / "0000.json").read_text())


def test_the_verb_is_sample_with_a_picture_to_begin_from(folder):
    options = ["--until", "8", "--strength", "1", "--no-compilation-cache"]
    cli.main(["edit", "a.png", "a b", *options])
    cli.main(["sample", "a b", "--init-image", "a.png", *options])
    first, second = ((folder / "samples" / f"000{i}_8.png").read_bytes() for i in (0, 1))
    assert first == second and record(folder)["init_image"] == "a.png"


def test_without_a_picture_the_verb_tells_what_it_takes(folder, capsys):
    cli.main(["edit"])
    assert capsys.readouterr().out.startswith("usage: cascade edit PICTURE PROMPT")
    with pytest.raises(SystemExit):
        cli.main(["edit", "--strength", "1"])
    assert "the first word must be a picture, got --strength" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word,walked",
    [
        ("0.5:3", [2, 3, 4, 2, 3, 4, 2, 3, 4]),
        ("1:2:2", [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]),
        ("0.5:1", [2, 3, 4]),
    ],
)
def test_a_strength_says_how_often_its_steps_are_taken(word, walked):
    stage = testing.base_stage()
    (made,) = edits([stage], [stage.sampling], np.zeros((9, 8, 3), np.uint8), strength=[word])
    assert isinstance(made, Edit)
    times = jnp.arange(4, -1, -1) / 4
    edit = Edit(
        picture=jnp.zeros((1, 8, 8, 3)),
        strength=made.strength,
        repeats=made.repeats,
        jump=made.jump,
    )
    start = edit.start(jnp.zeros((1, 8, 8, 3)), stage.schedule, times)
    np.testing.assert_allclose(start.times, [1 - i / 4 for i in walked])
    assert start.rises == (made.repeats > 1)


def test_repeats_change_the_picture_and_stand_in_its_metadata(cascade):
    init = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    options = {"until": 8, "steps": 4, "init": init}
    once, thrice = (cascade("a b", strength=s, **options)[0] for s in ("0.5", "0.5:3"))
    assert (once.image != thrice.image).any()
    assert once.metadata["edited"]["strength"] == {"base8": 0.5}
    assert thrice.metadata["edited"]["strength"] == {"base8": "0.5:3"}


def test_around_a_picture_the_model_draws_and_the_picture_stays(folder):
    cli.main(["edit", "a.png", "a b", "--around", "0.5", "--until", "8", "--no-compilation-cache"])
    drawn = np.asarray(images.load_image(folder / "samples" / "0000_8.png"))
    canvas, mask = widened(np.asarray(images.load_image("a.png")), 0.5)
    assert canvas.shape == (16, 16, 3) and mask.mean() == 255 * 0.75
    np.testing.assert_array_equal(canvas[4:12, 4:12], np.asarray(Image.open("a.png"))[:, 2:10])
    wanted = images.square(Image.fromarray(canvas), 8, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(drawn[2:6, 2:6], wanted[2:6, 2:6])
    assert (drawn[:2] != wanted[:2]).mean() > 0.9
    told = record(folder)
    assert told["around"] == 0.5 and told["edited"]["masked"]
