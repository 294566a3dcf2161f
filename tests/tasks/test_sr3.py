"""SR3 beside a regression of its size, on data whose answer is known."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import model_folder

from cascade import cli, config, images, testing
from cascade.data import FolderData
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.grids import Karras
from cascade.errors import UserError
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, Stage, StageConfig
from cascade.tasks.sr3 import figures
from cascade.tasks.sr3.regression import RegressionTraining
from cascade.training.job import Job, Optimizer
from cascade.training.loop import fit
from cascade.training.stage_training import StageTraining

pytestmark = pytest.mark.usefixtures("one_device")
CONFIGS = Path(__file__).parents[2] / "configs" / "sr3"


def stage_of(steps=2):
    return StageConfig(
        name="sr8",
        space=Pixels(resolution=8),
        conditions=(LowRes(resolution=4, augmentation=Augmentation(max_level=0.0)),),
        network=EfficientUNetConfig(
            levels=(EfficientLevel(width=8, blocks=1, stride=1), EfficientLevel(width=8, blocks=1)),
            head_width=8,
        ),
        sampling=Sampling(steps=steps, guidance=1.0, threshold=Threshold(kind="static")),
    )


def job_of(kind, data, steps, images=16):
    return kind(
        stage=stage_of(steps),
        data=FolderData(path=str(data)),
        images=images,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-2),
        ema_decay=0.9,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures that are white or black left of the middle, and the other right of it: made small
    by 8 they would be one grey."""
    place = tmp_path_factory.mktemp("sr3")
    (place / "data").mkdir()
    for i in range(16):
        picture = np.zeros((8, 8, 3), np.uint8)
        picture[:, i % 2 :: 2] = 255  # stripes, that are one grey at half the size
        images.save_png(place / "data" / f"{i}.png", picture)
        (place / "data" / f"{i}.txt").write_text("stripes")
    return place


def test_a_regression_is_trained_where_all_is_noise(folder):
    job = job_of(RegressionTraining, folder / "data", 1)
    batch = {
        "image": jnp.full((8, 8, 8, 3), 255, jnp.uint8),
        "lowres": jnp.full((8, 4, 4, 3), 255, jnp.uint8),
    }
    params = jax.jit(Stage(job.stage).init)(jax.random.key(0, impl="rbg"))
    # A fresh stage says v = 0: at time 1, where v is -x0, every error is |x0| = 1.
    value, metrics = jax.jit(job.loss)(params, batch, jax.random.key(1))
    assert value == pytest.approx(1.0, abs=1e-3) and metrics["loss"] == value
    plain_loss = jax.jit(job_of(StageTraining, folder / "data", 1).loss)
    plain, _ = plain_loss(params, batch, jax.random.key(1))
    assert abs(plain - 1) > 0.02


def test_the_regression_draws_the_mean_of_what_may_be(folder):
    """Stripes of two phases are one grey when they are small: their mean is grey."""
    fit(job_of(RegressionTraining, folder / "data", 1, images=320), folder / "regression")
    cli.main(["export", str(folder / "regression"), str(folder / "mean")])
    model = Cascade.load(folder / "mean")
    true = np.zeros((4, 8, 8, 3), np.uint8)
    true[::2, :, ::2], true[1::2, :, 1::2] = 255, 255
    drawn = figures.draw(model, true, 0, model.stages[-1][0].config.sampling, "test")
    assert np.abs(drawn.astype(int) - 128).mean() < 25 and drawn.std() < 40


def test_what_is_no_regression_is_refused(folder):
    with pytest.raises(ValueError, match=r"sampling.steps must be 1, got 2"):
        job_of(RegressionTraining, folder / "data", 2)
    with pytest.raises(ValueError, match="must have a LowRes"):
        stage = testing.base_stage()
        RegressionTraining(stage=stage, data=FolderData(path="x"), images=8, batch_size=8)
    with pytest.raises(ValueError, match=r"validation must be 0: .*, got 0.5"):
        dataclasses.replace(job_of(RegressionTraining, "x", 1), validation=0.5)
    written = json.loads(json.dumps(config.to_json(job_of(RegressionTraining, "x", 1))))
    assert config.from_json(Job, written) == job_of(RegressionTraining, "x", 1)


def test_the_figures_are_those_of_what_is_drawn(monkeypatch):
    true = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    flat = np.full_like(true, 128)
    model = Cascade([(Stage(stage_of()), {})], None, name="m")
    made = {"SR3": true, "regression": flat}
    monkeypatch.setattr(figures, "draw", lambda *given, desc: made[desc])
    found, drawn = figures.enlarged({"SR3": model, "regression": model}, true, 0)
    exact, mean = found["figures"]["SR3"], found["figures"]["regression"]
    assert exact["psnr_db"] == 99 and exact["sharpness"] == 1 and exact["fd_proxy"] < 1e-3
    assert exact["consistency"] == 0 and mean["sharpness"] == 0
    by_hand = 10 * np.log10(255**2 / ((true - 128.0) ** 2).mean((1, 2, 3))).mean()
    assert mean["psnr_db"] == pytest.approx(by_hand, abs=0.01)
    small = true.reshape(4, 4, 2, 4, 2, 3).mean((2, 4))
    off = ((np.rint(small) - 128) ** 2).mean() ** 0.5
    assert mean["consistency"] == pytest.approx(off, abs=0.05)
    assert not found["claims"]["psnr"]["holds"] and found["claims"]["sharpness"]["holds"]
    assert drawn["bicubic"].shape == true.shape


