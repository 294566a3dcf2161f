"""Figures of what the averaged weights draw while a stage trains."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from fixtures.feature_networks import clip_folder
from PIL import Image

from cascade import cli, testing
from cascade.data import FolderData
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.evaluation import features
from cascade.evaluation.while_training import WhileTraining
from cascade.scenes.dataset import ScenesData
from cascade.stage import Stage
from cascade.training import loop, preview
from cascade.training.log import TrainingLog
from cascade.training.loop import fit
from cascade.training.stage_training import RunningStage, StageTraining

ENCODER = testing.FakeEncoder(width=128)


def job(**changes):
    given = {
        **{
            "stage": testing.smallest_stage(128),
            "data": ScenesData(),
            "images": 32,
            "batch_size": 8,
        },
        **{"eval_every_images": 16, "eval_pictures": 5, "log_every_images": 8},
        **{"preview_every_images": 0, "save_every_images": 32},
    }
    return StageTraining(**(given | changes))


@pytest.fixture(scope="module", autouse=True)
def plain_curves():
    """Curves are drawn, for one test looks at them."""


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_figures_are_in_the_rows_of_their_images_and_in_the_plot(tmp_path, monkeypatch):
    """They are of the averaged weights, and their time is no time of steps."""
    seen, averaged, paused, now = [], [], [], [0.0]
    true = loop.whole

    def whole(job, state, trained):
        averaged.append(trained is state["ema"])
        return true(job, state, trained)

    def clock():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(loop, "whole", whole)
    monkeypatch.setattr(TrainingLog, "pause", lambda log, seconds: paused.append(seconds))
    monkeypatch.setattr(loop.time, "perf_counter", clock)

    def evaluate(running, params):
        now[0] += 100
        seen.append(jax.tree.map(np.asarray, params))
        return {"eval/fd_proxy": float(len(seen)), "eval/facts": 0.5}

    assert fit(job(), tmp_path / "run", evaluate=evaluate)
    rows = rows_of(tmp_path / "run")
    assert len(averaged) >= 2 and all(averaged)
    assert [round(seconds) for seconds in paused if seconds > 1] == [100, 100]
    assert [row["images"] for row in rows if "eval/fd_proxy" in row] == [16, 32]
    assert [row["eval/fd_proxy"] for row in rows if "eval/fd_proxy" in row] == [1.0, 2.0]
    first, last = (jax.tree.leaves(params) for params in seen)
    assert any((a != b).any() for a, b in zip(first, last, strict=True))
    assert Image.open(tmp_path / "run" / "loss.png").size == (720, (4 + 2 * 2) * 120)


def test_nothing_is_evaluated_where_fewer_than_two_pictures_can_be_read(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no picture")
        (tmp_path / f"{i:02d}.txt").write_text(f"picture {i}")
    Image.new("RGB", (16, 16)).save(tmp_path / "20.png")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    folder = FolderData(path=str(tmp_path))
    with pytest.raises(UserError, match="eval_every_images=16: of what is evaluated fewer than"):
        RunningStage(job(data=folder), mesh)
    Image.new("RGB", (16, 16)).save(tmp_path / "30.png")
    running = RunningStage(job(data=folder), mesh)
    assert [e["caption"] for e in running.examples(9)] == ["picture 20", "picture 30"]
    running.batches.close()


def test_inceptions_distance_is_called_fid_and_each_network_sees_pictures_for_itself(monkeypatch):
    def small(weights):
        network = features.of_random()
        seen = network.apply
        return dataclasses.replace(
            network, name=weights, suffix="", apply=lambda p, x: 2 * seen(p, x)
        )

    monkeypatch.setattr(features, "of_inception", small)
    evaluate = WhileTraining(job(eval_inception="w", eval_pictures=6))
    found = evaluate(Drawn(lambda picture: 255 - picture), None)
    assert set(found) == {"eval/fd_proxy", "eval/fid"}
    assert found["eval/fid"] == pytest.approx(4 * found["eval/fd_proxy"], rel=1e-3)


def test_a_stage_that_examples_say_too_little_for_is_told_of():
    class Silent(Drawn):
        def draw(self, params, examples):
            return None

    with pytest.raises(UserError, match="examples do not say all that .* set it to 0"):
        WhileTraining(job())(Silent(None), None)


class Drawn:
    """A run whose pictures are what `change` makes of the true ones."""

    embeds_all = True

    def __init__(self, change):
        self.change = change

    def draw(self, params, examples):
        return np.stack([self.change(example["image"]) for example in examples])


def test_true_pictures_have_all_facts_and_no_distance_and_noise_has_neither():
    stage = testing.base_stage(128)
    space = type(stage.space)(resolution=64)

    large = job(stage=dataclasses.replace(stage, space=space), eval_pictures=12)
    evaluate = WhileTraining(large)
    true = evaluate(Drawn(lambda picture: picture), None)
    assert true == {"eval/fd_proxy": pytest.approx(0, abs=1e-6), "eval/facts": 1.0}
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    worse = evaluate(Drawn(lambda picture: noise), None)
    assert worse["eval/fd_proxy"] > 1 and worse["eval/facts"] < 0.3


def test_the_clip_score_is_of_the_pictures_with_their_captions(tmp_path):
    folder = clip_folder(tmp_path / "clip", tokenizer=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["text_projection.weight"] *= -1  # so that cosines are above zero
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    named = job(eval_clip=str(folder), eval_pictures=6)
    found = WhileTraining(named)(Drawn(lambda picture: picture), None)
    assert set(found) == {"eval/fd_proxy", "eval/fd_clip", "eval/clip_score"}
    assert found["eval/fd_clip"] == pytest.approx(0, abs=1e-5)
    other = WhileTraining(named)(Drawn(lambda picture: 255 - picture), None)
    assert other["eval/fd_clip"] > 1e-3
    assert abs(other["eval/clip_score"] - found["eval/clip_score"]) > 0.01


def test_networks_that_are_missing_are_told_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match="CLIP none: no such folder"):
        WhileTraining(job(eval_clip="none"))
    with pytest.raises(UserError, match=r"Inception's weights none.*no such file; download https"):
        WhileTraining(job(eval_inception="none"))


def test_a_picture_is_that_of_its_caption_and_its_seed_however_many_are_drawn():
    stage = Stage(testing.base_stage(128))
    params = testing.lively(stage)
    source = ScenesData().open(8)
    examples = [source[i] for i in range(10)]
    found = preview.of(stage, params, examples, ENCODER)
    assert found.shape == (10, 8, 8, 3) and found.dtype == np.uint8
    few = preview.of(stage, params, examples[:3], ENCODER)
    np.testing.assert_array_equal(few, found[:3])
    other = preview.of(stage, params, [examples[1], examples[0]], ENCODER)
    assert (other[0] != found[0]).any()


def test_super_resolution_is_drawn_from_the_small_picture_of_the_example():
    stage = Stage(testing.super_resolution_stage(8, 128))
    params = testing.lively(stage)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    example = {"image": image, "caption": "a red circle"}
    turned = {**example, "image": image[::-1]}
    one, other = preview.of(stage, params, [example, turned], ENCODER)
    shuffled = image.copy()
    shuffled[:2, :2] = image[:2, :2][::-1, ::-1]  # of which block means tell nothing
    again = preview.of(stage, params, [{**example, "image": shuffled}], ENCODER)[0]
    np.testing.assert_array_equal(again, one)
    assert one.shape == (16, 16, 3) and (one != other).any()


def test_what_is_held_out_is_evaluated_where_anything_is(tmp_path):
    for i in range(40):
        Image.fromarray(np.full((16, 16, 3), 6 * i, np.uint8)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"picture {i}")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    stage = testing.base_stage(128)
    folder = FolderData(path=str(tmp_path))
    all_of, held_out = (
        RunningStage(job(stage=stage, data=folder, validation=share), mesh) for share in (0.0, 0.3)
    )
    captions = {e["caption"] for e in held_out.examples(100)}
    trained = {c for i in range(40) if (c := f"picture {i}") not in captions}
    assert 5 < len(captions) < 20 and len(trained) == 40 - len(captions)
    assert [e["caption"] for e in all_of.examples(3)] == [f"picture {i}" for i in range(3)]
    for running in (all_of, held_out):
        running.batches.close()


def test_the_words_of_the_command_line_reach_it(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from cascade import testing\n"
        "from cascade.scenes.dataset import ScenesData\n"
        "from cascade.training.stage_training import StageTraining\n"
        "def config():\n"
        "    stage = testing.smallest_stage(128)\n"
        "    return StageTraining(stage=stage, data=ScenesData(), images=16, batch_size=8,\n"
        "                         preview_every_images=0)\n"
    )
    run = tmp_path / "run"
    words = ["--workdir", str(run), "--eval-every-images", "16", "--eval-pictures", "3"]
    cli.main(["train", str(config), *words])
    assert rows_of(run)[-1]["eval/fd_proxy"] > 0
    with pytest.raises(SystemExit):
        cli.main(["train", str(config), *words, "--eval-pictures", "1"])
    assert "eval_pictures must be at least 2" in capsys.readouterr().err
