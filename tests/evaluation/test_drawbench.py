"""`cascade eval drawbench`: its prompts, and its figures of models of known quality."""

import json
import re

import numpy as np
import pytest
from scene_truth import false_facts

from cascade import testing
from cascade.commands import eval as evaluate
from cascade.errors import UserError
from cascade.evaluation import drawbench, scenes
from cascade.evaluation.drawbench import CATEGORIES, GROUPS, PLAIN
from cascade.models import Level, UNetConfig
from cascade.runner.cascade import Cascade, Picture
from cascade.scenes import spec
from cascade.scenes.captions import VOCABULARY, Facts, Thing, caption_at
from cascade.scenes.judge import judge
from cascade.scenes.render import render
from cascade.scenes.spec import COLOURS, Object, Scene
from cascade.stage import Pixels, Stage, StageConfig, Text

PROMPTS = 24


@pytest.fixture(scope="module")
def truth():
    """Text of a prompt -> the scene that it tells of, for the first prompts of every category."""
    scenes, found = {}, {}

    def recorded(*args):
        scene, said = caption_at(*args)
        scenes[said.text] = scene
        return scene, said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawbench, "caption_at", recorded)
        for category in CATEGORIES:
            for number in range(PROMPTS):
                said, plain = drawbench.caption_of(category, 0, number)
                found[said.text] = found[plain.text] = scenes[plain.text]
    return found


class Renderer(Cascade):
    """A model of 64 px that knows the scene behind each prompt. drawn: (prompt, its scene) -> what
    it draws instead."""

    def __init__(self, truth, drawn=lambda prompt, scene: scene):
        base = UNetConfig(levels=(Level(width=8, blocks=1),), head_width=8)
        config = StageConfig(
            name="base64",
            space=Pixels(resolution=64),
            conditions=(Text(width=8, head_width=8),),
            network=base,
        )
        super().__init__([(Stage(config), {})], testing.FakeEncoder(), name="renderer")
        self.truth, self.drawn, self.asked = truth, drawn, []

    def draw(self, prompts, *, seed, until=None, lowres=None, settings=None):
        self.asked.append((prompts, seed))
        scene = self.drawn(prompts, self.truth[prompts])
        yield Picture(prompts, seed, {64: render(scene, 64)}, {})


@pytest.fixture
def renderer(truth, monkeypatch):
    model = Renderer(truth)
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: model))
    monkeypatch.setattr(scenes.edges, "edges", lambda *_: [])  # which take longest
    return model


def run(capsys, out, *words):
    words = ["drawbench", "--prompts", PROMPTS, "--out", out, "--no-compilation-cache", *words]
    evaluate.main([str(word) for word in words])
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def shares(report, what="asked"):
    return {name: sides["64"][what]["share"] for name, sides in report["categories"].items()}


def recoloured(prompt, scene):
    objects = []
    for item in scene.objects:
        other = COLOURS[(COLOURS.index(item.colour) + 5) % len(COLOURS)]
        fields = {**vars(item), "colour": other}
        objects.append(Object(**fields))
    return Scene(background=scene.background, objects=tuple(objects))


# Prompts.


def test_the_facts_of_every_prompt_hold_in_its_scene(truth):
    for category in CATEGORIES:
        for number in range(PROMPTS):
            said, plain = drawbench.caption_of(category, 0, number)
            assert said.facts == plain.facts and (said == plain) == (category not in PLAIN)
            assert not false_facts(plain.facts, truth[said.text])
            assert drawbench.caption_of(category, 0, number) == (said, plain)
    assert drawbench.caption_of("colors", 1, 0) != drawbench.caption_of("colors", 0, 0)


