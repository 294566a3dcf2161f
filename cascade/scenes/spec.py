"""Scenes: descriptions of simple pictures, drawn by a pure function of (seed, split, index).

A scene is one to four objects on a plain background. Lengths are in units of the picture's width, x
to the right and y down, so that one description serves every resolution. Every shape lies in the
square of half-side `radius` around (x, y), touches it left and right or above and below, and has
its bounding box centred there.

What may be said about a scene is decided by geometry alone (`relation_holds`), with margins that
leave no doubt: objects related by left, right, above or below are `GAP` apart along that axis and
within `ALIGN` of each other across it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond"]
Colour = Literal[
    "red", "orange", "yellow", "lime", "green", "cyan", "blue", "purple", "pink", "brown"
]
Size = Literal["small", "big"]
Finish = Literal["plain", "striped", "dotted", "checkered"]
Background = Literal["gray", "white", "black", "navy", "mint", "lavender"]
Relation = Literal["left of", "right of", "above", "below", "inside"]
Split = Literal["train", "seen", "unseen", "long"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
FINISHES: tuple[Finish, ...] = get_args(Finish)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SPLITS: tuple[Split, ...] = get_args(Split)

# Never drawn in "train", "seen" and "long"; every scene of "unseen" has one. Each shape and each
# colour occurs elsewhere.
HELD_OUT: frozenset[tuple[Shape, Colour]] = frozenset(
    {
        ("circle", "purple"),
        ("square", "green"),
        ("triangle", "blue"),
        ("triangle", "pink"),
        ("star", "orange"),
        ("ring", "red"),
        ("ring", "lime"),
        ("cross", "yellow"),
        ("heart", "cyan"),
        ("diamond", "brown"),
    }
)

MARGIN = 0.03  # between any object and the frame
GAP = 0.05  # between the bounding boxes of two objects: 3.2 pixels at 64
ALIGN = 0.08  # largest offset, across the asserted axis, at which a relation is still said
INNER_GAP = 0.04  # between an object and the edge of the one that holds it

SMALL = (0.085, 0.105)
BIG = (0.16, 0.20)
HOLDER = (0.22, 0.30)  # a big object that holds a small one
HELD = (0.085, 0.095)

# In units of the shape's radius: the hole of a ring, half the width of a cross's arms; and a star's
# notches, of its corners'. A pentagram's would be at 0.38; fatter points survive 64 pixels.
RING_HOLE = 0.62
STAR_NOTCH = 0.48
CROSS_ARM = 0.36

# Distance from (x, y) to the farthest point of a shape, in units of its radius (rounded up).
REACH: dict[Shape, float] = {
    "circle": 1.0,
    "square": 1.415,
    "triangle": 1.325,
    "star": 1.135,
    "ring": 1.0,
    "cross": 1.064,
    "heart": 1.115,
    "diamond": 1.0,
}
# The largest disc inside a shape (in a ring: its hole): offset in y and radius, in units of the
# shape's radius. Shapes without room for another object are absent.
ROOM: dict[Shape, tuple[float, float]] = {
    "circle": (0.0, 1.0),
    "square": (0.0, 1.0),
    "triangle": (0.288, 0.577),
    "ring": (0.0, RING_HOLE),
    "heart": (-0.056, 0.686),
    "diamond": (0.0, 0.707),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """One shape somewhere in the picture. Lengths are in units of the picture's width."""

    shape: Shape
    """Which shape."""
    colour: Colour
    """Its colour, on the average over a period of its finish."""
    size: Size
    """What a caption calls its radius."""
    finish: Finish
    """What its surface is like."""
    x: float
    """The centre's distance from the left edge, in (0, 1)."""
    y: float
    """The centre's distance from the upper edge, in (0, 1)."""
    radius: float
    """Half the longer side of its bounding box."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One to four objects, drawn in this order, on a background.

    Objects equal in shape and colour are copies: they share size, finish and radius, and a caption
    tells their number.
    """

    background: Background
    """The colour behind them."""
    objects: tuple[Object, ...]
    """The objects, of which a later one is drawn over an earlier one."""

    def groups(self) -> list[tuple[Object, ...]]:
        """The objects gathered into copies of one another, in drawing order."""
        gathered: dict[tuple[Shape, Colour], list[Object]] = {}
        for item in self.objects:
            gathered.setdefault((item.shape, item.colour), []).append(item)
        return [tuple(group) for group in gathered.values()]


