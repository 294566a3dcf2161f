"""Pictures drawn anew, whole or in part. What diffusers makes of one is in fixtures/deepfloyd."""

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.random_weights import noise
from PIL import Image
from test_deepfloyd import write_pipeline

from cascade import cli, images, stage, testing
from cascade.diffusion import samplers
from cascade.diffusion.process import alpha_sigma
from cascade.models import Conditioning
from cascade.published.deepfloyd import reader as deepfloyd
from cascade.published.deepfloyd.stage import stage_config
from cascade.runner.cascade import Cascade, with_options
from cascade.stage import Edit, Stage

FOLDER = Path(__file__).parents[1] / "fixtures" / "deepfloyd"
RECORDED = np.load(FOLDER / "edits.npz")
INPUTS = np.load(FOLDER / "inputs.npz")
# Two of the four pipelines say in the default run what all four say where the reference is.
WITH_DIFFUSERS = pytest.mark.skipif(find_spec("diffusers") is None, reason="the other two suffice")


def inject(monkeypatch, first, shape):
    """The k-th noise of `Stage.sample` is noise(k), as recorded: steps draw from `first` on."""
    table = jnp.stack([jnp.asarray(noise(k, (1, *shape))) for k in range(first + 12)])
    starts = list(range(first))  # those before the steps are asked for in the other order
    monkeypatch.setattr(samplers, "initial_noise", lambda keys, shape: table[starts.pop()])
    monkeypatch.setattr(samplers, "_fold_in", lambda keys, i: jnp.full(keys.shape, i))
    monkeypatch.setattr(samplers, "_split", lambda steps: (steps, steps))
    monkeypatch.setattr(samplers, "_normal", lambda steps, shape: table[first + steps[0] - 1])
    traced_anew = jax.jit(stage._sample.__wrapped__, static_argnums=(0, 1, 2))
    monkeypatch.setattr(stage, "_sample", traced_anew)


@pytest.mark.parametrize(
    "name,number,steps,strength,level",
    [
        pytest.param("image", 1, 12, 0.7, 0.0, marks=WITH_DIFFUSERS),
        ("inpaint", 1, 10, 1.0, 0.0),
        ("image_sr", 2, 10, 0.8, 0.251),
        pytest.param("inpaint_sr", 2, 10, 0.8, 0.001, marks=WITH_DIFFUSERS),
    ],
)
def test_if_edits_as_its_pipelines_do(name, number, steps, strength, level, tmp_path, monkeypatch):
    """Closer to what the reference computes in float64 than its own float32 is."""
    folder = write_pipeline(tmp_path, number)
    model, params = Stage(stage_config(folder)), deepfloyd.read_unet(folder / "unet")[1]
    picture = RECORDED[f"original{number}"]
    edit = Edit(
        picture=jnp.asarray(picture),
        repaint=jnp.asarray(RECORDED[f"repaint{number}"]) if name.startswith("inpaint") else None,
        strength=strength,
    )
    inject(monkeypatch, number, picture.shape[1:])
    (settings,) = with_options([model.config.sampling], steps=[steps], aug_level=[level])
    text, negative = (Conditioning(text=jnp.asarray(INPUTS[k])) for k in ("text", "negative"))
    drawn = model.sample(
        params,
        text,
        jax.random.split(jax.random.key(0), 1),
        settings=settings,
        lowres=jnp.asarray(INPUTS["low"]) if number == 2 else None,
        negative=negative,
        edit=edit,
    )
    theirs, exact = RECORDED[name], RECORDED[f"{name}_exact"]
    error, rounding = (np.abs(x - exact).max() for x in (drawn[0], theirs))
    assert error < rounding < 1e-3 < 0.1 < np.abs(exact - picture[0]).max()


def test_recorded_edits_are_what_the_pipelines_draw():
    pytest.importorskip("diffusers")
    from fixtures import make_if_edits

    found = make_if_edits.record()
    assert sorted(found) == sorted(RECORDED.files)
    for name, value in found.items():
        np.testing.assert_allclose(value, RECORDED[name], atol=1e-4)


