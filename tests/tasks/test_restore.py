"""Palette: pictures are damaged, and drawn while the damaged one is shown."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import model_folder
from PIL import Image

from cascade import cli, config, images, testing
from cascade.data import FolderData
from cascade.data.mixture import Mixture
from cascade.errors import UserError
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.runner.cascade import Cascade
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels, Sampling, Stage, StageConfig
from cascade.stage.conditions import Keys
from cascade.tasks.restore.damage import EVERY, DamagedData, Grey, Holes, Jpeg, Sides, grey
from cascade.tasks.restore.restoring import restorer, whole_picture
from cascade.tasks.restore.source import Restoring, Source
from cascade.tasks.restore.tints import COMMON, RARE, TintsData, is_common
from cascade.tasks.restore.training import RestoreTraining, restored
from cascade.training.job import Job
from cascade.training.loop import fit


def stage_of(**fields):
    return StageConfig(
        name="restore8",
        space=Pixels(resolution=8),
        conditions=(Source(**fields),),
        network=EfficientUNetConfig(
            levels=(EfficientLevel(width=8, blocks=1, stride=1), EfficientLevel(width=8, blocks=1)),
            head_width=8,
        ),
        prediction="x0",
        sampling=Sampling(steps=2, guidance=1.0),
    )


def noisy(n, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def test_grey_is_the_luma_of_another_library():
    picture = noisy(1, 32)[0]
    theirs = np.asarray(Image.fromarray(picture).convert("L")).astype(int)
    made = Grey()(picture, np.random.default_rng(0))
    assert made.hole.all() and np.abs(made.source.astype(int) - theirs[..., None]).max() <= 1


def test_jpeg_is_that_of_a_quality_between_the_two_and_good_ones_are_rare():
    picture = np.asarray(Image.fromarray(noisy(1, 4)[0]).resize((32, 32)))

    def file(quality):
        held = io.BytesIO()
        Image.fromarray(picture).save(held, format="JPEG", quality=quality)
        return np.asarray(Image.open(held)).tobytes()

    known = {file(quality): quality for quality in range(5, 31)}
    assert len(known) > 20
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        found.append(known[Jpeg()(picture, rng).source.tobytes()])
    # exp(-q / 10) from 5 to 30: the mean is 5 + 10 (1 - 2.6 e^-2.6 / (1 - e^-2.6)) or so.
    assert min(found) == 5 and 25 < max(found) <= 30 and 12 < np.mean(found) < 14.5
    with pytest.raises(ValueError, match=r"Jpeg.quality must be two of 1..95"):
        Jpeg(quality=(30, 5))


def test_holes_are_strokes_and_boxes_that_cover_what_they_should():
    rng, picture = np.random.default_rng(0), noisy(1, 32)[0]
    boxed = [Holes(strokes=0.0)(picture, rng).hole for _ in range(200)]
    covered = np.array([hole.mean() for hole in boxed])
    # Boxes may overlap, so some pictures have less than was wanted.
    assert covered.max() < 0.45 and covered.min() > 0.02 and 0.15 < covered.mean() < 0.3
    brushed = [Holes(strokes=1.0)(picture, rng).hole for _ in range(200)]
    share = np.array([hole.mean() for hole in brushed])
    assert 0 < share.min() and share.max() < 1 and 0.1 < share.mean() < 0.5
    for hole in (*boxed, *brushed):
        assert set(np.unique(hole.view(np.uint8))) <= {0, 1}  # no other byte passes for True
    made = Holes()(picture, rng)
    np.testing.assert_array_equal(made.source, picture)


def test_a_half_of_the_picture_is_left_on_one_side_or_in_the_middle():
    rng, picture, seen = np.random.default_rng(0), noisy(1, 16)[0], []
    for _ in range(400):
        hole = Sides()(picture, rng).hole
        assert 0.45 < hole.mean() < 0.57
        rows, columns = np.nonzero(~hole)
        seen.append((rows.min(), rows.max(), columns.min(), columns.max()))
    kinds = {kind: seen.count(kind) / 400 for kind in set(seen)}
    middle = [kind for kind in kinds if kind[0] > 0 and kind[1] < 15]
    assert len(kinds) == 5 and len(middle) == 1
    assert abs(kinds.pop(middle[0]) - 0.5) < 0.08
    assert all(abs(share - 0.125) < 0.06 for share in kinds.values())


def test_a_dataset_is_damaged_as_the_generator_says_and_keeps_its_parts():
    both = Mixture(sources=(TintsData(size=3), ScenesData(size=5)), weights=(1.0, 2.0))
    source = DamagedData(whole=both, damages=EVERY).open(16)
    assert len(source) == 8 and [size for size, _ in source.parts] == [3, 5]
    one, same, other = (source.drawn(4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for name in ("image", "source", "hole"):
        np.testing.assert_array_equal(one[name], same[name])
    assert any((one[name] != other[name]).any() for name in ("source", "hole"))
    assert one["hole"].shape == (16, 16, 1) and one["image"].shape == one["source"].shape


def told_of(condition, source, hole, seed=0):
    batch = {"source": source, "hole": hole}
    keys = Keys(*jax.random.split(jax.random.key(seed), 3))
    return condition.of_batch(batch, keys, None, source.shape[1:])


def test_the_network_sees_noise_in_holes_and_is_told_of_no_mask():
    source, hole = noisy(2), np.zeros((2, 8, 8, 1), bool)
    hole[0, :4], hole[1] = True, True
    value = told_of(Source(), source, hole)
    level = images.to_float(source)
    known = np.where(hole, 0, level)
    np.testing.assert_allclose(np.where(hole, 0, value[0]), known, atol=1e-6)
    # Where all is drawn nothing is hidden: the second is a grey picture, or a JPEG.
    np.testing.assert_allclose(value[0][1], level[1], atol=1e-6)
    drawn = np.asarray(value[0])[0, :4]
    assert abs(drawn.mean()) < 0.4 and 0.7 < drawn.std() < 1.3
    assert (np.abs(drawn - level[0, :4]) > 0.1).any()
    module = Source().build(stage_of().network, rngs=None)
    (channels,) = module(*value).channels
    assert channels.shape == (2, 8, 8, 3)


def test_errors_count_in_holes_alone():
    stage = Stage(stage_of())
    params = jax.jit(stage.init)(
        jax.random.key(0, impl="rbg")
    )  # whose predictions are zero, whatever it is shown
    truth, hole = noisy(4), np.zeros((4, 8, 8, 1), bool)
    hole[:, :4] = True

    @jax.jit
    def loss(image):
        batch = {"image": jnp.asarray(image), "source": truth, "hole": hole}
        return stage.loss(params, batch, jax.random.key(1))[0]

    outside, inside = truth.copy(), truth.copy()
    outside[:, 4:] ^= 255
    inside[:, :2] //= 2
    assert loss(outside) == loss(truth) != loss(inside)


def test_what_is_known_is_in_the_picture_exactly_and_each_depends_on_itself_alone():
    stage = Stage(stage_of())
    params = testing.lively(stage)
    source, hole = noisy(3), np.zeros((3, 8, 8, 1), bool)
    hole[:, 2:5, 3:] = True
    drawn = restored(stage, params, source, hole)
    np.testing.assert_array_equal(np.where(hole, 0, drawn), np.where(hole, 0, source))
    assert (drawn != source).any(axis=(1, 2, 3)).all()
    alone = restored(stage, params, source[1:2], hole[1:2], seed=1)
    assert np.abs(alone[0].astype(int) - drawn[1]).max() <= 1  # another batch is summed otherwise
    other = restored(stage, params, source[1:2], hole[1:2], seed=9)
    assert (other[0] != drawn[1]).any()


def test_what_is_drawn_depends_on_what_is_known():
    stage = Stage(stage_of())
    params = testing.lively(stage)
    hole = np.zeros((1, 8, 8, 1), bool)
    hole[:, :4] = True
    one, two = (restored(stage, params, noisy(1, seed=s), hole)[0, :4] for s in (0, 1))
    assert (one != two).any()
    whole = np.ones_like(hole)
    one, two = (restored(stage, params, noisy(1, seed=s), whole)[0] for s in (0, 1))
    assert (one != two).any()


def test_an_untrained_residual_stage_draws_what_is_left():
    stage = Stage(stage_of(residual=True))
    params = jax.jit(stage.init)(jax.random.key(0, impl="rbg"))
    source, hole = noisy(1), np.ones((1, 8, 8, 1), bool)
    np.testing.assert_array_equal(restored(stage, params, source, hole), source)
    hole[:, 4:] = False
    drawn = restored(stage, params, source, hole)
    assert (np.abs(drawn[0, :4].astype(int) - 128) <= 1).all()
    with pytest.raises(ValueError, match=r'Source.residual is for prediction="x0"'):
        dataclasses.replace(stage_of(residual=True), prediction="v")


def test_squares_of_two_tints_have_one_grey_and_seven_in_ten_are_red():
    greys = [np.unique(grey(np.full((2, 2, 3), tint, np.uint8))) for tint in (COMMON, RARE)]
    assert greys == [[90], [90]]
    source = TintsData().open(16)
    red = np.mean([is_common(source[i]["image"]) for i in range(1000)])
    assert 0.65 < red < 0.75
    for tint, common in ((COMMON, True), (RARE, False)):
        picture = np.full((16, 16, 3), 242, np.uint8)
        picture[4:12, 2:10] = np.array(tint) + [9, 6, -9]
        assert is_common(picture) is common


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch over a folder, and the model that is made of it."""
    folder = tmp_path_factory.mktemp("restore")
    (folder / "data").mkdir()
    for i, picture in enumerate(noisy(8)):
        images.save_png(folder / "data" / f"{i}.png", picture)
        (folder / "data" / f"{i}.txt").write_text("a picture")
    job = RestoreTraining(
        stage=stage_of(),
        data=FolderData(path=str(folder / "data")),
        images=16,
        batch_size=8,
        log_every_images=8,
        validation=0.3,
        validate_every_images=8,
    )
    fit(job, folder / "run")
    cli.main(["export", str(folder / "run"), str(folder / "model")])
    return folder


