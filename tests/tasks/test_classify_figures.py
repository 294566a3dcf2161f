"""What `cascade eval classify` measures, on drawers whose answer is known."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from cascade import cli, testing
from cascade.models import Network
from cascade.runner.cascade import Cascade
from cascade.scenes import spec
from cascade.scenes.render import render
from cascade.stage import Pixels
from cascade.tasks.classify import classifier as classifiers
from cascade.tasks.classify import figures
from cascade.tasks.classify.classifier import ClassifierConfig
from cascade.tasks.classify.scenes import ATTRIBUTES

SMALL = ClassifierConfig(
    attributes=ATTRIBUTES, resolution=64, network=testing.base_stage().network, features=8
)
ASKED = figures.requests(0, 2)


def scene(colour, shape, background="gray", x=0.5):
    look = {"size": "big", "finish": "plain", "x": x, "y": 0.5, "radius": 0.2}
    thing = spec.Object(shape=shape, colour=colour, **look)
    return render(spec.Scene(background=background, objects=(thing,)), 64)


class Painter(Cascade):
    """In place of a model: it draws what is asked for with a probability that rises with the scale,
    and the surer it is, the more alike its pictures are."""

    def __init__(self):
        config = dataclasses.replace(testing.base_stage(), space=Pixels(resolution=64))
        self.stages = [(SimpleNamespace(config=config), None)]
        self.digest, self.name = "none", "painter"
        self.asked = []

    def __call__(self, prompt, *, seed, num, until, guidance, threshold, steering, batch_size):
        (own,) = steering
        self.asked.append((prompt, guidance, threshold))
        ground, colour = (name.split()[0] for name in own.names)
        sure = min(1.0, float(own.scale) / 4)
        drawn = []
        for i in range(num):
            rng = np.random.default_rng((seed, i))
            hit = (i + 1) / num <= sure
            place = 0.5 + 0.25 * (1 - sure) * (2 * rng.random() - 1)
            shape = prompt.split()[-1] if guidance else "cross"
            other = "white" if ground != "white" else "black"
            image = scene(colour, shape, ground if hit else other, place)
            drawn.append(SimpleNamespace(image=image))
        return drawn


def test_requests_differ_and_training_had_their_things():
    every = [one for own in figures.requests(0, 6) for one in own]
    assert len({(one.colour, one.shape) for one in every}) == 12
    assert {one.background for one in every} == set(spec.BACKGROUNDS)
    assert all((one.shape, one.colour) not in spec.HELD_OUT for one in every)
    assert {name for one in every for name in one.attributes.split(", ")} <= set(ATTRIBUTES)
    assert min(np.diff(sorted(one.seed for one in every))) >= figures.PER_REQUEST
    assert figures.Request("orange", "ring", "navy", 0).prompt == "an orange ring"
    assert figures.requests(1, 6) != figures.requests(0, 6)


def test_a_picture_shows_what_the_classifier_was_asked_for_and_what_the_prompt_tells_of_or_not():
    wanted = figures.Request("red", "circle", "navy", 0)
    assert figures.seen(scene("red", "circle", "navy"), wanted) == (True, True)
    assert figures.seen(scene("red", "square", "navy"), wanted) == (True, False)
    assert figures.seen(scene("red", "circle", "gray"), wanted) == (False, True)
    assert figures.seen(scene("blue", "circle", "navy"), wanted) == (False, False)


def test_the_spread_is_the_mean_distance_of_two():
    a, b = (np.full((2, 2, 3), v, np.uint8) for v in (10, 40))
    assert figures.spread([a, b]) == 30 and figures.spread([a, a, b]) == 20
    assert figures.spread([a, a]) == 0


def test_who_is_surer_at_a_larger_scale_has_more_right_and_less_spread():
    classifier, asked = (SMALL, None), figures.requests(0, 6)
    found = {s: figures.drawn(Painter(), classifier, asked, 1.0, s) for s in (0.0, 2.0, 4.0)}
    claims = figures.claims(found, 1.0)
    assert len(claims) == 4 and all(c.holds for c in claims if "right" in c.text)
    rows = [figures.row(1.0, scale, one) for scale, one in found.items()]
    assert [row["right"]["share"] for row in rows] == [0, 0.5, 1]
    assert [row["told"]["share"] for row in rows] == [1, 1, 1]
    assert rows[2]["spread"] == 0 < rows[0]["spread"] and claims[-1].holds
    assert found[0.0].pictures.shape == (2, 6, figures.PER_REQUEST, 64, 64, 3)
    turned = dict(reversed(found.items()))
    assert not any(claim.holds for claim in figures.claims(turned, 1.0))
    unaware = figures.drawn(Painter(), classifier, asked, 0.0, 4.0)
    assert unaware.right.all() and unaware.told.mean() < 0.5


@pytest.fixture
def painter(tmp_path, monkeypatch):
    painter = Painter()
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: painter))
    classifiers.save(tmp_path / "own", SMALL, testing.lively(Network(SMALL)))
    return painter


def test_the_command_leaves_a_plot_a_sheet_and_figures(painter, tmp_path, capsys):
    words = ["--requests", "2", "--scales", "0,4", "--guidance", "0,3", "--out"]
    own = ["--classifier", str(tmp_path / "own")]
    cli.main(["eval", "classify", *words, str(tmp_path / "out"), *own])
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    assert [(p["guidance"], p["scale"]) for p in report["points"]] == [
        *((0.0, 0.0), (0.0, 4.0), (3.0, 0.0), (3.0, 4.0))
    ]
    assert report["pictures"] == 4 * figures.PER_REQUEST and len(report["claims"]) == 4
    assert {asked[1:] for asked in painter.asked} == {(0.0, "static"), (3.0, "static")}
    for name in ("sweep.png", "sheet.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    "words,message",
    [
        (["--requests", "1"], "--requests must be 2 to 35"),
        (["--seed", "-1"], "--seed must be in"),
        (["--scales", "0"], "--scales 0: must be two or more"),
        (["--scales", "4,0"], "--scales 4,0: must rise"),
        (["--scales", "-1,4"], "--scales -1,4: must rise, and be in [0"),
        (["--guidance", "a"], "--guidance a: must be numbers"),
        (["--classifier", "none"], "classifier none: holds no config.json"),
    ],
)
def test_mistakes_of_the_command_are_one_line(words, message, painter, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "classify", *words, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_whose_pictures_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: testing.cascade()))
    with pytest.raises(SystemExit):
        cli.main(["eval", "classify", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "its first stage draws 8 px" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_another_size_is_told(painter, tmp_path):
    other = dataclasses.replace(SMALL, resolution=32)
    with pytest.raises(ValueError, match="draws 64 px, and the classifier is of 32 px"):
        figures.drawn(painter, (other, None), ASKED, 0.0, 1.0)