def test_the_prompts_of_each_category_are_of_its_kind():
    facts = {c: [drawbench.caption_of(c, 0, i)[0].facts for i in range(40)] for c in CATEGORIES}
    held = [[(t.shape, t.colour) in spec.HELD_OUT for t in f.things] for f in facts["conflicting"]]
    assert all(any(one) for one in held)
    others = [t for c in CATEGORIES if c != "conflicting" for f in facts[c] for t in f.things]
    assert not any((t.shape, t.colour) in spec.HELD_OUT for t in others)
    assert [len(f.things) for f in facts["colors"]] == [1, 2] * 20
    assert all(f.things[0].colour != f.things[1].colour for f in facts["colors"][1::2])
    assert all(any(t.count > 1 for t in f.things) for f in facts["counting"])
    relations = {r.relation for f in facts["positional"] for r in f.relations}
    assert relations == {"left of", "right of", "above", "below"}
    assert all(f.relations for f in facts["positional"])
    assert all(3 <= sum(t.count for t in f.things) <= 4 for f in facts["descriptions"])


def test_misspelled_prompts_have_a_typo_in_every_noun_and_colour_and_nowhere_else():
    content = {*COLOURS, *spec.SHAPES, *(s + "s" for s in spec.SHAPES), "crosses"}
    for number in range(40):
        said, plain = drawbench.caption_of("misspellings", 0, number)
        pairs = list(zip(said.text.split(), plain.text.split(), strict=True))
        for wrong, right in pairs:
            if right.strip(".,") in content:
                assert wrong != right and wrong.strip(".,") not in VOCABULARY
                assert abs(len(wrong) - len(right)) <= 1 and set(wrong) <= set(right)
            else:
                assert wrong == right


def test_rare_words_are_in_no_caption_and_articles_fit_them():
    assert not set(drawbench.RARE.values()) & set(VOCABULARY)
    plurals = {"circles", "squares", "triangles", "stars", "rings", "crosses", "hearts", "diamonds"}
    assert plurals < set(drawbench.RARE)
    for number in range(40):
        said, plain = drawbench.caption_of("rare words", 0, number)
        words = re.findall(r"[a-z]+", said.text)
        assert not {*COLOURS, *spec.SHAPES, *plurals, "small", "big"} & set(words)
        assert len(words) == len(re.findall(r"[a-z]+", plain.text))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", said.text)
    assert drawbench.in_rare_words("a blue star on an orange ring") == (
        "an azure pentagram on a tangerine annulus"
    )


# Figures.


def test_a_model_that_draws_the_truth_has_all_right_and_chance_is_far_below(
    renderer, tmp_path, capsys
):
    out = tmp_path / "out"
    report, told = run(capsys, out)
    assert tuple(report["categories"]) == GROUPS
    for what in ("asked", "facts", "prompts"):
        assert set(shares(report, what).values()) == {1.0}
    for sides in report["categories"].values():
        one = sides["64"]
        assert one["pictures"] == one["prompts"]["n"] == one["chance"]["prompts"]["n"] == PROMPTS
        assert one["chance"]["prompts"]["share"] <= 1 / 6 and one["chance"]["asked"]["share"] < 0.6
        assert 0.5 < one["asked"]["interval"][0] < 1
    assert f"{9 * PROMPTS}/{9 * PROMPTS}" in told and re.search(r"counting +64 +100 \(", told)
    results = json.loads((out / "results.json").read_text())
    assert results["categories"] == report["categories"]
    assert len(results["pictures"]) == 9 * PROMPTS
    assert all((out / one["files"]["64"]).is_file() for one in results["pictures"])
    text = (out / "index.html").read_text()
    assert len(re.findall("<img ", text)) == 9 * PROMPTS and "rare words, in common ones" in text
    assert (out / "drawbench.png").read_bytes()[:4] == b"\x89PNG"
    for category in PLAIN:  # both spellings, from the same seeds
        at = GROUPS.index(category) * PROMPTS
        for number in range(PROMPTS):
            said, plain = drawbench.caption_of(category, 0, number)
            assert renderer.asked[at + number] == (said.text, number)
            assert renderer.asked[at + PROMPTS + number] == (plain.text, number)