def test_what_stays_is_as_noisy_as_the_rest_unless_the_network_is_ifs(tmp_path):
    keys, mask = jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 32, 32, 1), bool)
    edit = Edit(picture=jnp.full((1, 32, 32, 3), 0.5), repaint=mask.at[:, :, 16:].set(True))
    start, times = jnp.full((1, 32, 32, 3), 7.0), jnp.array([0.8, 0.4, 0.0])
    for config, clean in (
        (testing.base_stage(), False),
        (stage_config(write_pipeline(tmp_path, 1)), True),
    ):
        x, after_step = stage._edited(config, edit, start, times)
        logsnr = config.schedule.logsnr(times)
        np.testing.assert_allclose(
            x[:, :, 16:], 0.5 * alpha_sigma(logsnr)[0][0] + 7 * alpha_sigma(logsnr)[1][0], rtol=1e-5
        )
        step = after_step(jnp.full_like(x, 9.0), logsnr[1:2], keys)
        assert (step[:, :, 16:] == 9).all()
        alpha, sigma = (0.5, 0.0) if clean else alpha_sigma(logsnr[1])
        left = np.asarray(step[:, :, :16]) - (0.5 if clean else 0.5 * alpha)
        assert abs(left.mean()) < 0.1 and np.isclose(left.std(), sigma, rtol=0.1)
        last = after_step(jnp.full_like(x, 9.0), logsnr[2:], keys)
        assert (last[:, :, :16] == 0.5).all() and (last[:, :, 16:] == 9).all()


@pytest.fixture(scope="module")
def cascade():
    return testing.cascade()


def test_a_picture_is_drawn_anew_where_the_mask_is_white_at_every_size(cascade):
    rng = np.random.default_rng(0)
    init = rng.integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[:24] = 255
    (picture,) = cascade("a b", init=init, mask=mask, until=16)
    for side, drawn in picture.images.items():
        given = images.square(Image.fromarray(init), side, Image.Resampling.BICUBIC)
        below = slice(side // 2, None)
        np.testing.assert_array_equal(drawn[below], given[below])
        assert (drawn[: side // 2] != given[: side // 2]).mean() > 0.9
    strength = {"base8": 1.0, "sr16": 0.8}
    assert picture.metadata["edited"] == {"masked": True, "strength": strength}


def test_less_strength_stays_closer_to_the_picture(cascade):
    init = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    settings = with_options(cascade.settings[:1], steps=[4], guidance=[1.0])

    def change(strength):
        options = {"settings": settings, "until": 8, "strength": [strength]}
        drawn = cascade("a b", init=init, **options)[0].image
        return np.abs(drawn.astype(float) - init).mean()

    assert change(0.25) < 0.8 * change(1.0)


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--mask", "mask.png"], "--mask mask.png: goes with --init-image"),
        (["--strength", ".5"], "--strength .5: goes with --init-image"),
        (["--init-image", "none.png"], "none.png: no such file"),
        (["--init-image", "a.png", "--mask", "mask.png"], "mask is 8x8 px, the picture 9x8 px"),
        (["--init-image", "a.png", "--strength", "0"], "base8: Edit.strength must be in (0, 1]"),
        (["--init-image", "a.png", "--strength", ".1"], "takes none: it must be at least 1/3"),
        (["--init-image", "a.png", "--strength", "x"], "--strength x: must be a number"),
        (["--init-image", "a.png", "--strength", "1,1"], "2 values for 3 stages"),
    ],
)
def test_an_impossible_edit_is_one_line(argv, message, cascade, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 8)).save("a.png"), Image.new("L", (8, 8)).save("mask.png")
    with pytest.raises(SystemExit):
        cli.main(["sample", "a", *argv, "--no-compilation-cache"])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not captured.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "mask.png"]


def test_the_command_edits_a_picture_of_any_size(cascade, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (9, 20, 3), np.uint8)).save(tmp_path / "a.png")
    Image.new("L", (20, 9), 255).save(tmp_path / "mask.png")
    words = ["a", "--init-image", tmp_path / "a.png", "--mask", tmp_path / "mask.png"]
    cli.main(["sample", *map(str, words), "--until", "8", "--out", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out)["picture"] == "0000"
    record = json.loads((tmp_path / "out" / "0000.json").read_text())
    assert record["edited"] == {"masked": True, "strength": {"base8": 1.0}}