def test_flat_pictures_have_figures_too_and_sets_take_turns(monkeypatch):
    true = np.full((4, 8, 8, 3), 90, np.uint8)
    model = Cascade([(Stage(stage_of()), {})], None, name="m")
    monkeypatch.setattr(figures, "draw", lambda *given, desc: true)
    found, _ = figures.enlarged({"SR3": model, "regression": model}, true, 0)
    assert found["figures"]["SR3"]["psnr_db"] == 99 and found["figures"]["SR3"]["sharpness"] == 1
    assert not found["claims"]["sharpness"]["holds"]
    np.testing.assert_array_equal(figures._by_set([1.0, 2.0, 3.0, 400.0]), [[1, 3], [2, 99]])


def test_each_picture_has_its_own_seed_and_none_is_both_measured_and_chosen_by(monkeypatch):
    model, asked = Cascade([(Stage(stage_of()), {})], None, name="m"), []

    class Numbered(list):
        resolution = 8

        def open(self, resolution):
            return self

    every = [{"image": np.full((8, 8, 3), i, np.uint8)} for i in range(80)]
    monkeypatch.setattr(figures, "dataset", lambda words: Numbered(every))
    true, others = figures.pictures(model, "any", 10)
    numbers = [set(x[:, 0, 0, 0].tolist()) for x in (true, others)]
    assert [len(x) for x in numbers] == [20, 20] and not numbers[0] & numbers[1]
    assert max(numbers[0] | numbers[1]) > 70  # spread over all of it

    def sample(self, params, given, keys, settings):
        asked.append(jax.random.key_data(keys)[:, -1])
        return jnp.repeat(jnp.repeat(given["lowres"][0], 2, 1), 2, 2)

    monkeypatch.setattr(Stage, "sample", sample)
    np.testing.assert_array_equal(figures.draw(model, true, 7, stage_of().sampling, "x"), true)
    np.testing.assert_array_equal(np.concatenate(asked)[:20], 7 + np.arange(20))


def test_a_regression_of_other_sizes_is_refused():
    model = Cascade([(Stage(stage_of()), {})], None, name="m")
    figures.check_alike(model, model)
    lowres = dataclasses.replace(stage_of().conditions[0], resolution=2)
    other = dataclasses.replace(stage_of(), conditions=(lowres,))
    with pytest.raises(UserError, match="--regression r: must enlarge as m does, from 4 px to 8"):
        figures.check_alike(model, Cascade([(Stage(other), {})], None, name="r"))


def test_the_search_takes_the_schedule_that_is_nearest_on_other_pictures(monkeypatch, tmp_path):
    true = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    model = Cascade([(Stage(stage_of()), {})], None, name="m")
    asked = []

    def draw(model, on, seed, settings, desc):
        """The more a schedule bends, the greyer."""
        asked.append((settings.grid, settings.steps, on is true))
        bend = settings.grid.rho / 10 if isinstance(settings.grid, Karras) else 1.0
        return (128 + (1 - bend) * (on - 128.0)).astype(np.uint8)

    monkeypatch.setattr(figures, "draw", draw)
    others = true[::-1].copy()
    found = figures.searched(model, others, true, 5, 3, 0, plot=tmp_path / "s.png")
    tried = [grid for grid, _, on_true in asked if isinstance(grid, Karras) and not on_true]
    assert len(tried) == 5 and {steps for _, steps, _ in asked} == {3}
    assert found["best"]["rho"] == min(grid.rho for grid in tried)
    assert found["fd_proxy"]["best"] < found["fd_proxy"]["own grid"]
    assert (tmp_path / "s.png").exists()


def test_the_evaluation_writes_what_it_prints(folder, tmp_path, capsys):
    model_folder(tmp_path / "m", stage_of())
    model_folder(tmp_path / "r", stage_of(1))
    words = ["eval", "sr3", "--model", str(tmp_path / "m"), "--regression", str(tmp_path / "r")]
    words += ["--data", f"folder:{folder / 'data'}", "--pictures", "2", "--search", "2"]
    cli.main([*words, "--search-steps", "2", "--out", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    assert set(told["figures"]) == {"SR3", "regression", "bicubic"} and told["pictures"] == 4
    assert told["search"]["tries"] == 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == told
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"sheet.png", "search.png"}
    for more, message in (
        (["--pictures", "1"], "must be 2 to 10000"),
        (["--pictures", "90"], "holds 16 pictures, and 360 are needed"),
        (["--model", "scenes"], "must be told a smaller picture and nothing else"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, *more, "--out", str(tmp_path / "other")])
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_model_that_reads_text_is_none():
    with pytest.raises(UserError, match="told a smaller picture and nothing else"):
        figures.lowres_of(testing.cascade())
    assert figures.lowres_of(Cascade([(Stage(stage_of()), {})], None)).resolution == 4
    other = dataclasses.replace(stage_of(), conditions=())
    with pytest.raises(UserError, match="told a smaller picture"):
        figures.lowres_of(Cascade([(Stage(other), {})], None, name="other"))


def test_the_model_that_ships_is_what_its_config_trains_and_enlarges(tmp_path, capsys):
    (stage,) = open_model("sr3").stages
    assert stage == config.load(str(CONFIGS / "sr64.py")).stage
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    picture[:] = picture.mean(axis=(0, 1))
    images.save_png(tmp_path / "small.png", picture)
    out = tmp_path / "large.png"
    cli.main(["enlarge", str(tmp_path / "small.png"), "--model", "sr3", "--out", str(out)])
    drawn = np.asarray(images.load_image(out)).astype(int)
    # Means over blocks of what is drawn are what was enlarged.
    assert drawn.shape == (64, 96, 3)
    assert np.abs(drawn.reshape(16, 4, 24, 4, 3).mean((1, 3)) - picture).mean() < 6
