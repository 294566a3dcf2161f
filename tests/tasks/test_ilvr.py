"""What is drawn has the coarse look of a reference (Choi et al. 2021)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cascade import cli, images, testing
from cascade.runner.cascade import Cascade
from cascade.runner.picture import Picture
from cascade.tasks.ilvr.steering import ILVR, coarse


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


@pytest.fixture(scope="module")
def reference():
    return np.random.default_rng(0).integers(60, 200, (8, 8, 3), np.uint8)


def blocks(picture, n):
    """Means over blocks of n x n pixels."""
    h, w, c = picture.shape
    return picture.astype(np.float64).reshape(h // n, n, w // n, n, c).mean((1, 3))


def drawn(cascade, reference, num=1, **fields):
    ilvr = ILVR(reference=images.to_float(reference), **fields)
    found = cascade("a b", until=8, num=num, steering=[ilvr], batch_size=num)
    return np.squeeze([picture.image for picture in found])


def test_what_is_drawn_has_the_blocks_of_the_reference(cascade, reference):
    for n in (2, 4):
        held = drawn(cascade, reference, down=n)
        plain = cascade("a b", until=8)[0].image
        # Each pixel is rounded to a level, and cut off where it leaves the range.
        apart = np.abs(blocks(held, n) - blocks(reference, n))
        assert np.median(apart) < 0.5
        assert np.median(np.abs(blocks(plain, n) - blocks(reference, n))) > 5
        assert (held != reference).any()


def test_the_projection_is_linear_and_keeps_what_it_gave():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    once = coarse(x, 4, "box")
    np.testing.assert_allclose(coarse(once, 4, "box"), once, atol=1e-6)
    np.testing.assert_allclose(once[0, :4, :4].std(axis=(0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(once[0, 0, 0], x[0, :4, :4].mean((0, 1)), atol=1e-6)
    y = jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(x.shape)
    both = coarse(x, 4, "bicubic") - coarse(y, 4, "bicubic")
    np.testing.assert_allclose(coarse(x - y, 4, "bicubic"), both, atol=1e-5)


def test_bicubic_shrinks_and_enlarges_as_pillow_does():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    image = Image.fromarray(np.asarray(x[0, :, :, 0]))
    small = image.resize((4, 4), Image.Resampling.BICUBIC)
    # The inside: at the border JAX and Pillow weigh what lies outside differently.
    ours = jax.image.resize(x, (1, 4, 4, 1), "cubic")[0, :, :, 0]
    np.testing.assert_allclose(ours[1:3, 1:3], np.asarray(small)[1:3, 1:3], atol=1e-3)
    assert coarse(x, 4, "bicubic").shape == x.shape


def test_a_coarser_hold_leaves_more_to_the_seed(cascade, reference):
    def spread(n):
        return drawn(cascade, reference, 32, down=n).astype(float).std(axis=0).mean()

    assert 0 < spread(2) < 0.95 * spread(4) and spread(4) < spread(8)


def test_after_its_time_the_picture_is_left_to_the_model(cascade, reference):
    late = drawn(cascade, reference, down=2, until=0.5)
    apart = np.abs(blocks(late, 2) - blocks(reference, 2))
    plain = np.abs(blocks(cascade("a b", until=8)[0].image, 2) - blocks(reference, 2))
    assert 1 < np.median(apart) < np.median(plain)


@pytest.fixture
def folder(tmp_path, monkeypatch, cascade, reference):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    monkeypatch.chdir(tmp_path)
    images.save_png(tmp_path / "ref.png", reference)
    return tmp_path


def test_the_command_holds_the_first_stage_and_records_it(folder, reference):
    options = ["--until", "16", "--no-compilation-cache", "--ilvr-down", "4", "--ilvr-until", "0"]
    cli.main(["sample", "a b", "--reference", "ref.png", *options])
    small = np.asarray(images.load_image(folder / "samples" / "0000_8.png"))
    assert np.median(np.abs(blocks(small, 4) - blocks(reference, 4))) < 0.5
    record = json.loads((folder / "samples" / "0000.json").read_text())
    told = {"reference": "ref.png", "down": 4, "until": 0.0, "filter": "box"}
    assert record["ilvr"] == told


@pytest.mark.parametrize(
    "words,message",
    [
        (["--ilvr-down", "4"], "--ilvr-down 4: goes with --reference"),
        (["--ilvr-filter", "box"], "--ilvr-filter box: goes with --reference"),
        (["--reference", "none.png"], "none.png: no such file"),
        (["--reference", "ref.png", "--ilvr-down", "3"], "--ilvr-down 3: must divide the 8 px"),
        (["--reference", "ref.png", "--ilvr-down", "1"], "--ilvr-down 1: must divide"),
        (["--reference", "ref.png", "--ilvr-until", "1"], "--ilvr-until 1.0: must be in [0, 1)"),
        (["--reference", "ref.png", "--init-image", "ref.png"], "two of the options steer"),
    ],
)
def test_a_reference_that_cannot_be_held_is_one_line(words, message, folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "a b", "--until", "8", "--no-compilation-cache", *words])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (folder / "samples").exists()


def test_the_evaluation_finds_pictures_held_to_less_more_varied(monkeypatch, tmp_path, capsys):
    """A model of noise alone, each of whose blocks is the reference's: the larger they are, the
    more of the noise is left."""

    def drawn(self, prompts, *, seed, until, num, steering):
        for i in range(num):
            own = np.random.default_rng(seed + i).normal(0, 0.3, (1, until, until, 3))
            y, down = jnp.asarray(steering[0].reference)[None], steering[0].down
            held = own + coarse(y - own, down, "box")
            yield Picture(prompts, seed + i, {until: images.to_uint8(held)[0]}, {})

    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: testing.cascade()))
    monkeypatch.setattr(Cascade, "__call__", lambda self, *a, **k: list(drawn(self, *a, **k)))
    words = ["eval", "ilvr", "--references", "3", "--downs", "8,2,4", "--out"]
    cli.main([*words, str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    means = [one["mean"] for one in told["diversity"]["figures"].values()]
    assert means == sorted(means) and told["diversity"]["holds"]
    # Of independent noise, blocks of N x N leave the share 1 - 1/N^2 of the variance.
    assert means[0] / means[1] == pytest.approx((0.75 / (15 / 16)) ** 0.5, abs=0.05)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "diversity.png",
        "results.json",
        "sheet.png",
    }
    for more, message in (
        (["--downs", "3,4"], "must divide the model's 8 px"),
        (["--downs", "4"], "must be two or more above 1"),
        (["--downs", "4,04"], "must be two or more above 1, none twice"),
        (["--references", "1"], "must be 2 to 10,000"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, str(tmp_path / "other"), *more])
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
