"""Pictures drawn anew, whole or in part. What diffusers makes of one is in fixtures/deepfloyd."""

import dataclasses
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.random_weights import noise
from PIL import Image
from pipelines import write_pipeline

from cascade import cli, images, testing
from cascade.diffusion import samplers
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.process import alpha_sigma
from cascade.errors import UserError
from cascade.models import AutoencoderConfig
from cascade.published.pipelines import Pipelines
from cascade.published.schedulers import Respaced
from cascade.runner.cascade import Cascade
from cascade.runner.edits import Edit, default_strength, edits, redrawn
from cascade.runner.overrides import override
from cascade.stage import Latents, Stage, TextInput, stage
from cascade.tasks.edit import SampleOptions

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
    traced_anew = jax.jit(stage._carried, static_argnums=(0, 1, 2))
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
    pipeline = Pipelines([write_pipeline(tmp_path, number)])
    (config,) = pipeline.stages
    model, params = Stage(config), pipeline.read(config)
    picture = RECORDED[f"original{number}"]
    edit = Edit(
        picture=jnp.asarray(picture),
        repaint=jnp.asarray(RECORDED[f"repaint{number}"]) if name.startswith("inpaint") else None,
        strength=strength,
        clean=True,
    )
    inject(monkeypatch, number, picture.shape[1:])
    settings = dataclasses.replace(model.config.sampling, steps=steps, aug_level=level)
    mask = jnp.ones(INPUTS["text"].shape[:2], bool)
    text, negative = (
        {"text": TextInput(jnp.asarray(INPUTS[k]), mask)} for k in ("text", "negative")
    )
    drawn = model.sample(
        params,
        text | ({"lowres": (jnp.asarray(INPUTS["low"]),)} if number == 2 else {}),
        jax.random.split(jax.random.key(0), 1),
        settings=settings,
        negative=negative,
        sides=picture.shape[1:3],
        steering=edit,
    )
    theirs, exact = RECORDED[name], RECORDED[f"{name}_exact"]
    error, rounding = (np.abs(x - exact).max() for x in (drawn[0], theirs))
    assert error < rounding < 1e-3 < 0.1 < np.abs(exact - picture[0]).max()


# (stage, masked): the defaults of steps, guidance and aug_level, those of diffusers' pipelines.
DEFAULTS = {
    (1, None): (100, 7.0, 0.0),
    (1, False): (80, 10.0, 0.0),
    (1, True): (50, 7.0, 0.0),
    (2, None): (50, 4.0, 0.251),
    (2, False): (50, 4.0, 0.251),
    (2, True): (100, 4.0, 0.001),
}


@pytest.mark.parametrize("number, masked", DEFAULTS)
def test_ifs_defaults_are_those_of_its_pipelines(number, masked, tmp_path):
    stages = Pipelines([write_pipeline(tmp_path, number)]).stages
    (config,) = stages if masked is None else redrawn(stages, masked)
    found = config.sampling
    assert (found.steps, found.guidance, found.aug_level) == DEFAULTS[number, masked]
    if find_spec("diffusers") is not None:
        import diffusers

        kind = {None: "", False: "Img2Img", True: "Inpainting"}[masked]
        name = f"IF{kind}{'SuperResolution' * (number == 2)}Pipeline"
        given = inspect.signature(getattr(diffusers, name).__call__).parameters
        theirs = [given[k].default for k in ("num_inference_steps", "guidance_scale")]
        level = (given["noise_level"].default + 1) / 1000 if number == 2 else 0.0
        assert (*theirs, pytest.approx(level)) == DEFAULTS[number, masked]
        if masked is not None:
            assert given["strength"].default == default_strength(config, masked)


def test_settings_that_are_the_models_own_stay_when_it_redraws(tmp_path):
    (config,) = Pipelines([write_pipeline(tmp_path, 2)]).stages
    own = dataclasses.replace(config.sampling, steps=30, aug_level=0.1)
    (again,) = redrawn([dataclasses.replace(config, sampling=own)], True)
    assert again.sampling == own
    # A list of the table's entries has one number of steps.
    listed = dataclasses.replace(config.sampling, steps=50, grid=Respaced(name="smart50"))
    (again,) = redrawn([dataclasses.replace(config, sampling=listed)], True)
    assert again.sampling == dataclasses.replace(listed, aug_level=0.001)
    native = testing.stage_configs()
    assert redrawn(native, True) == redrawn(native, False) == native


def test_the_options_of_an_edit_choose_the_settings_that_others_are_laid_over(tmp_path):
    stages = Pipelines([write_pipeline(tmp_path, 1)]).stages
    file = tmp_path / "a.png"
    Image.new("RGB", (9, 8)).save(file)
    assert SampleOptions().stages(stages) is stages
    redraws = SampleOptions(init_image=file).stages(stages)
    (chosen,) = override(redraws, guidance=5)
    assert (chosen.steps, chosen.guidance) == (80, 5.0)
    (chosen,) = override(SampleOptions(init_image=file, mask=file).stages(stages))
    assert (chosen.steps, chosen.guidance) == (50, 7.0)


