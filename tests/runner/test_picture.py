"""One drawn picture: saved, shown, printed."""

import io

import numpy as np
import pytest
from PIL import Image

from cascade import cli, testing
from cascade.errors import UserError
from cascade.runner.cascade import Cascade


@pytest.fixture(scope="module")
def picture():
    return testing.cascade()("red circle", seed=3)[0]


def test_a_picture_is_saved_with_its_prompt_and_seed(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    picture.save(str(tmp_path / "b.PNG"), side=8)
    for name, side in (("a.png", 32), ("b.PNG", 8)):
        with Image.open(tmp_path / name) as image:
            assert image.text == {"prompt": "red circle", "seed": "3"}
            np.testing.assert_array_equal(np.asarray(image), picture.images[side])


def test_the_command_line_writes_the_same_files(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(Cascade, "load", lambda *a, **k: testing.cascade())
    words = ["red circle", "--seed", "3", "--no-compilation-cache", "--out", str(tmp_path)]
    cli.main(["sample", *words])
    for side in picture.images:
        picture.save(tmp_path / "own.png", side)
        own, theirs = (tmp_path / name for name in ("own.png", f"0000_{side}.png"))
        assert own.read_bytes() == theirs.read_bytes()


def test_a_picture_is_saved_as_png_alone(picture, tmp_path):
    with pytest.raises(UserError, match="a.jpg: pictures are saved as PNG"):
        picture.save(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("side", [0, 64])
def test_a_size_that_was_not_drawn_is_refused_with_those_there_are(picture, side, tmp_path):
    message = f"side={side}: this picture has 8, 16 and 32 px"
    with pytest.raises(ValueError, match=message):
        picture.pil(side)
    with pytest.raises(ValueError, match=message):
        picture.save(tmp_path / "a.png", side)


def test_a_notebook_shows_the_largest_size(picture):
    with Image.open(io.BytesIO(picture._repr_png_())) as shown:
        np.testing.assert_array_equal(np.asarray(shown), picture.images[32])
    np.testing.assert_array_equal(np.asarray(picture.pil()), picture.images[32])
    assert picture.pil(16).size == (16, 16)


def test_a_picture_is_printed_without_its_arrays(picture):
    assert repr([picture]) == "[Picture('red circle', seed=3, 8, 16 and 32 px)]"
    alone = testing.cascade()("red", until=8)[0]
    assert repr(alone) == "Picture('red', seed=0, 8 px)"


def test_a_folder_that_is_not_there_is_told(picture, tmp_path):
    for save in (picture.save, picture.save_strip, picture.save_gif):
        with pytest.raises(UserError, match="there is no folder .*none; make it first"):
            save(tmp_path / "none" / "a.png")
