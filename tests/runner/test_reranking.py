"""The best of several candidates of the first stage, chosen by a judge."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.feature_networks import clip_folder
from model_folders import model_folder
from PIL import Image

from cascade import cli, testing
from cascade.errors import UserError
from cascade.published import clip
from cascade.runner.progress import Bar, Progress

STAGES = (testing.smallest_stage(), testing.super_resolution_stage(8))


@pytest.fixture(scope="module")
def model():
    return testing.cascade(STAGES)


def brightness(pictures, prompts):
    return pictures.mean(axis=(1, 2, 3))


def test_what_is_kept_is_the_picture_of_the_seed_that_the_judge_likes_best(model):
    plain = model(["a ring"], seed=6, num=6, batch_size=2)  # candidates of the seeds 2 and 3
    likes = [brightness(p.images[8][None], None)[0] for p in plain]
    found = model(["a ring"], seed=2, num=2, best_of=3, judge=brightness, batch_size=2)
    for i, picture in enumerate(found):
        own = range(3 * i, 3 * i + 3)
        best = max(own, key=lambda k: likes[k])
        assert picture.seed == picture.metadata["seed"] == 6 + best
        for side in (8, 16):
            np.testing.assert_array_equal(picture.images[side], plain[best].images[side])
        told = picture.metadata["best_of"]
        assert told["seed"] == 2 + i and told["seeds"] == [6 + k for k in own]
        assert told["scores"] == pytest.approx([likes[k] for k in own])
    assert "best_of" not in plain[0].metadata


def test_the_judge_sees_all_candidates_with_their_prompts_and_no_larger_picture(model):
    seen = []

    def judge(pictures, prompts):
        seen.append((pictures.shape, list(prompts)))
        return np.arange(len(pictures))

    found = model(["a ring", "a star"], best_of=2, judge=judge, batch_size=2)
    assert seen == [((4, 8, 8, 3), ["a ring", "a star"] * 2)]
    assert [p.seed for p in found] == [1, 1] and list(found[0].images) == [8, 16]


def test_the_frames_are_those_of_the_picture_that_was_kept(model):
    options = {"frames": 2, "until": 8, "batch_size": 1}
    kept = model("a ring", best_of=3, judge=brightness, **options)[0]
    plain = model("a ring", seed=kept.seed, **options)[0]
    np.testing.assert_array_equal(kept.frames[8], plain.frames[8])


@pytest.mark.parametrize(
    "options,said",
    [
        ({"best_of": 2}, "best_of 2: needs a judge"),
        ({"best_of": 0, "judge": brightness}, "best_of.*0.*must be a whole number, 1 to 1024"),
        ({"best_of": 2, "judge": lambda p, t: p[0]}, r"for each of 2 pictures, got an array of"),
        ({"best_of": 2, "judge": lambda p, t: [np.nan] * 2}, "with 0 finite ones"),
        ({"best_of": 2, "judge": brightness, "seed": 2**31}, "seeds are below 2"),
        (
            {"best_of": 2, "judge": brightness, "noise": np.zeros((1, 8, 8, 3), np.float32)},
            "leave noise out",
        ),
        (
            {"best_of": 2, "judge": brightness, "lowres": np.zeros((8, 8, 3), np.uint8)},
            "leave lowres out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, said, model):
    with pytest.raises(UserError, match=said):
        model("a ring", batch_size=1, **options)


def test_a_clip_likes_a_picture_as_its_cosine_says(tmp_path):
    judge = clip.load(clip_folder(tmp_path, tokenizer=True))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (clip.AT_ONCE + 3, 8, 8, 3), dtype=np.uint8)
    texts = ["a red circle", "a blue circle"] * 10
    found = judge.likeness(pictures, texts[: len(pictures)])
    prepared = np.stack([judge.prepare(picture) for picture in pictures])
    cosines = (
        np.asarray(judge.images(judge.params, jnp.asarray(prepared))) @ judge.texts(texts[:2]).T
    )
    assert np.allclose(found, [cosines[i, i % 2] for i in range(len(pictures))], atol=1e-5)


def test_the_command_keeps_the_best_by_a_clip_and_says_so(tmp_path, capsys):
    folder = str(clip_folder(tmp_path / "clip", tokenizer=True))
    stages = (testing.smallest_stage(128), testing.super_resolution_stage(8, 128))
    model = str(model_folder(tmp_path / "model", *stages))
    out = tmp_path / "out"
    words = ["sample", "a red circle", "--model", model, "--no-compilation-cache"]
    cli.main([*words, "--out", str(out), "--best-of", "3", "--clip", folder])
    record = json.loads((out / "0000.json").read_text())
    told = record["best_of"]
    assert record["seed"] == told["seeds"][int(np.argmax(told["scores"]))]
    assert record["clip"] == folder and len(record["clip_sha256"]) == 64
    assert Image.open(out / "0000_16.png").text["seed"] == str(record["seed"])
    assert "8/8" in capsys.readouterr().err  # three times two steps, and two of the second stage
    for given in (["--best-of", "3"], ["--clip", folder]):
        with pytest.raises(SystemExit):
            cli.main([*words, "--out", str(tmp_path / "no"), *given])
        assert "go together" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_bar_knows_how_often_a_stage_draws(capsys):
    with Bar(2, {"a": 5, "b": 3}, shown=True, times={"a": 4}) as bar:
        assert bar._bar.total == 2 * (4 * 5 + 3)
        told = {"resolution": 8, "step": 0, "pictures": 1, "thought": None}
        bar.told(Progress(stage="a", steps=4, **told))
        assert bar._bar.total == 2 * (4 * 4 + 3)
