"""Compares what pictures show (reading.py) with what their prompts assert (captions.Facts).

Every asserted fact is right or wrong, and belongs to one category:

  colour, shape         of a thing: every object found for it has it (one fact each a thing)
  size, finish          likewise, where the prompt says one; finish from 256 px up only
  counting              as many of each thing as asserted, and no other object (one a picture)
  position              a relation between two things
  background            where the prompt says one

Objects are found for things by the assignment that agrees most. An object that shares neither
shape nor colour with a thing is not found for it; all facts of a thing without objects are wrong.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from scipy.optimize import linear_sum_assignment

from cascade.scenes import spec
from cascade.scenes.captions import Facts, Related, Thing
from cascade.scenes.reading import Reading, Seen, read

Category = Literal["colour", "shape", "size", "finish", "counting", "position", "background"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One asserted fact, and whether the picture shows it."""

    category: Category
    """The category that it belongs to."""
    claim: str
    """What is asserted, in words for people."""
    seen: str
    """What the picture shows instead or likewise, in words for people."""
    right: bool
    """Whether it shows what is asserted."""
    thing: int | None = None
    """Number in Facts.things of the thing that the fact is about; None if it is not about one."""


def judge(picture: UInt8[np.ndarray, "s s 3"], facts: Facts) -> list[Verdict]:
    """Read a picture of 64, 256 or 1024 pixels squared, and judge it by the facts of its prompt.

    Raises ValueError for other sides.
    """
    return verdicts(read(picture), facts)


def verdicts(reading: Reading, facts: Facts) -> list[Verdict]:
    """Judge a reading by the facts: a verdict on every one that a picture of this size can show."""
    found, others = _assigned(reading.objects, facts.things)
    judged: list[Verdict] = []
    for number, (thing, objects) in enumerate(zip(facts.things, found, strict=True)):
        attributes = ["colour", "shape", "size", *(["finish"] if reading.finishes else [])]
        for attribute in attributes:
            wanted = getattr(thing, attribute)
            if wanted is not None:
                values = [getattr(item, attribute) for item in objects]
                judged.append(
                    Verdict(
                        category=attribute,  # type: ignore[arg-type]
                        claim=f"{thing.colour} {thing.shape}: {wanted}",
                        seen=", ".join(str(v or "unclear") for v in values) or "none found",
                        right=bool(values) and all(v == wanted for v in values),
                        thing=number,
                    )
                )
    counts = [len(objects) for objects in found]
    judged.append(
        Verdict(
            category="counting",
            claim=" + ".join(f"{t.count} {t.colour} {t.shape}" for t in facts.things),
            seen=" + ".join(map(str, counts)) + (f" and {len(others)} more" if others else ""),
            right=counts == [thing.count for thing in facts.things] and not others,
        )
    )
    for said in facts.relations:
        judged.append(_position(said, facts, found))
    if facts.background is not None:
        judged.append(
            Verdict(
                category="background",
                claim=f"on {facts.background}",
                seen=reading.background,
                right=reading.background == facts.background,
            )
        )
    return judged


def summary(judged: Sequence[Sequence[Verdict]], facts: Sequence[Facts]) -> dict[str, Any]:
    """The shares of facts and of prompts that are wholly right, as JSON values.

    They are {"pictures": n, "facts": SHARE, "prompts": SHARE, "categories": {category: SHARE}},
    where a SHARE is what `share` returns. Facts of one picture are not independent, which the
    intervals of facts neglect. Where things asserted are HELD_OUT pairs, "unseen" has the share of
    them that are right in both shape and colour; these facts are among the others, too.
    """
    every = [v for one in judged for v in one]
    report: dict[str, Any] = {
        "pictures": len(judged),
        "facts": share(v.right for v in every),
        "prompts": share(all(v.right for v in one) for one in judged),
        "categories": {
            category: share(v.right for v in every if v.category == category)
            for category in CATEGORIES
            if any(v.category == category for v in every)
        },
    }
    unseen = [
        all(v.right for v in one if v.thing == number and v.category in ("shape", "colour"))
        for one, said in zip(judged, facts, strict=True)
        for number, thing in enumerate(said.things)
        if (thing.shape, thing.colour) in spec.HELD_OUT
    ]
    if unseen:
        report["unseen"] = share(unseen)
    return report


