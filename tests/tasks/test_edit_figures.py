"""What `cascade eval edit` measures, on drawers whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cascade import cli
from cascade.runner.cascade import Cascade
from cascade.scenes.render import render
from cascade.tasks.edit import evaluate, figures


class Picture:
    def __init__(self, image):
        self.image = image


class Painter(Cascade):
    """In place of a model: it draws the true scenes, or blurs of them, as it is told."""

    def __init__(self, scenes, how):
        self._truth = {case.seed: render(case.scene, 64) for own in scenes for case in own}
        self._how = how
        self.stages = [(SimpleNamespace(config=SimpleNamespace(resolution=64)), None)]
        self.digest, self.name = "none", "painter"

    def __call__(self, prompt, *, init, seed, until, strength, mask=None):
        return [Picture(self._how(self._truth[seed], init, mask, strength))]


@pytest.fixture(scope="module")
def scenes():
    return figures.cases(0, 3)


def test_scenes_have_several_things_and_are_told_apart(scenes):
    seeds = [case.seed for own in scenes for case in own]
    assert [len(own) for own in scenes] == [3, 3] and len(set(seeds)) == 6
    assert all(len(case.said.facts.things) > 1 for own in scenes for case in own)


def test_strokes_have_six_colours_and_the_layout_of_the_scene(scenes):
    for case in scenes[0]:
        painted, true = figures.strokes(case.scene, 256), render(case.scene, 256)
        assert len(np.unique(painted.reshape(-1, 3), axis=0)) <= 6
        apart = np.abs(painted.astype(int) - true).mean()
        assert 0 < apart < np.abs(true.astype(int) - true.mean((0, 1))).mean()


def test_the_hole_hides_the_last_object_and_not_everything(scenes):
    for case in scenes[0]:
        mask, thing = figures.hole(case.scene, 64), case.scene.objects[-1]
        assert mask[int(thing.y * 64), int(thing.x * 64)] and 0.01 < mask.mean() < 0.7
        without = render(
            type(case.scene)(background=case.scene.background, objects=case.scene.objects[:-1]), 64
        )
        np.testing.assert_array_equal(render(case.scene, 64)[~mask], without[~mask])


def test_the_seam_is_the_step_across_the_masks_edge():
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    picture = np.where(mask[..., None], np.uint8(40), np.full((8, 8, 3), 10, np.uint8))
    assert figures.seam(picture, mask) == 30
    assert figures.seam(np.full((8, 8, 3), 7, np.uint8), mask) == 0


def test_what_is_nearer_to_the_truth_scores_better(scenes):
    def how(true, init, mask, strength):
        share = float(strength)
        return np.rint(share * true + (1 - share) * init).astype(np.uint8)

    rows, tiles = figures.strokes_kept(Painter(scenes, how), scenes, ["0.5", "1"])
    assert [row["strength"] for row in rows] == ["0", "0.5", "1"] and len(tiles) == 18
    apart, fd = [row["distance"] for row in rows], [row["fd_proxy"] for row in rows]
    assert apart[0] == 0 < apart[1] < apart[2] and abs(fd[2]) < 1e-3 < fd[0]
    assert rows[2]["facts"]["share"] == 1


def test_a_way_that_fills_holes_with_the_truth_beats_one_that_leaves_them(scenes):
    def true(case, picture, mask):
        return picture

    def grey(case, picture, mask):
        return np.where(mask[..., None] > 0, np.uint8(255), picture)

    found, tiles = figures.holes_filled(Painter(scenes, None), scenes, {"grey": grey, "true": true})
    assert found["facts"].holds and found["seam"].holds and len(tiles) == 3 * 4
    assert (found["facts"].figures["true"] == 1).all()
    swapped = figures.holes_filled(Painter(scenes, None), scenes, {"true": true, "grey": grey})[0]
    assert not swapped["facts"].holds and not swapped["seam"].holds


def test_a_way_that_changes_what_stays_is_an_error(scenes):
    def wrong(case, picture, mask):
        return picture ^ 1

    with pytest.raises(AssertionError, match="has changed what was to stay"):
        figures.holes_filled(Painter(scenes, None), scenes, {"wrong": wrong})


def test_the_command_leaves_plots_sheets_and_figures(scenes, tmp_path, monkeypatch, capsys):
    scenes = figures.cases(0, 2)
    painter = Painter(scenes, lambda true, *_: true)
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: painter))
    words = ["--pictures", "2", "--strengths", "1", "--out", str(tmp_path / "out")]
    cli.main(["eval", "edit", *words])
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    assert report["pictures"] == 4 and set(report["holes"]) == {"facts", "seam"}
    for name in ("strokes.png", "strokes_sheet.png", "holes_sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    "words", [["--pictures", "1"], ["--seed", "-1"], ["--strengths", "0.5,2"], []]
)
def test_mistakes_are_told_before_anything_is_made(words, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")] if words else []
    with pytest.raises(SystemExit):
        cli.main(["eval", "edit", *words, *out])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_eval_tells_of_what_tasks_measure(capsys):
    cli.main(["eval", "--help"])
    first = (evaluate.__doc__ or "").partition("\n")[0].rstrip(".")
    assert f"  edit        {first[:1].lower()}{first[1:]}" in capsys.readouterr().out
