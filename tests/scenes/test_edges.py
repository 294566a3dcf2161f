"""Distances of outlines, against outlines that are off by a known amount."""

import numpy as np
import pytest
from scipy import ndimage

from cascade.scenes.edges import Edge, edges, summary
from cascade.scenes.reading import read
from cascade.scenes.render import render
from cascade.scenes.spec import SHAPES, Object, Scene, scene_at

RED, GRAY = np.array([205, 40, 45.0]), np.array([128, 128, 128.0])


def found(picture):
    return edges(picture, read(picture))


def one(shape, *, x=0.47, y=0.52, radius=0.19, finish="plain"):
    item = Object(shape=shape, colour="red", size="big", finish=finish, x=x, y=y, radius=radius)
    return Scene(background="gray", objects=(item,))


def painted(covered):
    """A picture of an object on gray. covered: how much of each pixel it covers."""
    share = covered[..., None]
    return np.rint(share * RED + (1 - share) * GRAY).astype(np.uint8)


def wobbly_circle(side, amplitude, waves=7):
    """Its radius is off by a sine of that amplitude, in pixels of the picture."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side - np.array([0.52, 0.47])[:, None, None]
    radius = 0.19 * side + amplitude * np.sin(waves * np.arctan2(y, x))
    return painted(np.clip(0.5 - (np.hypot(x, y) * side - radius), 0, 1))


@pytest.mark.parametrize("side", [64, 256, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_true_outlines_are_where_they_should_be(side, shape):
    (edge,) = found(render(one(shape), side))
    assert edge.shape == shape and edge.distance < 0.02


@pytest.mark.parametrize("side,amplitude", [(64, 0.5), (256, 1.0), (256, 3.0), (1024, 6.0)])
def test_a_wobble_is_measured_by_its_mean(side, amplitude):
    (edge,) = found(wobbly_circle(side, amplitude))
    assert edge.distance == pytest.approx(amplitude * 2 / np.pi, rel=0.12)


def test_blur_alone_is_no_distance():
    sharp = render(one("circle"), 256)
    blurred = ndimage.gaussian_filter(sharp, (2, 2, 0))
    assert found(blurred)[0].distance < 0.1
    wobbly = ndimage.gaussian_filter(wobbly_circle(256, 3.0), (2, 2, 0))
    assert found(wobbly)[0].distance == pytest.approx(3.0 * 2 / np.pi, rel=0.1)


def test_an_outline_that_was_stretched_is_not_fitted_away():
    """A circle that is 4 % too wide and 4 % too low is off by (2/pi) 4 % of its radius."""
    side = 256
    y, x = (np.mgrid[:side, :side] + 0.5) - np.array([0.52, 0.47])[:, None, None] * side
    radius = np.hypot(x / 1.04, y / 0.96)
    (edge,) = found(painted(np.clip(0.5 - (radius - 0.19 * side), 0, 1)))
    assert edge.distance == pytest.approx(0.04 * 0.19 * side * 2 / np.pi, rel=0.07)


def test_finishes_are_left_out_where_they_show():
    striped = one("square", finish="striped")
    assert len(found(render(striped, 64))) == 1
    assert found(render(striped, 256)) == []


def test_what_is_held_by_a_finish_is_left_out_too():
    held = Object(
        shape="square", colour="blue", size="small", finish="plain", x=0.5, y=0.5, radius=0.09
    )
    for finish, expected in (("plain", ["circle", "square"]), ("dotted", [])):
        (holder,) = one("circle", x=0.5, y=0.5, radius=0.28, finish=finish).objects
        picture = render(Scene(background="white", objects=(holder, held)), 256)
        assert sorted(edge.shape for edge in found(picture)) == expected


def test_neighbours_do_not_disturb_each_other():
    for i in range(20):
        assert all(edge.distance < 0.05 for edge in found(render(scene_at(3, i, "long"), 64)))


def test_the_summary_is_by_shape():
    some = [
        [Edge(shape="circle", distance=1.0), Edge(shape="square", distance=0.5)],
        [Edge(shape="circle", distance=0.0)],
    ]
    assert summary(some) == {
        "outlines": 3,
        "distance": 0.5,
        "shapes": {
            "circle": {"outlines": 2, "distance": 0.5},
            "square": {"outlines": 1, "distance": 0.5},
        },
    }
    assert summary([[]]) == {"outlines": 0, "distance": None, "shapes": {}}
