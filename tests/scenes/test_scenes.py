"""The rendered world: what is drawn, what is said of it, and that the two agree."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from scene_truth import false_facts, violations

from cascade.scenes import render as rendering
from cascade.scenes import spec
from cascade.scenes.captions import (
    VOCABULARY,
    Caption,
    Facts,
    Related,
    Thing,
    caption,
    caption_at,
    captions,
    mentions,
)
from cascade.scenes.dataset import ScenesData
from cascade.scenes.render import coverage, finish_pattern, render
from cascade.scenes.spec import Object, Scene, scene_at

PIXEL = 1 / 64


def thing(shape="circle", colour="red", x=0.5, y=0.5, radius=0.18, finish="plain", size=None):
    size = size or ("small" if radius < 0.13 else "big")
    return Object(shape=shape, colour=colour, size=size, finish=finish, x=x, y=y, radius=radius)


def scenes(split="train", count=200):
    return [scene_at(7, index, split) for index in range(count)]


# What is said.


@pytest.mark.parametrize("split", spec.SPLITS)
def test_captions_assert_nothing_false(split):
    for index in range(150):
        scene, said = caption_at(3, index, split)
        assert false_facts(said.facts, scene) == []
        assert sum(t.count for t in said.facts.things) == len(scene.objects)
        assert said.facts.background in (None, scene.background)
        found = []
        for t in said.facts.things:
            copies = [o for o in scene.objects if (o.shape, o.colour) == (t.shape, t.colour)]
            assert len(copies) == t.count
            assert all(t.finish in (None, o.finish) for o in copies)
            assert all(t.size is None or (t.size == "big") == (o.radius > 0.13) for o in copies)
            found.append(copies)
        for r in said.facts.relations:
            for a, b in itertools.product(found[r.subject], found[r.object]):
                assert stands(a, r.relation, b)


def test_mentions_say_of_every_noun_its_own_look_and_place():
    text = (
        "two small red circles over a blue square on gray. the blue square is below the red circles"
    )
    said = Caption(
        text=text,
        facts=Facts(
            things=(
                Thing(shape="circle", colour="red", count=2, size="small"),
                Thing(shape="square", colour="blue"),
            ),
            relations=(Related(subject=0, relation="above", object=1),),
            background="gray",
        ),
    )
    circles, square = "above two small red circles on gray", "below one blue square on gray"
    assert [told for _, told in mentions(said)] == [circles, square, square, circles]
    nouns = [text[at:].split()[0] for at, _ in mentions(said)]
    assert nouns == ["circles", "square", "square", "circles"]


def stands(a, relation, b):
    """Geometry, written apart from the code under test: edges clear by three pixels of 64."""
    clear = 3 * PIXEL
    return {
        "left of": a.x + a.radius + clear < b.x - b.radius,
        "right of": b.x + b.radius + clear < a.x - a.radius,
        "above": a.y + a.radius + clear < b.y - b.radius,
        "below": b.y + b.radius + clear < a.y - a.radius,
        "inside": np.hypot(a.x - b.x, a.y - b.y) + a.radius < b.radius,
    }[relation]


def test_captions_with_a_relation_read_as_it_stands_in_the_picture():
    colours, shapes, finishes = ("|".join(w) for w in (spec.COLOURS, spec.SHAPES, spec.FINISHES))
    before = rf"(?:a|an|two|three)(?: (?:small|little|tiny|big|large|{finishes}))*"
    name = (
        rf"{before} (?P<colour{{0}}>{colours})(?: (?:{finishes}))? "
        rf"(?P<shape{{0}}>{shapes})(?:e?s)?(?: with \w+)?"
    )
    words = r"(?P<words>(?:(?:to|on) the )?(?:left|right) of|above|over|below|under|inside|in)"
    lead = r"(?:a picture of |a drawing of |there (?:is|are) )?"
    ground = r"(?: (?:on|against) [a-z ]+)?"
    whole = f"{lead}{name.format('a')}(?: is| are)? {words} {name.format('b')}{ground}"
    synonyms = {"over": "above", "under": "below", "in": "inside"}
    read = 0
    for index in range(600):
        scene, said = caption_at(5, index)
        match = re.fullmatch(whole, said.text)
        if match:
            a, b = (
                [o for o in scene.objects if (o.shape, o.colour) == (match[shape], match[colour])]
                for shape, colour in [("shapea", "coloura"), ("shapeb", "colourb")]
            )
            relation = match["words"].removeprefix("to the ").removeprefix("on the ")
            relation = synonyms.get(relation, relation)
            assert a and b, said.text
            assert all(stands(i, relation, j) for i in a for j in b), said.text
            read += 1
    assert read > 60


def test_every_word_is_in_a_vocabulary_of_less_than_120():
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 120
    used = set()
    for split, index in itertools.product(spec.SPLITS, range(300)):
        text = caption_at(1, index, split)[1].text
        assert re.fullmatch(r"[a-z]+(?:(?:,|\.)? [a-z]+)*", text)
        used.update(re.findall("[a-z]+", text))
    assert used <= set(VOCABULARY)
    assert len(used) > 0.9 * len(VOCABULARY)


def test_the_grammar_has_full_and_bare_captions_of_a_scene():
    scene = Scene(
        background="gray",
        objects=(
            thing("circle", "red", y=0.2, radius=0.1),
            thing("square", "blue", y=0.7, radius=0.18),
        ),
    )
    rng = np.random.default_rng(0)
    texts = {caption(scene, rng).text for _ in range(3000)}
    assert "a small red circle above a big blue square on gray" in texts
    assert "a red circle and a blue square" in texts
    assert "a blue square below a red circle" in texts


def test_paraphrases_of_a_scene_differ_and_are_all_true():
    for scene in scenes(count=60):
        said = captions(scene, np.random.default_rng(0), 4)
        assert len({one.text for one in said}) == 4
        assert all(false_facts(one.facts, scene) == [] for one in said)
    with pytest.raises(ValueError, match="different captions"):
        captions(Scene(background="gray", objects=(thing(),)), np.random.default_rng(0), 500)


def test_false_facts_finds_each_kind_of_falsehood():
    scene = Scene(
        background="mint",
        objects=(
            thing("star", "green", x=0.2, radius=0.1, finish="dotted"),
            thing("ring", "pink", x=0.7),
        ),
    )
    rng = np.random.default_rng(1)
    said = [caption(scene, rng).facts for _ in range(100)]
    full = [f for f in said if f.background and f.relations and all(t.size for t in f.things)]
    facts = next(f for f in full if any(t.finish == "dotted" for t in f.things))
    star, ring = scene.objects
    edit = dataclasses.replace
    wrong = {
        "colour": (edit(star, colour="lime"), ring),
        "shape": (star, edit(ring, shape="circle")),
        "size": (edit(star, size="big"), ring),
        "finish": (edit(star, finish="striped"), ring),
        "relation": (edit(star, x=0.7), edit(ring, x=0.2)),
        "missing": (star,),
        "too many": (star, ring, edit(ring, x=0.2, y=0.8)),
        "more of another kind": (star, ring, thing("heart", "blue", x=0.2, y=0.8, radius=0.1)),
    }
    assert false_facts(facts, scene) == []
    assert false_facts(facts, edit(scene, background="gray"))
    for kind, objects in wrong.items():
        assert false_facts(facts, edit(scene, objects=objects)), kind


def test_facts_survive_json():
    for index in range(100):
        facts = caption_at(0, index)[1].facts
        assert Facts.from_json(facts.to_json()) == facts


# What is drawn.


def test_scenes_are_a_pure_function_of_seed_split_and_index():
    assert caption_at(1, 5, "seen") == caption_at(1, 5, "seen")
    assert len({scene_at(seed, i, s) for seed in (0, 1) for i in (0, 1) for s in spec.SPLITS}) == 16


def test_held_out_pairs_are_absent_from_training_and_present_in_unseen():
    assert len(spec.HELD_OUT) == 10
    for shape, colour in [("circle", "red"), ("square", "blue"), ("star", "green")]:
        assert (shape, colour) not in spec.HELD_OUT

    def held_out(scene):
        return any((o.shape, o.colour) in spec.HELD_OUT for o in scene.objects)

    for split in ("train", "seen", "long"):
        assert not any(map(held_out, scenes(split, 400)))
    assert all(map(held_out, scenes("unseen", 200)))
    pairs = {(o.shape, o.colour) for scene in scenes("unseen", 200) for o in scene.objects}
    assert pairs >= spec.HELD_OUT


def test_the_mix_of_numbers_and_finishes_is_as_stated():
    drawn = scenes(count=1500)
    numbers = np.bincount([len(scene.objects) for scene in drawn], minlength=5) / len(drawn)
    np.testing.assert_allclose(
        [numbers[1], numbers[2], numbers[3] + numbers[4]], [0.35, 0.40, 0.25], atol=0.05
    )
    finishes = [group[0].finish for scene in drawn for group in scene.groups()]
    for finish in spec.FINISHES:
        assert abs(finishes.count(finish) / len(finishes) - 0.25) < 0.04
    long = scenes("long", 100)
    assert all(len(s.objects) >= 3 and len(s.groups()) >= 2 for s in long)


def test_what_has_no_finish_said_is_plain_nine_times_in_ten():
    unsaid = []
    for index in range(600):
        scene, said = caption_at(0, index, "train")
        finishes = {(o.shape, o.colour): o.finish for o in scene.objects}
        unsaid += [finishes[t.shape, t.colour] for t in said.facts.things if t.finish is None]
    assert len(unsaid) > 150 and unsaid.count("plain") / len(unsaid) > 0.9


def masks(scene, resolution):
    """Which pixels each object touches, drawn alone."""
    whole = (0, resolution)
    return [coverage(item, resolution, whole, whole) > 0 for item in scene.objects]


def test_objects_are_apart_and_inside_the_frame():
    side, pixel = 128, 2  # pixels of 64
    for scene in scenes(count=60) + scenes("long", 60):
        assert violations(scene) == []
        drawn = masks(scene, side)
        for mask in drawn:
            edge = np.ones_like(mask)
            edge[pixel:-pixel, pixel:-pixel] = False
            assert mask.any() and not (mask & edge).any()
        for i, j in itertools.combinations(range(len(drawn)), 2):
            a, b = scene.objects[i], scene.objects[j]
            if not (
                spec.relation_holds([a], "inside", [b]) or spec.relation_holds([b], "inside", [a])
            ):
                assert not (grown(drawn[i], 2 * pixel) & drawn[j]).any()


def grown(mask, by):
    """The mask, widened by a square of half-side `by` pixels."""
    padded = np.pad(mask, by)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1,) * 2)
    return windows.any(axis=(2, 3))


def test_what_is_inside_lies_well_within_solid_colour_or_the_hole_of_a_ring():
    side, pixel, seen = 128, 2, set()
    for index in range(1500):
        scene = scene_at(2, index)
        if len(scene.objects) != 2 or not spec.relation_holds(
            scene.objects[1:], "inside", scene.objects[:1]
        ):
            continue
        outer, inner = scene.objects
        alone = coverage(outer, side, (0, side), (0, side))
        around = grown(masks(scene, side)[1], 1 * pixel)
        assert (alone[around] == (0 if outer.shape == "ring" else 1)).all(), scene
        assert inner.colour != outer.colour
        seen.add(outer.shape)
        if index > 300 and seen == set(spec.ROOM):
            break
    assert seen == set(spec.ROOM)


@pytest.mark.parametrize("shape", spec.SHAPES)
def test_shapes_fill_their_box_and_reach_no_farther_than_stated(shape):
    side = 512
    solid = coverage(thing(shape, radius=0.25), side, (0, side), (0, side)) > 0.5
    rows, columns = np.nonzero(solid)
    box = [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]
    assert box[0] + box[1] == pytest.approx(side, abs=2) == box[2] + box[3]
    assert max(box[1] - box[0], box[3] - box[2]) == pytest.approx(side / 2, abs=3)
    reach = np.hypot(rows + 0.5 - side / 2, columns + 0.5 - side / 2).max() / (side / 4)
    assert spec.REACH[shape] - 0.03 < reach < spec.REACH[shape] + 0.005


AREAS = {  # in units of the radius squared
    "circle": np.pi,
    "square": 4,
    "triangle": np.sqrt(3),
    "ring": np.pi * (1 - spec.RING_HOLE**2),
    "cross": 8 * spec.CROSS_ARM - 4 * spec.CROSS_ARM**2,
    "heart": (2 / (1 + np.sqrt(0.5))) ** 2 * (1 + np.pi / 4),
    "diamond": 2,
    "star": 10 * spec.STAR_NOTCH * np.sin(np.pi / 5) / 2 / np.sin(np.radians(72)) ** 2,
}


@pytest.mark.parametrize("shape", spec.SHAPES)
def test_coverage_adds_up_to_the_area_of_the_shape(shape):
    item = thing(shape, x=0.503, y=0.498, radius=0.2)
    area = coverage(item, 256, (0, 256), (0, 256)).sum() / 256**2 / item.radius**2
    assert area == pytest.approx(AREAS[shape], rel=0.006)


@pytest.mark.parametrize(
    "resolution,window", [(64, (3, 40, 17)), (256, (100, 0, 96)), (96, (0, 0, 1))]
)
def test_a_window_is_the_crop_of_the_whole_bit_for_bit(resolution, window):
    y, x, size = window
    for scene in scenes(count=30):
        whole = render(scene, resolution)
        np.testing.assert_array_equal(
            render(scene, resolution, window), whole[y : y + size, x : x + size]
        )


@pytest.mark.parametrize("window", [(0, 0, 65), (-1, 0, 8), (60, 0, 8), (0, 0, 0)])
def test_a_window_outside_the_picture_is_refused(window):
    with pytest.raises(ValueError, match="window"):
        render(scenes(count=1)[0], 64, window)


def refinished(scene, finish):
    objects = tuple(dataclasses.replace(item, finish=finish) for item in scene.objects)
    return dataclasses.replace(scene, objects=objects)


@pytest.mark.parametrize("finish", [f for f in spec.FINISHES if f != "plain"])
def test_a_finish_vanishes_at_64_and_shows_at_256(finish):
    for scene in scenes(count=15):
        plain, finished = refinished(scene, "plain"), refinished(scene, finish)
        np.testing.assert_array_equal(render(plain, 64), render(finished, 64))
        big = render(finished, 256).astype(float) - render(plain, 256)
        covered = np.any(masks(plain, 256), axis=0)
        assert np.abs(big[covered]).mean() > 15
        assert not big[~covered].any()


@pytest.mark.parametrize("finish", spec.FINISHES)
def test_a_finish_keeps_the_mean_of_every_period(finish):
    for resolution in (256, 1024):
        pattern = finish_pattern(finish, resolution)
        side = resolution // 64
        means = pattern.reshape(64, side, 64, side).mean(axis=(1, 3))
        np.testing.assert_allclose(means, 0, atol=1e-6)
    disc = Scene(background="black", objects=(thing(finish=finish, radius=0.2),))
    inside = render(disc, 256)[112:144, 112:144].mean(axis=(0, 1))
    np.testing.assert_allclose(inside, rendering.COLOURS["red"], atol=0.5)


@pytest.mark.parametrize("resolution", [48, 96, 256])
@pytest.mark.parametrize("finish", ["striped", "dotted", "checkered"])
def test_a_finish_is_the_pixel_mean_of_its_pattern(finish, resolution):
    side, fine = 12, 24  # pixels of the picture's corner, samples across one
    u = (np.arange(side * fine) + 0.5) / (resolution * fine) * 64
    wave = np.where(u % 1 < 0.5, 1.0, -1.0)
    x, y = u[None, :] % 1 - 0.5, u[:, None] % 1 - 0.5
    pattern = {
        "striped": np.repeat(wave[:, None], len(u), axis=1),
        "checkered": wave[:, None] * wave[None, :],
        "dotted": np.where(x * x + y * y < 0.5 / np.pi, 1.0, -1.0),
    }[finish]
    means = pattern.reshape(side, fine, side, fine).mean(axis=(1, 3))
    corner = finish_pattern(finish, resolution)[:side, :side]
    np.testing.assert_allclose(corner, means, atol=0.05)


def test_the_256_picture_averages_to_the_64_picture():
    for scene in scenes(count=25):
        small = render(scene, 64).astype(float)
        big = render(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        error = np.abs(big - small)
        assert error.mean() < 0.5
        # On outlines a period is cut, and coverage is read at one point: only there may it differ.
        edges = np.any([(m > 0) & (m < 1) for m in alphas(scene, 64)], axis=0)
        assert error[~grown(edges, 1)].max() <= 1


def alphas(scene, resolution):
    whole = (0, resolution)
    return [coverage(item, resolution, whole, whole) for item in scene.objects]


def test_colours_are_far_from_one_another_and_from_every_background():
    colours = list(rendering.COLOURS.values())
    grounds = list(rendering.BACKGROUNDS.values())
    assert set(rendering.COLOURS) == set(spec.COLOURS)
    assert set(rendering.BACKGROUNDS) == set(spec.BACKGROUNDS)

    def least(pairs):
        return min(np.linalg.norm(np.subtract(a, b)) for a, b in pairs)

    assert least(itertools.combinations(colours, 2)) > 80
    assert least(itertools.product(colours, grounds)) > 80
    assert least(itertools.combinations(grounds, 2)) > 60
    for colour in spec.COLOURS:
        base, swing = rendering.tones(colour)
        assert (base - swing >= 0).all() and (base + swing <= 255).all()
        assert np.linalg.norm(2 * swing) > 90


def test_min_and_max_objects_leave_out_scenes_and_keep_the_rest():
    count = [len(scene_at(0, i, max_objects=2).objects) for i in range(300)]
    assert set(count) == {1, 2}
    assert min(len(scene_at(0, i, "long", max_objects=3).objects) for i in range(9)) == 3
    for scene, same in ((scene_at(0, i), scene_at(0, i, max_objects=4)) for i in range(20)):
        assert scene == same
    with pytest.raises(ValueError, match="split 'long' must lie in 3..4, got 2"):
        ScenesData(split="long", max_objects=2)
    with pytest.raises(ValueError, match="^max_objects of split 'long' must lie in 3..4, got 2"):
        scene_at(0, 0, "long", max_objects=2)
    assert {len(scene_at(0, i, min_objects=2, max_objects=2).objects) for i in range(50)} == {2}
    with pytest.raises(ValueError, match=r"min_objects must lie in 1..2 \(max_objects\), got 3"):
        ScenesData(min_objects=3, max_objects=2)


def test_no_plan_is_placed_more_narrowly_than_its_least_extent():
    rng, excess = np.random.default_rng(0), []
    while len(excess) < 400:
        plan = spec._plan(rng, "train")
        if objects := spec._place(rng, *plan):
            excess.append(max(spec.extent(objects)) - spec._least_extent(*plan))
    assert -1e-9 < min(excess) < 1e-9 and max(excess) < 1