def scene_at(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    min_objects: int = 1,
    max_objects: int = 4,
    within: float = 1.0,
) -> Scene:
    """Scene number `index` of the endless list that the other arguments name: a pure function."""
    return sample_scene(
        generator(seed, index, split),
        split,
        min_objects=min_objects,
        max_objects=max_objects,
        within=within,
    )


def generator(
    seed: int, index: int, split: Split = "train", purpose: int = 0
) -> np.random.Generator:
    """The source of random numbers for one scene.

    purpose: 0 is the scene, 1 its caption; each other number is free for another use.
    """
    words = (seed, SPLITS.index(split), index, purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def sample_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    min_objects: int = 1,
    max_objects: int = 4,
    within: float = 1.0,
) -> Scene:
    """Choose a scene by `rng`.

    About 35 % of scenes have one object, 40 % two, 25 % three or four; finishes are equally likely.
    split: "train" and "seen" have the same distribution, without HELD_OUT pairs (their streams in
    `scene_at` differ); "unseen" has at least one held-out pair; "long" is "seen" with three or four
    objects always, not all copies of one.
    min_objects, max_objects: scenes of fewer or more objects are chosen anew. within: so are those
    whose objects lie in no square of that side; 0.4 holds any one object that holds no other.
    Raises ValueError for limits that no scene keeps.
    """
    check_counts(split, min_objects, max_objects)
    if within < 2 * BIG[1]:
        raise ValueError(f"within must hold any one object, at least {2 * BIG[1]}, got {within}")
    while True:
        plan = _plan(rng, split)
        if not min_objects <= sum(len(unit.offsets) for unit in plan[0]) <= max_objects:
            continue
        if _least_extent(*plan) > within:
            continue
        for _ in range(_PLACE_TRIES):
            objects = _place(rng, *plan)
            if objects is not None and max(extent(objects)) <= within:
                return Scene(background=_pick(rng, BACKGROUNDS), objects=objects)


def check_counts(split: str, min_objects: int, max_objects: int, *, prefix: str = "") -> None:
    """Check that the split is one, and has scenes of min_objects to max_objects objects.

    Raises ValueError that names the argument, with `prefix` before it.
    """
    if split not in SPLITS:
        raise ValueError(f"{prefix}split must be one of {', '.join(SPLITS)}, got {split!r}")
    fewest = 3 if split == "long" else 1
    if not fewest <= max_objects <= 4:
        raise ValueError(
            f"{prefix}max_objects of split {split!r} must lie in {fewest}..4, got {max_objects}"
        )
    if not 1 <= min_objects <= max_objects:
        raise ValueError(
            f"{prefix}min_objects must lie in 1..{max_objects} (max_objects), got {min_objects}"
        )


def extent(objects: Sequence[Object]) -> tuple[float, float]:
    """(width, height) of the bounding box of all of them, in units of the picture's width."""
    x, y = (
        max(getattr(item, axis) + item.radius for item in objects)
        - min(getattr(item, axis) - item.radius for item in objects)
        for axis in ("x", "y")
    )
    return x, y


def relation_holds(a: Sequence[Object], relation: Relation, b: Sequence[Object]) -> bool:
    """Whether every object of `a` stands in `relation` to every object of `b`, beyond doubt.

    Between groups of copies the offset across the axis is taken between the groups' mean centres.
    """
    if relation == "inside":
        return all(_fits_inside(i, j) for i in a for j in b)
    if relation in ("right of", "below"):
        a, b = b, a
    along, across = ("x", "y") if relation in ("left of", "right of") else ("y", "x")
    end = max(getattr(item, along) + item.radius for item in a)
    start = min(getattr(item, along) - item.radius for item in b)
    offset = _mean([getattr(item, across) for item in a]) - _mean(
        [getattr(item, across) for item in b]
    )
    return start - end >= GAP - 1e-9 and abs(offset) <= ALIGN