def test_it_trains_on_a_folder_validates_and_shows_pictures(run):
    rows = [json.loads(line) for line in (run / "run" / "metrics.jsonl").open()]
    assert [row["images"] for row in rows] == [8, 16] and rows[-1]["validation/loss"] > 0
    (preview,) = (run / "run" / "previews").glob("*.png")
    w, h = Image.open(preview).size
    assert w > 3 * 8 and h > 6 * 8  # damaged, restored, true, in six rows


def words(run, tmp_path, *more):
    picture = tmp_path / "a.png"
    if not picture.exists():
        Image.fromarray(np.repeat(noisy(1, 20), 2, axis=2)[0, :13, :21]).save(picture)
        mask = np.zeros((13, 21), np.uint8)
        mask[3:6, 2:9] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
    return ["restore", str(picture), "--model", str(run / "model"), *more]


def test_the_command_restores_pictures_of_any_size(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cascade.devices.programs.use_compilation_cache", lambda: None)
    for task, more, size in (
        ("colouring", [], (21, 13)),
        ("jpeg", ["--steps", "1"], (21, 13)),
        ("inpainting", ["--mask", str(tmp_path / "mask.png")], (21, 13)),
        ("uncropping", ["--around", "0.5"], (41, 25)),
    ):
        out = tmp_path / f"{task}.png"
        cli.main(words(run, tmp_path, "--task", task, *more, "--out", str(out)))
        told = capsys.readouterr()
        assert json.loads(told.out)["task"] == task and f"{size[0]} x {size[1]} px" in told.err
        assert Image.open(out).size == size
    true = np.asarray(Image.open(tmp_path / "a.png"))
    filled = np.asarray(Image.open(tmp_path / "inpainting.png"))
    hole = np.asarray(Image.open(tmp_path / "mask.png")) > 0
    np.testing.assert_array_equal(filled[~hole], true[~hole])
    assert (filled[hole] != true[hole]).any()
    wider = np.asarray(Image.open(tmp_path / "uncropping.png"))
    np.testing.assert_array_equal(wider[6:19, 10:31], true)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "inpainting"], "needs --mask FILE"),
        (["--task", "jpeg", "--mask", "MASK"], "is for --task inpainting, and this is jpeg"),
        (["--task", "jpeg", "--around", "0.5"], "is for --task uncropping, and this is jpeg"),
        (["--task", "uncropping", "--around", "2"], "must be above 0, and at most 1"),
        (["--task", "inpainting", "--mask", "WHITE"], "white all over: leave something"),
        (["--task", "inpainting", "--mask", "BLACK"], "is 0 of 255 where it is brightest"),
        (["--task", "inpainting", "--mask", "SMALL"], "they must be of one size"),
        (["--task", "jpeg", "--steps", "0"], "must be 1 to 10,000"),
        (["--task", "jpeg", "--seed", "-1"], "must be in [0, 2^32)"),
        (["--task", "jpeg", "--out", "a.jpg"], "ends in .png"),
        (["--task", "jpeg", "--model", "PLAIN"], "restores no pictures; train one with"),
        (["--task", "jpeg", "--model", "ONE"], "has learned colouring alone; train one with"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(more, message, run, tmp_path, capsys):
    for name, level in (("WHITE", 255), ("BLACK", 0)):
        Image.fromarray(np.full((13, 21), level, np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "SMALL.png")
    if "PLAIN" in more:
        model_folder(tmp_path / "PLAIN", testing.base_stage(128))
    if "ONE" in more:
        model_folder(tmp_path / "ONE", stage_of(damages=(Grey(),)))
    places = {"MASK": tmp_path / "mask.png", "PLAIN": tmp_path / "PLAIN", "ONE": tmp_path / "ONE"}
    places |= {name: tmp_path / f"{name}.png" for name in ("WHITE", "BLACK", "SMALL")}
    given = words(run, tmp_path, "--out", str(tmp_path / "o.png"), "--no-such-option")[:-1]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, *(str(places.get(word, word)) for word in more)])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and message in told and told.count("error:") == 1
    assert not (tmp_path / "o.png").exists()


