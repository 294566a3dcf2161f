"""Pictures of any shape are enlarged in tiles that agree where they meet."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from cascade import cli, testing
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.tiles import enlarge, starts
from cascade.stage import Pixels, Stage


@pytest.fixture(scope="module")
def model():
    return testing.cascade()  # its last stage takes 16 px to 32


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[:23, :40]
    return np.stack([y * 8, x * 5, 128 + 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("length", [16, 17, 28, 29, 100, 1000])
def test_tiles_cover_the_picture_and_share_a_quarter_of_a_side(length):
    begun = list(starts(length, 16))
    assert begun[0] == 0 and begun[-1] == length - 16
    assert all(1 <= b - a <= 12 for a, b in zip(begun, begun[1:], strict=False))


def test_a_picture_of_one_tile_is_what_the_stage_draws_of_it(model, picture):
    small = picture[:16, :16].copy()
    ours = enlarge(model, "red", small, seed=3)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), 32), (1, 32, 32, 3))
    last = Cascade(model.stages[-1:], model.encoder)
    (theirs,) = last("red", lowres=small, seed=3, noise=np.asarray(noise))
    np.testing.assert_array_equal(ours.image, theirs.image)
    assert list(ours.images) == [32] and ours.metadata["tiles"] == 1 and ours.prompt == "red"
    assert not np.array_equal(ours.image, enlarge(model, "red", small, seed=4).image)


def test_it_has_the_shape_of_the_picture_and_no_seam(model, picture, monkeypatch):
    """Tiles of a stage that only enlarges what it is given are the enlarged picture."""
    drawn = enlarge(model, "red", picture, seed=1, batch_size=4)
    assert drawn.image.shape == (46, 80, 3) and list(drawn.images) == [80]
    assert drawn.metadata["tiles"] == 2 * 3

    def only_enlarges(self, prompts, *, lowres, noise, **options):
        assert len(lowres) == len(noise) == len(prompts) == 6
        for small, own in zip(lowres, noise, strict=True):
            yield Drawn(np.asarray(Image.fromarray(small).resize((32, 32), 0)), own)

    class Drawn:
        def __init__(self, image, noise):
            self.image, self.metadata = image, {}
            windows.append(noise)

    windows = []
    monkeypatch.setattr(Cascade, "draw", only_enlarges)
    whole = enlarge(model, "red", picture).image
    np.testing.assert_array_equal(whole, picture.repeat(2, 0).repeat(2, 1))
    # The noise of neighbours is the same where they overlap: the first two begin 12 px apart.
    np.testing.assert_array_equal(windows[0][:, 24:], windows[1][:, :8])
    assert not np.array_equal(windows[0], windows[1])


def test_it_is_drawn_by_the_model_that_it_says_it_is(model, picture):
    """With the words and encoders that the model has, of which the last stage has its own."""
    name, encoders = model.stages[-1][0].config.name, {}
    encoders[name] = model.encoder
    options = {"name": "mine", "digest": "5e1", "known_words": ("red",), "own_encoders": encoders}
    own, small = Cascade(model.stages, None, **options), picture[:16, :16]
    with pytest.warns(UserWarning, match="zebra"):
        drawn = enlarge(own, "zebra", small)
    np.testing.assert_array_equal(drawn.image, enlarge(model, "zebra", small).image)
    told = drawn.metadata
    assert (told["model"], told["model_sha256"], told["from_noise"]) == ("mine", "5e1", False)
    with pytest.raises(UserError, match="seed=-1: must be 0 or more"):
        enlarge(own, "red", small, seed=-1)


def test_pictures_that_do_not_fit_are_refused(model, picture, monkeypatch):
    with pytest.raises(UserError, match="has 40x15 px: it must have at least 16 on both sides"):
        enlarge(model, "red", picture[:15])
    with pytest.raises(UserError, match="its last stage enlarges no picture"):
        enlarge(Cascade(model.stages[:1], model.encoder), "red", picture)
    monkeypatch.setattr("cascade.images.MOST_PIXELS", 46 * 80 - 1)
    with pytest.raises(UserError, match="2 times as large on both sides it would have more than"):
        enlarge(model, "red", picture)
    monkeypatch.undo()
    monkeypatch.setattr(Pixels, "shape", lambda self, sides=None: (24, 24, 3))
    with pytest.raises(UserError, match="what sr32 diffuses is not cut in tiles"):
        enlarge(model, "red", picture)


def test_the_command_writes_a_png_and_says_what_it_is(monkeypatch, tmp_path, capsys, picture):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: testing.cascade()))
    monkeypatch.setattr("cascade.commands.enlarge.use_compilation_cache", lambda: None)
    Image.fromarray(picture).save(tmp_path / "a.png")
    words = ["enlarge", str(tmp_path / "a.png"), "red circle", "--out", str(tmp_path / "big.png")]
    cli.main([*words, "--steps", "2"])
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert (line["width"], line["height"], line["tiles"]) == (80, 46, 6)
    assert "12/12" in told.err and "40 x 23 -> 80 x 46 px" in told.err
    with Image.open(tmp_path / "big.png") as image:
        assert image.size == (80, 46) and image.text["prompt"] == "red circle"
    seeded = [*words[:-1], str(tmp_path / "other.png"), "--steps", "2", "--seed", "7"]
    cli.main([*seeded, "--quiet"])
    assert capsys.readouterr().err == ""
    with Image.open(tmp_path / "other.png") as image:
        assert image.text["seed"] == "7"
    for more, message in (([], "must be a new file"), (["--out", "x.jpg"], "ends in .png")):
        with pytest.raises(SystemExit):
            cli.main([*words, *more])
        assert message in capsys.readouterr().err


def test_a_model_that_reads_no_text_enlarges_without_a_prompt_and_others_ask_for_it(
    monkeypatch, tmp_path, capsys, picture
):
    def without_text(cls, name, **options):
        stage = Stage(testing.super_resolution_stage(8, text_width=0))
        return Cascade([(stage, testing.lively(stage))], None, name=name)

    monkeypatch.setattr("cascade.commands.enlarge.use_compilation_cache", lambda: None)
    Image.fromarray(picture).save(tmp_path / "a.png")
    words = ["enlarge", str(tmp_path / "a.png"), "--out", str(tmp_path / "big.png")]
    for load, more, message in (
        (lambda cls, *a, **k: testing.cascade(), [], "the prompt is missing"),
        (without_text, ["red"], "model scenes: reads no text; leave the prompt out"),
    ):
        monkeypatch.setattr(Cascade, "load", classmethod(load))
        with pytest.raises(SystemExit):
            cli.main([*words[:2], *more, *words[2:]])
        assert message in capsys.readouterr().err
    cli.main(words)
    assert Image.open(tmp_path / "big.png").size == (80, 46)