_PLACE_TRIES = 100
_JITTER = 0.06  # across the axis of a planned relation; below ALIGN
_SLACK = 0.25  # largest gap beyond GAP along the axis of a planned relation
_FOUR: tuple[Relation, ...] = ("left of", "right of", "above", "below")
_PAIRS: tuple[tuple[Shape, Colour], ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS
)
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)
_UNSEEN = tuple(pair for pair in _PAIRS if pair in HELD_OUT)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What is placed as a whole: one object, or copies in a line."""

    looks: tuple[Shape, Colour, Size, Finish]
    radius: float
    offsets: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    @property
    def half(self) -> tuple[float, float]:
        """Half width and half height of the bounding box."""
        return (
            max(x for x, _ in self.offsets) + self.radius,
            max(y for _, y in self.offsets) + self.radius,
        )


# (relation of this unit to another, the other's number), or None for a free place.
_Link = tuple[Relation, int] | None


def _plan(rng: np.random.Generator, split: Split) -> tuple[list[_Unit], list[_Link]]:
    """What to place: looks, radii and the relations to aim for."""
    u = 1.0 if split == "long" else rng.random()
    if u < 0.35:
        return [_unit(rng, _looks(rng, split, 1)[0])], [None]
    return _plan_two(rng, split) if u < 0.75 else _plan_many(rng, split)


def _plan_two(rng: np.random.Generator, split: Split) -> tuple[list[_Unit], list[_Link]]:
    u = rng.random()
    if u < 0.15:
        units = _copies(rng, _unit(rng, _looks(rng, split, 1)[0]), 2, _pick(rng, _LINES))
        return units, [None] * len(units)
    if u < 0.35:
        return _holder_and_held(rng, split)
    units = [_unit(rng, looks) for looks in _looks(rng, split, 2)]
    return units, [None, (_pick(rng, _FOUR), 0) if u < 0.88 else None]


def _plan_many(rng: np.random.Generator, split: Split) -> tuple[list[_Unit], list[_Link]]:
    count = 3 if rng.random() < 0.6 else 4
    u = rng.random() if split != "long" else 0.18 + 0.82 * rng.random()
    if u < 0.18:
        size: Size = "big" if count == 3 and rng.random() < 0.1 else "small"
        one = _unit(rng, _looks(rng, split, 1)[0], size)
        units = _copies(rng, one, count, _pick(rng, _LINES))
        return units, [None] * len(units)
    if u < 0.42:
        single, many = _looks(rng, split, 2)
        relation = _pick(rng, _FOUR)
        line = "column" if relation in ("left of", "right of") else "row"
        if rng.random() < 0.3:
            line = "loose"
        copies = _copies(rng, _unit(rng, many, "small"), count - 1, line)
        first = _unit(rng, single, "big" if rng.random() < 0.5 else "small")
        link: _Link = None if line == "loose" else (relation, 0)
        links: list[_Link] = [None, *([link] * len(copies))]
        return [first, *copies], links
    if u < 0.54:
        units, links = _holder_and_held(rng, split, others=count - 2)
    else:
        biggest = rng.random() < (0.7 if count == 3 else 0.5)
        sizes: list[Size] = ["big" if biggest and i == 0 else "small" for i in range(count)]
        looks = _looks(rng, split, count)
        units = [_unit(rng, look, size) for look, size in zip(looks, sizes, strict=True)]
        links = [None]
    for number in range(len(links), count):
        near = rng.random() < 0.7
        links.append((_pick(rng, _FOUR), int(rng.random() * number)) if near else None)
    return units, links


def _holder_and_held(
    rng: np.random.Generator, split: Split, others: int = 0
) -> tuple[list[_Unit], list[_Link]]:
    """A big object, a small one inside it, and `others` small ones that have no links yet."""
    while True:
        holder, held, *rest = _looks(rng, split, 2 + others)
        if holder[0] not in ROOM or holder[1] == held[1]:
            continue
        inner = _uniform(rng, *HELD)
        needed = (inner * REACH[held[0]] + INNER_GAP) / ROOM[holder[0]][1]
        if needed <= HOLDER[1]:
            break
    radius = _uniform(rng, max(HOLDER[0], needed), HOLDER[1])
    units = [
        _Unit((*holder[:2], "big", holder[3]), radius),
        _Unit((*held[:2], "small", held[3]), inner),
    ]
    return [*units, *(_unit(rng, looks, "small") for looks in rest)], [None, ("inside", 0)]


_LINES = ("row", "column", "loose", "loose")


def _copies(rng: np.random.Generator, one: _Unit, count: int, line: str) -> list[_Unit]:
    """`count` copies of `one`: a single unit in a row or a column, or as many free units."""
    step = 2 * one.radius + GAP
    if line == "loose" or count * step - GAP > 1 - 2 * MARGIN:
        return [one] * count
    step += rng.random() * min(0.1, (1 - 2 * MARGIN - count * step + GAP) / (count - 1))
    places = tuple((i - (count - 1) / 2) * step for i in range(count))
    offsets = tuple((p, 0.0) if line == "row" else (0.0, p) for p in places)
    return [dataclasses.replace(one, offsets=offsets)]


def _looks(rng: np.random.Generator, split: Split, count: int) -> list:
    """Shape, colour, size and finish of `count` things, no two alike in both shape and colour."""
    chosen: list[tuple[Shape, Colour]] = []
    owed = int(rng.random() * count) if split == "unseen" else -1
    while len(chosen) < count:
        if split != "unseen":
            pool = _SEEN
        else:
            pool = _UNSEEN if len(chosen) == owed else _PAIRS
        pair = _pick(rng, pool)
        if pair not in chosen:
            chosen.append(pair)
    return [(*pair, _pick(rng, SIZES), _pick(rng, FINISHES)) for pair in chosen]


def _unit(rng: np.random.Generator, looks, size: Size | None = None) -> _Unit:
    shape, colour, drawn, finish = looks
    size = size or drawn
    return _Unit((shape, colour, size, finish), _uniform(rng, *(SMALL if size == "small" else BIG)))


def _least_extent(units: list[_Unit], links: list[_Link]) -> float:
    """A bound from below on the longer side of what `_place` can make.

    No unit is longer than it; and of two, neither inside the other, the shorter sides and a gap lie
    side by side.
    """
    sides = [2 * max(unit.half) for unit in units]
    for number, (unit, link) in enumerate(zip(units, links, strict=True)):
        for other in range(number):
            if link != ("inside", other):
                sides.append(2 * min(unit.half) + 2 * min(units[other].half) + GAP)
    return max(sides)


def _place(
    rng: np.random.Generator, units: list[_Unit], links: list[_Link]
) -> tuple[Object, ...] | None:
    """Put the units in place one after the other; None if one does not fit."""
    centres: list[tuple[float, float]] = []
    boxes: list[tuple[float, float, float, float]] = []
    for unit, link in zip(units, links, strict=True):
        half_w, half_h = unit.half
        if link is None:
            x = _uniform(rng, MARGIN + half_w, 1 - MARGIN - half_w)
            y = _uniform(rng, MARGIN + half_h, 1 - MARGIN - half_h)
        elif link[0] == "inside":
            holder = units[link[1]]
            offset, room = ROOM[holder.looks[0]]
            free = room * holder.radius - REACH[unit.looks[0]] * unit.radius - INNER_GAP
            shift, angle = max(free, 0.0) * rng.random(), 2 * np.pi * rng.random()
            x = centres[link[1]][0] + shift * float(np.cos(angle))
            y = centres[link[1]][1] + offset * holder.radius + shift * float(np.sin(angle))
        else:
            relation, other = link
            horizontal = relation in ("left of", "right of")
            reach = (half_w if horizontal else half_h) + units[other].half[0 if horizontal else 1]
            along = reach + GAP + _SLACK * rng.random()
            if relation in ("left of", "above"):
                along = -along
            across = _uniform(rng, -_JITTER, _JITTER)
            dx, dy = (along, across) if horizontal else (across, along)
            x, y = centres[other][0] + dx, centres[other][1] + dy
        if not (MARGIN + half_w <= x <= 1 - MARGIN - half_w):
            return None
        if not (MARGIN + half_h <= y <= 1 - MARGIN - half_h):
            return None
        for number, (bx, by, bw, bh) in enumerate(boxes):
            if link == ("inside", number):
                continue
            if max(abs(x - bx) - half_w - bw, abs(y - by) - half_h - bh) < GAP:
                return None
        centres.append((x, y))
        boxes.append((x, y, half_w, half_h))
    return tuple(
        Object(
            shape=unit.looks[0],
            colour=unit.looks[1],
            size=unit.looks[2],
            finish=unit.looks[3],
            x=x + dx,
            y=y + dy,
            radius=unit.radius,
        )
        for unit, (x, y) in zip(units, centres, strict=True)
        for dx, dy in unit.offsets
    )


def _fits_inside(a: Object, b: Object) -> bool:
    if b.shape not in ROOM:
        return False
    offset, room = ROOM[b.shape]
    distance = float(np.hypot(a.x - b.x, a.y - b.y - offset * b.radius))
    return distance + REACH[a.shape] * a.radius + INNER_GAP <= room * b.radius + 1e-9


def _frame_distance(a: Object) -> float:
    return min(a.x, a.y, 1 - a.x, 1 - a.y) - a.radius


def _box_distance(a: Object, b: Object) -> float:
    return max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _pick(rng: np.random.Generator, options):
    # Generator.choice and .integers cost ten times as much for one draw.
    return options[int(rng.random() * len(options))]