def test_a_picture_too_large_is_refused():
    model = Cascade([(Stage(stage_of()), {})], None)
    with pytest.raises(UserError, match="would have 5000x1000 px, more than 4194304 in all"):
        whole_picture(model, Image.new("RGB", (5000, 1000)), "jpeg")
    with pytest.raises(UserError, match="the mask is white all over"):
        white = Image.new("L", (8, 8), 255)
        whole_picture(model, Image.new("RGB", (8, 8)), "inpainting", mask=white)
    assert restorer(model, "jpeg") == stage_of()


def test_the_evaluation_compares_with_the_damaged_pictures(run, tmp_path, capsys):
    model_folder(tmp_path / "tints", stage_of(damages=(Grey(),)))
    words = ["eval", "restore", "--model", str(run / "model"), "--pictures", "2"]
    cli.main([*words, "--tints", str(tmp_path / "tints"), "--out", str(tmp_path / "report")])
    told = json.loads(capsys.readouterr().out)
    assert set(told["tasks"]) == {"colouring", "jpeg", "inpainting", "uncropping"}
    for found in told["tasks"].values():
        assert {"damaged", "restored"} == set(found["figures"]) and not found["holds"]
    (tints,) = told["tints"].values()
    assert (tints["share_in_training"], tints["red"]["n"], tints["two_differ"]["n"]) == (
        0.7,
        512,
        256,
    )
    assert (tmp_path / "report" / "sheet.png").exists()


