"""`cascade eval`: its distances against closed forms, its commands on models of known quality."""

import csv
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import scipy.linalg
from fixtures.feature_networks import clip_folder

from cascade import images, testing
from cascade.commands import eval as evaluate
from cascade.errors import UserError
from cascade.evaluation import page, quality, scenes
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.page import SETS, Judged
from cascade.models import EfficientLevel, EfficientUNetConfig, Level, UNetConfig
from cascade.runner.cascade import Cascade, Picture
from cascade.scenes.captions import Caption, Facts, Thing, caption_at
from cascade.scenes.judge import judge
from cascade.scenes.render import render
from cascade.scenes.spec import scene_at
from cascade.stage import LowRes, Pixels, Stage, StageConfig, Text

# Distances.


def test_the_distance_of_a_set_to_itself_is_zero():
    x = np.random.default_rng(0).standard_normal((50, 6))
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_the_distance_of_a_shifted_set_is_the_square_of_the_shift():
    x = np.random.default_rng(0).standard_normal((50, 6))
    assert quality.frechet_distance(x, x + 2) == pytest.approx(6 * 4)


def test_the_distance_of_a_scaled_set_is_that_of_its_standard_deviations():
    x = np.random.default_rng(0).standard_normal((50, 6))
    x -= x.mean(axis=0)
    expected = np.trace(np.cov(x, rowvar=False)) * (3 - 1) ** 2
    assert quality.frechet_distance(3 * x, x) == pytest.approx(expected)


def test_the_distance_agrees_with_a_matrix_square_root_that_does_not_commute():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)) for _ in range(2))
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(axis=0) - y.mean(axis=0)
    expected = gap @ gap + np.trace(c1 + c2 - 2 * np.real(scipy.linalg.sqrtm(c1 @ c2)))
    assert quality.frechet_distance(x, y) == pytest.approx(expected)
    assert quality.frechet_distance(y, x) == pytest.approx(expected)


def test_the_distance_stays_finite_with_fewer_rows_than_columns():
    x, y = np.random.default_rng(0).standard_normal((2, 4, 30))
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert 0 < quality.frechet_distance(x, y) < np.inf
    with pytest.raises(ValueError, match="two pictures or more"):
        quality.frechet_distance(x[:1], y)