def test_wrong_colours_fail_what_asks_for_colours_and_not_counts_and_places(
    renderer, tmp_path, capsys
):
    renderer.drawn = recoloured
    report, _ = run(capsys, tmp_path / "out")
    asked = shares(report)
    assert asked["colors"] == 0 and asked["conflicting"] == 0.5  # of which shapes are half
    assert asked["counting"] == 1 and asked["positional"] >= 0.9
    assert 0.2 < asked["descriptions"] < 0.9 and set(shares(report, "prompts").values()) == {0}


def test_a_model_that_cannot_count_fails_what_asks_for_counts(renderer, tmp_path, capsys):
    renderer.drawn = lambda prompt, scene: Scene(
        background=scene.background, objects=scene.objects[:1]
    )
    asked = shares(run(capsys, tmp_path / "out")[0])
    assert asked["counting"] == 0 and asked["positional"] == 0 and asked["conflicting"] > 0.7


def test_a_model_that_knows_no_prompt_is_at_chance(truth, renderer, tmp_path, capsys):
    """It draws a scene of the same category, but another prompt's."""
    other = {}
    for category in CATEGORIES:
        pairs = [drawbench.caption_of(category, 0, i) for i in range(PROMPTS)]
        for here, there in zip(pairs, [*pairs[5:], *pairs[:5]], strict=True):
            other |= {said.text: truth[there[0].text] for said in here}
    renderer.drawn = lambda prompt, scene: other[prompt]
    report, _ = run(capsys, tmp_path / "out")
    for name, sides in report["categories"].items():
        one = sides["64"]
        for what in ("facts", "prompts"):
            assert abs(one[what]["share"] - one["chance"][what]["share"]) < 0.2, name
    means = [
        np.mean(
            [
                sides["64"][k]["facts"]["share"] if k else sides["64"]["facts"]["share"]
                for sides in report["categories"].values()
            ]
        )
        for k in ("", "chance")
    ]
    assert abs(means[0] - means[1]) < 0.06 and means[0] < 0.4


def test_a_model_that_understands_no_word_but_training_s_fails_the_last_two_categories(
    renderer, truth, tmp_path, capsys
):
    """A model that draws an empty picture for words that are not captions'."""

    def drawn(prompt, scene):
        known = set(re.findall(r"[a-z]+", prompt)) <= set(VOCABULARY)
        return scene if known else Scene(background=scene.background, objects=())

    renderer.drawn = drawn
    whole = shares(run(capsys, tmp_path / "out")[0], "prompts")
    assert {name for name, share in whole.items() if share == 0} == {"misspellings", "rare words"}
    assert {share for name, share in whole.items() if name not in PLAIN} == {1}


def test_conflicting_asks_for_the_new_pairs_alone():
    red_ring, blue_star = Thing(shape="ring", colour="red"), Thing(shape="star", colour="blue")
    facts = Facts(things=(blue_star, red_ring), background="gray")
    ring = Object(shape="ring", colour="red", size="big", finish="plain", x=0.3, y=0.3, radius=0.18)
    verdicts = judge(render(Scene(background="gray", objects=(ring,)), 64), facts)
    assert drawbench.asked("conflicting", verdicts, facts) == [True, True]
    assert drawbench.asked("colors", verdicts, facts) == [False, True]
    assert drawbench.asked("counting", verdicts, facts) == [False]
    assert drawbench.asked("descriptions", verdicts, facts) == [v.right for v in verdicts]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--prompts", "1"], "--prompts must be 2 or more, got 1"),
        (["--seed", "-1"], "--seed must be in"),
        (["--until", "128"], "this model draws 64 px"),
    ],
)
def test_mistakes_leave_nothing(renderer, tmp_path, words, message):
    with pytest.raises(UserError) as e:
        evaluate.main(["drawbench", *words, "--out", str(tmp_path / "o"), "--no-compilation-cache"])
    assert message in str(e.value) and not list(tmp_path.iterdir())
