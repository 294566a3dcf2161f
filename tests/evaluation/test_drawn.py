"""A model as one of the sets of pictures that `cascade eval fid` compares."""

import json

import numpy as np
import pytest
from PIL import Image

from cascade import testing
from cascade.commands import eval as evaluate
from cascade.errors import UserError
from cascade.evaluation import prompt_runs
from cascade.runner.cascade import Cascade

STAGES = (testing.smallest_stage(), testing.super_resolution_stage(8))


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """Every model's name is that of a tiny cascade of 8 and 16 px."""
    found = testing.cascade(STAGES)
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: found))
    return found


@pytest.fixture
def true(tmp_path):
    folder = tmp_path / "true"
    folder.mkdir()
    for i in range(5):
        picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def run(capsys, *argv):
    words = ("--network", "random", "--side", 8, "--no-compilation-cache")
    evaluate.main([*map(str, ("fid", *argv, *words))])
    return json.loads(capsys.readouterr().out)


def test_a_model_draws_the_captions_of_the_reference(model, true, tmp_path, capsys):
    out = tmp_path / "out"
    report = run(capsys, "model:tiny", true, "--out", out)
    assert {p.name for p in out.iterdir()} == {"drawn", "results.json", "sheet.png"}
    assert report["pictures"] == {"what": "model:tiny", "pictures": 5, "left_out": 0}
    for i in range(5):
        record = json.loads((out / "drawn" / f"{i:04d}.json").read_text())
        assert (record["prompt"], record["seed"]) == (f"picture {i}", 1000 * i)
        (own,) = model([f"picture {i}"], seed=1000 * i, until=8)
        drawn = np.asarray(Image.open(out / "drawn" / f"{i:04d}_8.png"))
        np.testing.assert_array_equal(drawn, own.images[8])
    again = run(capsys, f"samples:{out / 'drawn'}", true)
    assert again["fd_proxy"] == pytest.approx(report["fd_proxy"])


def test_it_draws_prompts_of_a_file_where_there_are_no_captions(true, tmp_path, capsys):
    run(capsys, true, "--save-statistics", tmp_path / "true.npz")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ring\na star\na circle\n")
    words = ("model:tiny", tmp_path / "true.npz", "--captions", prompts, "--count", 2)
    report = run(capsys, *words, "--out", tmp_path / "out")
    assert report["pictures"]["pictures"] == 2 and report["fd_proxy"] > 0
    with pytest.raises(UserError, match="needs --captions FILE, where no reference has captions"):
        run(capsys, *words[:2], "--out", tmp_path / "other")


def test_a_drawing_that_was_stopped_goes_on(model, true, tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "out", []
    whole = prompt_runs.output.write

    def stopped(*args, **options):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args)
        return whole(*args, **options)

    monkeypatch.setattr(prompt_runs.output, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, "model:tiny", true, "--out", out)
    drawn, draw = [], model.draw
    monkeypatch.setattr(prompt_runs.output, "write", whole)
    monkeypatch.setattr(model, "draw", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    assert run(capsys, "model:tiny", true, "--out", out)["pictures"]["pictures"] == 5
    assert len(drawn) == 2


def test_drawing_prompts_of_a_file_that_was_stopped_goes_on_too(
    true, tmp_path, capsys, monkeypatch
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ring\na star\n")
    whole = prompt_runs.output.write
    words = ("model:tiny", true, "--captions", prompts, "--out", tmp_path / "out")

    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt_runs.output, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *words)
    monkeypatch.setattr(prompt_runs.output, "write", whole)
    assert run(capsys, *words)["pictures"]["pictures"] == 2


@pytest.mark.parametrize(
    "words,said",
    [
        (("model:tiny", "true"), "needs --out DIR"),
        (("true", "model:tiny", "--out", "out"), "give it as PICTURES"),
        (("model:tiny", "true", "--out", "out", "--side", "64"), "draws 16 px at most"),
        (("model:tiny", "true", "--out", "out", "--seed", 2**32 - 1), "seeds are below 2"),
    ],
)
def test_mistakes_are_told(words, said, true, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        run_as_given(*words)
    assert not (tmp_path / "out").exists()


def run_as_given(*words):
    evaluate.main([*map(str, ("fid", "--network", "random", "--side", 8, *words))])