def test_fd_proxy_grows_with_what_is_wrong():
    true, other = ([render(scene_at(s, i, "seen"), 64) for i in range(40)] for s in (0, 1))

    def distance(pictures):
        return quality.frechet_distance(quality.features(pictures), quality.features(true))

    chance = distance(other)
    blurred = [quality.bicubic(quality.bicubic(p, 16), 64) for p in true]
    assert distance(true) == pytest.approx(0, abs=1e-9)
    assert distance([p // 2 for p in true]) > 2 * chance
    assert distance(blurred) > 0


def test_psnr_and_gradient_energy_of_simple_pictures():
    flat = np.full((8, 8, 3), 100, np.uint8)
    assert quality.psnr(flat, flat + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert quality.psnr(flat, flat) == np.inf
    step = flat.copy()
    step[:, 4:] += 10
    assert quality.gradient_energy(flat) == 0
    assert quality.gradient_energy(step) == 8 * 3 * 10**2


# A model of known quality: it draws the renders of the scenes that prompts come from.


class Renderer(Cascade):
    """A 64 -> 256 px cascade that knows the scene behind each seed and draws it.

    spoil: of (side, picture), done to each.
    """

    def __init__(self, spoil=lambda side, picture: picture):
        base = UNetConfig(levels=(Level(width=8, blocks=1),), head_width=8)
        upper = EfficientUNetConfig(levels=(EfficientLevel(width=8, blocks=1),), head_width=8)
        text = Text(width=8, head_width=8)
        configs = [
            StageConfig(
                name="base64", space=Pixels(resolution=64), conditions=(text,), network=base
            ),
            StageConfig(
                name="sr256",
                space=Pixels(resolution=256),
                conditions=(LowRes(resolution=64), text),
                network=upper,
            ),
        ]
        super().__init__([(Stage(c), {}) for c in configs], testing.FakeEncoder(), name="renderer")
        self.spoil = spoil

    def draw(self, prompts, *, seed, until=None, lowres=None, settings=None, **rest):
        stages = self.select(until=until, lowres=None if lowres is None else len(lowres))
        assert len(settings) == len(stages) and not rest
        found = [caption_at(0, seed, name) for name in SETS]
        scene = next(scene for scene, said in found if said.text == prompts)
        sides = [stage.config.resolution for stage, _ in stages]
        pictures = {side: self.spoil(side, render(scene, side)) for side in sides}
        yield Picture(prompts, seed, pictures, {})


@pytest.fixture
def renderer(monkeypatch):
    """Makes every model a Renderer; returns the one that is loaded."""
    model = Renderer()
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: model))
    return model


def run(capsys, *argv):
    evaluate.main([*map(str, argv), "--no-compilation-cache"])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_perfect_model_has_every_fact_right_at_every_size(renderer, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    report, progress = run(capsys, "scenes", "--prompts", 4, "--set", "all", "--out", out)
    assert set(report["sets"]) == set(SETS)
    for sides in report["sets"].values():
        assert set(sides) == {"64", "256"}
        for one in sides.values():
            assert one["pictures"] == one["prompts"]["n"] == one["prompts"]["right"] == 4
            assert one["facts"]["share"] == 1
            assert one["edges"]["outlines"] > 0 and one["edges"]["distance"] < 0.02
    assert report["sets"]["unseen"]["64"]["unseen"]["n"] >= 4
    assert "finish" not in report["sets"]["long"]["64"]["categories"]
    assert report["settings"]["sr256"]["steps"] == renderer.settings[1].steps
    assert "12/12" in progress and "picture" in progress
    results = json.loads((out / "results.json").read_text())
    assert results["sets"] == report["sets"] and len(results["pictures"]) == 12
    for one in results["pictures"]:
        assert all((out / file).is_file() for file in one["files"].values())
        assert one["edges"].keys() == one["verdicts"].keys()


def test_lists_by_stage_are_of_the_stages_that_draw(renderer, tmp_path, capsys):
    argv = ["scenes", "--prompts", 1, "--steps", "7", "--until", 64, "--out", tmp_path / "out"]
    report, _ = run(capsys, *argv, "--guidance", "2", "--guidance-plan", "interval:1:9")
    assert set(report["settings"]) == {"base64"}
    plan = report["settings"]["base64"]["guidance_plan"]
    assert (plan["low"], plan["high"]) == (1, 9)
    assert report["settings"]["base64"]["steps"] == 7
    assert report["settings"]["base64"]["guidance"] == 2


def test_the_page_shows_every_picture_with_the_worst_first(renderer, tmp_path, capsys):
    spoilt = render(scene_at(0, 2, "seen"), 64)
    renderer.spoil = lambda side, picture: (
        np.zeros_like(picture) if np.array_equal(picture, spoilt) else picture
    )
    out = tmp_path / "out"
    report, _ = run(capsys, "scenes", "--prompts", 5, "--until", 64, "--out", out)
    assert report["sets"]["seen"]["64"]["prompts"]["right"] == 4
    text = (out / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', text)
    assert sorted(shown) == [f"pictures/seen_{i:04d}_64.png" for i in range(5)]
    assert shown[0] == "pictures/seen_0002_64.png" and all((out / s).is_file() for s in shown)
    first, second = text.split("<article>")[1:3]
    assert caption_at(0, 2, "seen")[1].text in first and "none found" in first
    assert "wrong" in first and "wrong" not in second
    assert "<script" not in text and "http" not in text
    n = report["sets"]["seen"]["64"]["edges"]["outlines"]
    assert "outlines off by, px" in text and f"{n} outlines" in text


def test_the_page_escapes_what_it_shows(tmp_path):
    facts = Facts(things=(Thing(shape="circle", colour="red"),))
    one = Judged(
        set="seen",
        seed=0,
        prompt=Caption(text="<script>&", facts=facts),
        files={64: 'a".png'},
        verdicts={64: judge(np.zeros((64, 64, 3), np.uint8), facts)},
        edges={64: []},
    )
    page.write(tmp_path / "p.html", [one], {})
    text = (tmp_path / "p.html").read_text()
    assert "&lt;script&gt;&amp;" in text and "<script" not in text and 'a".png' not in text


def test_super_resolution_figures_of_the_truth_and_of_bicubic(renderer, tmp_path, capsys):
    report, _ = run(capsys, "sr", "--pictures", 4, "--out", tmp_path / "out")
    one = report["stages"]["sr256"]
    assert (one["lowres"], one["resolution"], one["pictures"]) == (64, 256, 4)
    assert one["model"] == {"psnr_db": None, "sharpness": 1, "fd_proxy": pytest.approx(0, abs=1e-9)}
    assert 15 < one["bicubic"]["psnr_db"] < 40 and one["bicubic"]["sharpness"] < 0.8
    assert one["bicubic"]["fd_proxy"] > 1e-6 and one["truth"]["fd_proxy"] > 1e-6
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "sr256.png"}


def test_lists_of_super_resolution_count_its_stages_alone(renderer, capsys):
    argv = ["sr", "--pictures", 2, "--steps", "3", "--guidance", "2", "--aug-level", "0.1"]
    report, _ = run(capsys, *argv)
    of_sr = report["settings"].pop("sr256")
    assert (of_sr["steps"], of_sr["guidance"], of_sr["aug_level"]) == (3, 2, 0.1)
    assert not report["settings"]
    with pytest.raises(UserError, match="3 values for 1 stage "):
        run(capsys, "sr", "--pictures", 2, "--steps", "3,4,5")


def test_a_sweep_has_a_row_for_every_combination(renderer, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--guidance", "1,2,4", "--aug-level", "0,0.1", "--prompts", 3, "--out", out]
    report, progress = run(capsys, "sweep", *argv)
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    combinations = {(row["side"], row["guidance"], row["aug_level"]) for row in rows}
    assert len(combinations) == len(rows) == len(report["points"]) == 3 + 3 * 2
    assert {row["aug_level"] for row in rows if row["side"] == "64"} == {""}
    assert all(float(row["facts"]) == 1 and float(row["fd_proxy"]) < 1e-9 for row in rows)
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "27/27" in progress


def test_a_sweep_stops_before_the_last_stage(renderer, tmp_path, capsys):
    before = renderer.stages[1][0].config
    last = dataclasses.replace(
        before,
        name="sr1024",
        space=Pixels(resolution=1024),
        conditions=(LowRes(resolution=256), before.text),
    )
    renderer.stages = [*renderer.stages, (Stage(last), {})]
    argv = ["--guidance", "1", "--aug-level", "0.1", "--prompts", 2, "--out", tmp_path / "out"]
    report, _ = run(capsys, "sweep", *argv, "--until", 256)
    assert [(row["side"], row["aug_level"]) for row in report["points"]] == [(64, None), (256, 0.1)]


def test_a_sweep_lays_its_values_over_the_stages(renderer, tmp_path, capsys, monkeypatch):
    drawn = []
    draw = renderer.draw

    def recording(prompts, *, settings, lowres=None, **rest):
        drawn.append((lowres is None, settings[0].guidance, settings[0].aug_level))
        return draw(prompts, settings=settings, lowres=lowres, **rest)

    monkeypatch.setattr(renderer, "draw", recording)
    argv = ["--guidance", "1,6", "--aug-level", "0.3", "--prompts", 2, "--out", tmp_path / "out"]
    run(capsys, "sweep", *argv)
    default = renderer.settings[1].guidance
    assert set(drawn) == {(True, 1, 0), (True, 6, 0), (False, default, 0.3)}


@pytest.mark.parametrize(
    "argv,message",
    [
        (["scenes", "--prompts", "0"], "--prompts must be 1 or more, got 0"),
        (["scenes", "--seed", "-1"], "--seed must be in"),
        (["scenes", "--set", "train"], "--set"),
        (["scenes", "--until", "128"], "this model draws 64, 256 px"),
        (["scenes", "--steps", "1,2,3"], "3 values for 2 stages"),
        (["sweep", "--guidance", "1,x"], "--guidance 1,x: must be numbers"),
        (["sweep", "--aug-level", "2"], "levels must be in [0, 1]"),
        (["sr", "--pictures", "1"], "--pictures must be 2 or more"),
        (["scene"], "did you mean 'scenes'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(renderer, tmp_path, argv, message):
    out = ["--out", str(tmp_path / "out"), "--no-compilation-cache"] if len(argv) > 1 else []
    with pytest.raises(UserError) as e:
        evaluate.main([*argv, *out])
    assert message in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["scenes", "sr", "sweep"])
def test_a_folder_that_holds_something_is_refused(renderer, tmp_path, command):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="name a new or empty folder"):
        evaluate.main([command, "--out", str(tmp_path), "--no-compilation-cache"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_whose_pictures_cannot_be_read_is_refused(monkeypatch, tmp_path):
    stage = Stage(testing.base_stage())
    model = Cascade([(stage, {})], testing.FakeEncoder())
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: model))
    with pytest.raises(UserError, match="draws 8 px; scenes are read at 64, 256, 1024 px"):
        evaluate.main(["scenes", "--out", str(tmp_path / "out"), "--no-compilation-cache"])


@pytest.mark.parametrize("null", [False, True])
def test_super_resolution_can_be_kept_from_the_prompt(monkeypatch, null):
    told = {}

    def sample(self, params, given, keys, *, settings, **rest):
        told[self.config.name] = bool(given["text"].mask.any()), bool(given["text"].tokens.any())
        base = jax.random.uniform(keys[0], (1, 64, 64, 3), minval=-1)
        lowres, *_ = given.get("lowres", (None,))
        return base if lowres is None else images.upsample(lowres, (256, 256))

    monkeypatch.setattr(Stage, "sample", sample)
    model = Cascade(Renderer().stages, testing.FakeEncoder())
    settings = {stage.config.name: stage.config.sampling for stage, _ in model.stages}
    drawer = Drawer(cascade=model, settings=settings, null_text_in_sr=null)
    drawn = drawer("red circle", 3)
    assert told == {"base64": (True, True), "sr256": (not null, not null)}
    assert set(drawn) == {64, 256}
    expected = images.upsample(images.to_float(drawn[64])[None], (256, 256))[0]
    np.testing.assert_allclose(drawn[256].astype(int), images.to_uint8(expected), atol=1)


def test_the_words_of_an_evaluation_reach_it(renderer, tmp_path, capsys, monkeypatch):
    told = []

    def spy(drawer, folder, *, seed, **_):
        told.append((seed, drawer.null_text_in_sr))
        return {}, []

    monkeypatch.setattr(scenes, "evaluate_scenes", spy)
    report, _ = run(
        capsys, "scenes", "--seed", 9, "--null-text-in-sr", "true", "--out", tmp_path / "o"
    )
    assert told == [(9, True)] and report["null_text_in_sr"] is True


def test_the_best_of_several_is_what_is_judged(renderer, tmp_path, capsys, monkeypatch):
    asked = []
    true = renderer.draw

    def recording(prompt, **options):
        asked.append((options.pop("best_of"), options.pop("judge")))
        return true(prompt, **options)

    monkeypatch.setattr(renderer, "draw", recording)
    clip = clip_folder(tmp_path / "clip", tokenizer=True)
    words = ["scenes", "--out", tmp_path / "out", "--prompts", "2", "--until", "64"]
    report, _ = run(capsys, *words, "--best-of", "3", "--clip", clip)
    assert [n for n, _ in asked] == [3, 3] and asked[0][1].__name__ == "likeness"
    assert (report["best_of"], report["clip"]) == (3, str(clip))
    with pytest.raises(UserError, match="go together"):
        run(capsys, *words[:2], tmp_path / "other", "--best-of", "3")
