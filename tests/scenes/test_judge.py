"""The judge of scenes: right about true pictures, hard on wrong ones, and precise about why."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage

from cascade.scenes import spec
from cascade.scenes.captions import Facts, Related, Thing, caption_at
from cascade.scenes.judge import CATEGORIES, judge, share, summary
from cascade.scenes.reading import read
from cascade.scenes.render import BACKGROUNDS, COLOURS, render
from cascade.scenes.spec import Object, Scene

SETS = ("seen", "unseen", "long")


def pairs(count, seed=11):
    """Scenes and their captions' facts, of all sets."""
    found = [caption_at(seed, i, SETS[i % 3]) for i in range(count)]
    return [scene for scene, _ in found], [said.facts for _, said in found]


def spoilt(picture, rng, sigma=0.0, blur=0.0):
    """Blurred (standard deviation in pixels), then with noise (in levels)."""
    values = ndimage.gaussian_filter(picture.astype(np.float32), (blur, blur, 0))
    values = values + sigma * rng.standard_normal(values.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# 2000 pictures of each size were all read right, outside of the daily tests.
def judge_pictures(pictures, facts):
    """The summary of pictures in the order of their prompts' facts."""
    judged = [judge(picture, said) for picture, said in zip(pictures, facts, strict=True)]
    return summary(judged, facts)


@pytest.mark.parametrize("side,count", [(64, 2000), (256, 200), (1024, 20)])
def test_true_pictures_show_what_was_asserted(side, count):
    scenes, facts = pairs(count)
    report = judge_pictures((render(scene, side) for scene in scenes), facts)
    assert set(report["categories"]) == set(CATEGORIES) - ({"finish"} if side == 64 else set())
    for name, found in [("facts", report["facts"]), *report["categories"].items()]:
        assert found["share"] >= 0.99, name
        assert found["n"] >= count // 4, name
    assert report["unseen"]["share"] >= 0.99


@pytest.mark.parametrize(
    "side,spoil",
    [
        (64, {"sigma": 8.0}),
        (64, {"blur": 0.5}),
        (256, {"sigma": 8.0}),
        (256, {"blur": 0.5}),
    ],
)
def test_light_noise_and_blur_mislead_it_rarely(side, spoil):
    scenes, facts = pairs(300 if side == 64 else 60)
    rng = np.random.default_rng(0)
    pictures = [spoilt(render(scene, side), rng, **spoil) for scene in scenes]
    assert judge_pictures(pictures, facts)["facts"]["share"] >= 0.97


def test_blur_of_half_a_period_hides_finishes_and_nothing_else():
    scenes, facts = pairs(60)
    rng = np.random.default_rng(0)
    pictures = [spoilt(render(scene, 256), rng, blur=2.0) for scene in scenes]
    categories = judge_pictures(pictures, facts)["categories"]
    assert categories.pop("finish")["share"] < 0.3
    assert all(found["share"] >= 0.97 for found in categories.values())


def test_what_is_read_lies_where_it_was_drawn():
    for scene in pairs(60)[0]:
        seen = read(render(scene, 64)).objects
        assert len(seen) == len(scene.objects)
        for item in scene.objects:
            near = min(seen, key=lambda s: np.hypot(s.x - item.x, s.y - item.y))  # noqa: B023
            error = [near.x - item.x, near.y - item.y, near.radius - item.radius]
            assert np.abs(error).max() < 0.5 / 64


def test_pictures_of_other_prompts_are_wrong():
    scenes, facts = pairs(300)
    report = judge_pictures((render(s, 64) for s in scenes), facts[3:] + facts[:3])
    assert report["prompts"]["share"] < 0.02 and report["facts"]["share"] < 0.25
    assert abs(report["categories"]["background"]["share"] - 1 / 6) < 0.08
    assert report["unseen"]["share"] < 0.2


@pytest.mark.parametrize("side", [64, 256])
def test_an_empty_picture_shows_no_fact_but_its_background(side):
    facts = pairs(90)[1]
    gray = np.full((side, side, 3), 128, np.uint8)
    for said in facts:
        for verdict in judge(gray, said):
            gray_said = verdict.category == "background" and said.background == "gray"
            assert verdict.right == gray_said


def thing(shape="circle", colour="red", x=0.5, y=0.5, radius=0.18, finish="plain"):
    size = "small" if radius < 0.13 else "big"
    return Object(shape=shape, colour=colour, size=size, finish=finish, x=x, y=y, radius=radius)


STAR = thing("star", "green", x=0.23, radius=0.1, finish="dotted")
RING = thing("ring", "pink", x=0.7)
FACTS = Facts(
    things=(
        Thing(shape="star", colour="green", size="small", finish="dotted"),
        Thing(shape="ring", colour="pink", size="big", finish="plain"),
    ),
    relations=(Related(subject=0, relation="left of", object=1),),
    background="mint",
)


def wrong(scene, facts=FACTS, side=256):
    """The categories of the facts that a picture of this scene gets wrong."""
    return {v.category for v in judge(render(scene, side), facts) if not v.right}


EDITS = {
    "colour": (dataclasses.replace(STAR, colour="lime"), RING),
    "shape": (STAR, dataclasses.replace(RING, shape="circle")),
    "size": (dataclasses.replace(STAR, radius=0.17), RING),
    "finish": (dataclasses.replace(STAR, finish="striped"), RING),
    "position": (dataclasses.replace(STAR, x=0.8), dataclasses.replace(RING, x=0.3)),
    "counting": (STAR, RING, thing("heart", "blue", x=0.3, y=0.85, radius=0.1)),
}


def test_a_picture_of_all_that_is_asserted_is_right():
    assert wrong(Scene(background="mint", objects=(STAR, RING))) == set()
    assert wrong(Scene(background="gray", objects=(STAR, RING))) == {"background"}
    assert set(EDITS) | {"background"} == set(CATEGORIES)


@pytest.mark.parametrize("category", EDITS)
def test_one_change_makes_its_own_category_wrong(category):
    assert wrong(Scene(background="mint", objects=EDITS[category])) == {category}


def test_another_colour_of_any_object_is_a_wrong_colour_only():
    for scene, facts in zip(*pairs(90), strict=True):
        free = next(c for c in COLOURS if c not in {o.colour for o in scene.objects})
        objects = (dataclasses.replace(scene.objects[0], colour=free), *scene.objects[1:])
        edited = dataclasses.replace(scene, objects=objects)
        assert wrong(edited, facts, side=64) == {"colour"}, edited


def test_a_missing_copy_is_a_wrong_count():
    circles = [thing("circle", "red", x=x, radius=0.1) for x in (0.2, 0.5)]
    square = thing("square", "blue", x=0.8, radius=0.1)
    facts = Facts(
        things=(
            Thing(shape="circle", colour="red", count=2),
            Thing(shape="square", colour="blue"),
        )
    )

    def wrong_of(*objects):
        return wrong(Scene(background="gray", objects=objects), facts, side=64)

    assert wrong_of(*circles, square) == set()
    assert wrong_of(circles[0], square) == {"counting"}
    # As many objects as asserted, but not as many of each.
    assert wrong_of(circles[0], square, dataclasses.replace(square, x=0.5)) == {"counting"}


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below", "inside"])
def test_relations_hold_one_way_only(relation):
    places = {
        "left of": (0.2, 0.5),
        "right of": (0.8, 0.5),
        "above": (0.5, 0.2),
        "below": (0.5, 0.8),
        "inside": (0.51, 0.49),
    }
    big = thing("square", "blue", radius=0.27 if relation == "inside" else 0.16)
    x, y = places[relation]
    scene = Scene(background="white", objects=(big, thing(x=x, y=y, radius=0.09)))
    picture = render(scene, 64)
    for other in spec.RELATIONS:
        facts = Facts(
            things=(Thing(shape="circle", colour="red"), Thing(shape="square", colour="blue")),
            relations=(Related(subject=0, relation=other, object=1),),
        )
        right = {v.category: v.right for v in judge(picture, facts)}
        assert right.pop("position") == (other == relation)
        assert all(right.values())


def test_any_colour_is_read_inside_any_other_on_any_background():
    # Where two colours meet, their blend may look like the background, or like a third colour.
    shapes = itertools.cycle(spec.SHAPES)
    for (a, b), ground in itertools.product(itertools.permutations(COLOURS, 2), BACKGROUNDS):
        items = (thing("circle", a, radius=0.25), thing(next(shapes), b, 0.49, 0.52, radius=0.09))
        seen = read(render(Scene(background=ground, objects=items), 64))
        found = sorted((o.shape or "", o.colour, o.size) for o in seen.objects)
        assert found == sorted((o.shape, o.colour, o.size) for o in items), (items, ground)
        assert seen.background == ground


def test_objects_that_touch_are_told_apart_by_colour():
    touching = (thing(x=0.3), thing("square", "blue", x=0.3 + 2 * 0.18))
    seen = read(render(Scene(background="white", objects=touching), 64)).objects
    assert {(o.shape, o.colour) for o in seen} == {("circle", "red"), ("square", "blue")}


def test_what_is_no_shape_is_unclear():
    bars = np.full((64, 64, 3), 242, np.uint8)
    bars[30:34, 8:56] = COLOURS["red"]
    (seen,) = read(bars).objects
    assert seen.shape is None and seen.colour == "red"


@pytest.mark.parametrize("side", [32, 100, 512])
def test_pictures_of_other_sides_are_refused(side):
    with pytest.raises(ValueError, match=f"got {side}"):
        read(np.zeros((side, side, 3), np.uint8))


def test_unseen_pairs_count_only_when_shape_and_colour_are_right():
    facts = Facts(things=(Thing(shape="circle", colour="purple", size="big"),))

    def unseen(item):
        picture = render(Scene(background="gray", objects=(item,)), 64)
        return summary([judge(picture, facts)], [facts])["unseen"]

    assert unseen(thing("circle", "purple"))["right"] == 1
    assert unseen(thing("circle", "purple", radius=0.1))["right"] == 1  # its size is another fact
    assert unseen(thing("circle", "red"))["right"] == unseen(thing("ring", "purple"))["right"] == 0


def test_intervals_are_wilsons():
    assert share([True] * 8 + [False] * 2)["interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert share([False] * 10)["interval"] == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert share([])["share"] is None


@pytest.mark.parametrize("at,place,radius", [(0.8, (0.2, 0.2), 0.16), (0.5, (0.31, 0.5), 0.27)])
def test_what_stands_between_two_relations_is_in_neither(at, place, radius):
    """Up and to the left; and half inside, across the edge."""
    big = thing("square", "blue", x=at, y=at, radius=radius)
    scene = Scene(background="white", objects=(big, thing(x=place[0], y=place[1], radius=0.09)))
    picture = render(scene, 64)
    for relation in spec.RELATIONS:
        facts = Facts(
            things=(Thing(shape="circle", colour="red"), Thing(shape="square", colour="blue")),
            relations=(Related(subject=0, relation=relation, object=1),),
        )
        right = {v.category: v.right for v in judge(picture, facts)}
        assert right == {"colour": True, "shape": True, "counting": True, "position": False}