@pytest.mark.parametrize("door", ["Python", "the command"])
@pytest.mark.parametrize("masked", [False, True])
def test_if_redraws_with_its_pipelines_defaults(masked, door, tmp_path):
    """guidance in stage I, which has no mask of its own, and noise on what stage II enlarges."""
    folders = [write_pipeline(tmp_path / str(number), number) for number in (1, 2)]
    model = ",".join(map(str, folders))
    white = np.full((8, 8), 255, np.uint8)
    if door == "Python":
        options = {"init": np.zeros((8, 8, 3), np.uint8), "mask": white if masked else None}
        (picture,) = Cascade.load(model)("a b", steps=2, **options)
        base, above = picture.metadata["stages"].values()
    else:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        Image.fromarray(white).save(tmp_path / "m.png")
        words = ["--init-image", str(tmp_path / "a.png"), "--steps", "2", "--model", model]
        words += ["--mask", str(tmp_path / "m.png")] * masked
        cli.main(["sample", "a b", *words, "--out", str(tmp_path / "out")])
        record = json.loads((tmp_path / "out" / "0000.json").read_text())
        base, above = record["stages"].values()
    assert base["guidance"] == (7.0 if masked else 10.0)
    assert above["aug_level"] == (0.001 if masked else 0.251)


def test_recorded_edits_are_what_the_pipelines_draw():
    pytest.importorskip("diffusers")
    from fixtures import make_if_edits

    found = make_if_edits.record()
    assert sorted(found) == sorted(RECORDED.files)
    for name, value in found.items():
        np.testing.assert_allclose(value, RECORDED[name], atol=1e-4)


def test_what_stays_is_as_noisy_as_the_rest_unless_the_network_is_ifs(tmp_path):
    keys, mask = jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 32, 32, 1), bool)
    start, times = jnp.full((1, 32, 32, 3), 7.0), jnp.array([0.8, 0.4, 0.0])
    for config, clean in (
        (testing.base_stage(), False),
        (Pipelines([write_pipeline(tmp_path, 1)]).stages[0], True),
    ):
        (made,) = edits([config], [config.sampling], np.zeros((9, 8, 3), np.uint8))
        assert isinstance(made, Edit) and made.clean is clean
        edit = Edit(
            picture=jnp.full((1, 32, 32, 3), 0.5),
            repaint=mask.at[:, :, 16:].set(True),
            clean=clean,
        )
        x, left_times, after_step, *_ = edit.start(start, config.schedule, times)
        np.testing.assert_array_equal(left_times, times)
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
    stages = [stage.config for stage, _ in cascade.select(until=16)]
    steering = edits(stages, cascade.settings[:2], init, mask=mask)
    (picture,) = cascade("a b", until=16, steering=steering)
    for side, drawn in picture.images.items():
        given = images.square(Image.fromarray(init), side, Image.Resampling.BICUBIC)
        below = slice(side // 2, None)
        np.testing.assert_array_equal(drawn[below], given[below])
        assert (drawn[: side // 2] != given[: side // 2]).mean() > 0.9
    strength = {"base8": 1.0, "sr16": 0.8}
    record = SampleOptions().record(stages, steering)
    assert record["edited"] == {"masked": True, "strength": strength}


def test_less_strength_stays_closer_to_the_picture(cascade):
    init = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)

    def change(strength):
        options = {"until": 8, "steps": 4, "guidance": 1.0, "strength": strength}
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
        (
            ["--init-image", "a.png", "--strength", "0"],
            "--strength 0: must be above 0",
        ),
        (["--init-image", "a.png", "--strength", ".1"], "takes none: it must be at least 1/3"),
        (["--init-image", "a.png", "--strength", "x"], "--strength x: must be a number"),
        (["--init-image", "a.png", "--strength", "1,1"], "2 values for 3 stages"),
        (
            ["--init-image", "a.png", "--strength", "1:x"],
            "1:x: must be a number; behind it may",
        ),
        (
            ["--init-image", "a.png", "--strength", "1:0"],
            "1:0: the steps are taken once to 100",
        ),
        (["--init-image", "a.png", "--strength", "1:2:9"], "at most the 3 that are taken, got 9"),
        (["--around", ".5"], "--around 0.5: goes with --init-image"),
        (["--init-image", "a.png", "--around", "2"], "--around 2.0: must be above 0"),
        (["--init-image", "a.png", "--around", ".5", "--mask", "mask.png"], "give one of them"),
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
    assert record["init_image"] == str(tmp_path / "a.png")
    assert record["mask"] == str(tmp_path / "mask.png")


def test_a_picture_that_is_not_edited_says_so(cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    cli.main(["sample", "a", "--until", "8", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "0000.json").read_text())
    assert {record[name] for name in ("edited", "init_image", "mask")} == {None}


def test_how_much_changes_goes_by_stage_on_the_command_line(cascade, tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (9, 8)).save(file)
    every = testing.stage_configs()

    def steering(stages, **options):
        settings = [stage.sampling for stage in stages]
        return SampleOptions(**options).steering(stages, every, settings)

    def strengths(stages, text=None):
        return [edit.strength for edit in steering(stages, init_image=file, strength=text)]

    assert strengths(every) == [0.7, 0.8, 0.8]
    assert strengths(every[:2], "1,.5,.6") == [1.0, 0.5]
    assert strengths(every[1:], "1,.5,.6") == [0.5, 0.6]
    assert strengths(every, ".5") == [0.5] * 3
    assert default_strength(every[0], masked=True) == 1.0
    assert steering(every) == [None] * 3


def test_a_stage_that_draws_in_latents_begins_from_no_picture(cascade):
    autoencoder = AutoencoderConfig(widths=(8, 8), blocks=1, groups=4, scaling=0.2)
    base, none = testing.base_stage(), Threshold(kind="none")
    latent = dataclasses.replace(
        base,
        space=Latents(resolution=8, autoencoder=autoencoder),
        network=dataclasses.replace(base.network, in_channels=4, out_channels=4),
        sampling=dataclasses.replace(base.sampling, threshold=none),
    )
    with pytest.raises(UserError, match="stage base8 draws in Latents and begins from no picture"):
        edits([latent], [latent.sampling], np.zeros((8, 8, 3), np.uint8))