def share(rights: Iterable[bool]) -> dict[str, Any]:
    """How many of these are True, as JSON values {"right", "n", "share", "interval"}.

    The interval is the 95 % one of Wilson 1927, eq. 4. Of no values, the share is None.
    """
    values = list(rights)
    n, right = len(values), sum(values)
    if n == 0:
        return {"right": 0, "n": 0, "share": None, "interval": [0.0, 1.0]}
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    interval = [round(max(middle - half, 0.0), 4), round(min(middle + half, 1.0), 4)]
    return {"right": right, "n": n, "share": round(p, 4), "interval": interval}


# Relations may fall short of what captions are drawn with by two pixels of 64.
_SLACK = 0.03


def _assigned(
    objects: Sequence[Seen], things: Sequence[Thing]
) -> tuple[list[list[Seen]], list[Seen]]:
    """(the objects found for each thing, at most its count; the objects found for none)."""
    slots = [number for number, thing in enumerate(things) for _ in range(thing.count)]
    found: list[list[Seen]] = [[] for _ in things]
    agreed = np.array([[_agreement(item, things[n]) for n in slots] for item in objects])
    used = set()
    if len(objects):
        for i, slot in zip(*linear_sum_assignment(agreed, maximize=True), strict=True):
            if agreed[i, slot] > 0:
                found[slots[slot]].append(objects[i])
                used.add(i)
    return found, [item for i, item in enumerate(objects) if i not in used]


def _agreement(item: Seen, thing: Thing) -> int:
    """How well an object fits a thing, 0 or more; 0 is not at all.

    Shape and colour weigh more than all the rest: they are how a prompt names its things.
    """
    named = (item.shape == thing.shape) + (item.colour == thing.colour)
    if named == 0:
        return 0
    return 10 * named + (item.size == thing.size) + (item.finish == thing.finish)


def _position(said: Related, facts: Facts, found: list[list[Seen]]) -> Verdict:
    a, b = found[said.subject], found[said.object]
    names = [
        f"{facts.things[i].colour} {facts.things[i].shape}" for i in (said.subject, said.object)
    ]
    where = [", ".join(f"({item.x:.2f}, {item.y:.2f})" for item in group) for group in (a, b)]
    return Verdict(
        category="position",
        claim=f"{names[0]} {said.relation} {names[1]}",
        seen=" / ".join(place or "none found" for place in where),
        right=bool(a and b) and _RELATIONS[said.relation](a, b),
    )


def _left_of(a: Sequence[Seen], b: Sequence[Seen]) -> bool:
    return _apart(a, b, along="x", across="y")


def _above(a: Sequence[Seen], b: Sequence[Seen]) -> bool:
    return _apart(a, b, along="y", across="x")


def _apart(a: Sequence[Seen], b: Sequence[Seen], *, along: str, across: str) -> bool:
    """Whether a is left of b or above it, as spec.relation_holds tells, with slack."""
    end = max(getattr(item, along) + item.radius for item in a)
    start = min(getattr(item, along) - item.radius for item in b)
    means = [np.mean([getattr(item, across) for item in group]) for group in (a, b)]
    close = abs(means[0] - means[1]) <= spec.ALIGN + _SLACK
    return bool(start - end >= spec.GAP - _SLACK and close)


def _inside(a: Sequence[Seen], b: Sequence[Seen]) -> bool:
    return all(_fits_inside(i, j) for i in a for j in b)


def _fits_inside(a: Seen, b: Seen) -> bool:
    """Whether a fits inside b, as in spec, with slack; an object of unclear shape is a disc."""
    reach = spec.REACH[a.shape] if a.shape else 1.0
    if b.shape is None:
        offset, room = 0.0, 1.0
    elif b.shape in spec.ROOM:
        offset, room = spec.ROOM[b.shape]
    else:
        return False
    distance = float(np.hypot(a.x - b.x, a.y - b.y - offset * b.radius))
    return distance + reach * a.radius + spec.INNER_GAP - _SLACK <= room * b.radius


_RELATIONS: dict[spec.Relation, Callable[[Sequence[Seen], Sequence[Seen]], bool]] = {
    "left of": _left_of,
    "right of": lambda a, b: _left_of(b, a),
    "above": _above,
    "below": lambda a, b: _above(b, a),
    "inside": _inside,
}