def test_its_kinds_survive_json():
    job = RestoreTraining(stage=stage_of(), data=FolderData(path="x"), images=8, batch_size=8)
    written = json.loads(json.dumps(config.to_json(job)))
    assert config.from_json(Job, written) == job


def test_a_stage_that_is_told_of_no_damage_is_no_job_of_it():
    with pytest.raises(ValueError, match="must have a Source among its conditions"):
        RestoreTraining(
            stage=testing.base_stage(), data=FolderData(path="x"), images=8, batch_size=8
        )
    with pytest.raises(ValueError, match="none twice"):
        Source(damages=(Grey(), Grey()))


def test_a_run_begins_from_noise_where_it_draws_and_from_the_noised_picture_elsewhere():
    from cascade.diffusion.process import Cosine

    schedule, times = Cosine(logsnr_min=-2.0, logsnr_max=2.0), jnp.linspace(1.0, 0.0, 3)
    source, hole = jnp.full((1, 4, 4, 3), 0.5), jnp.zeros((1, 4, 4, 1), bool).at[:, :2].set(True)
    noise = jax.random.normal(jax.random.key(0), source.shape)
    start = Restoring(source=source, hole=hole).start(noise, schedule, times)
    np.testing.assert_array_equal(start.x[:, :2], noise[:, :2])
    alpha, sigma = (jax.nn.sigmoid(s * jnp.float32(-2.0)) ** 0.5 for s in (1, -1))
    np.testing.assert_allclose(start.x[:, 2:], (alpha * source + sigma * noise)[:, 2:], rtol=1e-5)
