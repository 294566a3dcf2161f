"""Captions of scenes: short lowercase English from a small grammar, with the facts they assert.

Every caption names every object of its scene by shape and colour, and how many there are; so the
picture that it describes holds these and no others. Size, finish, background and relations may be
said or left out, and what is left out is free. But nobody fails to mention stripes, so what has no
finish said is nearly always plain. Sizes and backgrounds have several wordings, relations several
word orders: one scene has many captions.
"""

import dataclasses
import json
import re

import numpy as np

from cascade.scenes import spec
from cascade.scenes.spec import (
    Background,
    Colour,
    Finish,
    Object,
    Relation,
    Scene,
    Shape,
    Size,
    Split,
)

# Every word that a caption can hold. Punctuation: comma and full stop.
VOCABULARY: tuple[str, ...] = tuple(
    (
        "circle square triangle star ring cross heart diamond "
        "circles squares triangles stars rings crosses hearts diamonds "
        "red orange yellow lime green cyan blue purple pink brown "
        "small little tiny big large plain striped dotted checkered stripes dots checks "
        "gray white black navy mint lavender background "
        "left right of above over below under inside in around containing "
        "a an the two three four is are there and with on against to picture drawing"
    ).split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """The assertion that there are exactly `count` objects of this shape and colour."""

    shape: Shape
    """The shape of all of them."""
    colour: Colour
    """The colour of all of them."""
    count: int = 1
    """How many there are, in 1..4."""
    size: Size | None = None
    """The size of all of them; None asserts none."""
    finish: Finish | None = None
    """The finish of all of them; None asserts none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Related:
    """The assertion that one thing of Facts, all of it, stands in a relation to all of another."""

    subject: int
    """Number in Facts.things of the thing that is somewhere."""
    relation: Relation
    """Where it is, seen from the other."""
    object: int
    """Number in Facts.things of the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a caption asserts."""

    things: tuple[Thing, ...]
    """All the objects there are, none of them in two things."""
    relations: tuple[Related, ...] = ()
    """Where some of the things are; of the others nothing is asserted."""
    background: Background | None = None
    """The colour of the background; None asserts none."""

    def to_json(self) -> str:
        """The facts as the text of a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Facts":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return Facts(
            things=tuple(Thing(**thing) for thing in fields["things"]),
            relations=tuple(Related(**relation) for relation in fields["relations"]),
            background=fields["background"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """A text, and what it asserts."""

    text: str
    """The words, all from VOCABULARY."""
    facts: Facts
    """What they assert, and no more."""


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """Choose one caption of the scene by `rng`."""
    groups = scene.groups()
    groups = [groups[i] for i in rng.permutation(len(groups))]
    things = tuple(_thing(group, rng) for group in groups)
    relations = tuple(_relations(groups, rng))
    background = scene.background if rng.random() < _SAY_BACKGROUND else None
    facts = Facts(things=things, relations=relations, background=background)
    return Caption(text=_text(facts, rng), facts=facts)


def captions(scene: Scene, rng: np.random.Generator, n: int) -> list[Caption]:
    """Choose `n` captions of one scene by `rng`, no two of the same text.

    Every scene has dozens. Raises ValueError if fewer than `n` are found.
    """
    found: dict[str, Caption] = {}
    for _ in range(20 * n):
        one = caption(scene, rng)
        found.setdefault(one.text, one)
        if len(found) == n:
            return list(found.values())
    raise ValueError(
        f"n must not exceed the scene's different captions, got {n}, found {len(found)}"
    )


def caption_at(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    min_objects: int = 1,
    max_objects: int = 4,
    within: float = 1.0,
) -> tuple[Scene, Caption]:
    """Scene number `index`, as `spec.scene_at` has it, and its caption: a pure function."""
    scene = spec.scene_at(
        seed, index, split, min_objects=min_objects, max_objects=max_objects, within=within
    )
    return scene, caption(scene, spec.generator(seed, index, split, purpose=1))


_SAY_SIZE = 0.6
_SAY_FINISH = 0.97  # "a red circle" must be plain: equally likely finishes are drawn as patchwork
_SAY_PLAIN = 0.08
_SAY_BACKGROUND = 0.5
_SAY_RELATION = 0.88

_PLURALS = {shape: shape + "s" for shape in spec.SHAPES} | {"cross": "crosses"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
# The first wording is the common one.
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
_FINISH_PHRASES = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in"),
}
_CONVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
}


def mentions(caption: Caption) -> list[tuple[int, str]]:
    """(where a noun starts in the text, all that the text says of its thing), for every noun.

    What is said of it is its look and where it stands, in words that name nothing else: of "circle"
    in "a small red circle over a blue square on gray", it is "above one small red circle on gray".
    """
    facts, said = caption.facts, []
    nouns = {_noun(thing): thing.shape for thing in facts.things}
    colour = None
    for word in re.finditer(r"[a-z]+", caption.text):
        if word[0] in spec.COLOURS:
            colour = word[0]
        elif word[0] in nouns:
            looks = (colour, nouns[word[0]])
            number = next(i for i, t in enumerate(facts.things) if (t.colour, t.shape) == looks)
            said.append((word.start(), _description(facts, number)))
    return said


def _description(facts: Facts, number: int) -> str:
    thing = facts.things[number]
    places = [said.relation for said in facts.relations if said.subject == number]
    places += [_CONVERSE[said.relation] for said in facts.relations if said.object == number]
    count = _NUMBERS.get(thing.count, "one")
    words = [*places, count, thing.size, thing.finish, thing.colour, _noun(thing)]
    ground = f" on {facts.background}" if facts.background else ""
    return " ".join(word for word in words if word) + ground


def _thing(group: tuple[Object, ...], rng: np.random.Generator) -> Thing:
    """What is said of one group: shape, colour and number always; size and finish now and then."""
    one = group[0]
    say_finish = rng.random() < (_SAY_PLAIN if one.finish == "plain" else _SAY_FINISH)
    return Thing(
        shape=one.shape,
        colour=one.colour,
        count=len(group),
        size=one.size if rng.random() < _SAY_SIZE else None,
        finish=one.finish if say_finish else None,
    )


def _relations(groups: list[tuple[Object, ...]], rng: np.random.Generator) -> list[Related]:
    """At most two of the relations that hold, in either direction, one for a pair of groups."""
    if len(groups) == 1 or rng.random() > _SAY_RELATION:
        return []
    holding = [
        Related(subject=i, relation=relation, object=j)
        for i, a in enumerate(groups)
        for j, b in enumerate(groups)
        if i != j
        for relation in spec.RELATIONS
        if spec.relation_holds(a, relation, b)
    ]
    chosen: list[Related] = []
    wanted = 1 if len(groups) == 2 or rng.random() < 0.3 else 2
    while holding and len(chosen) < wanted:
        one = holding[int(rng.random() * len(holding))]
        chosen.append(one)
        pair = {one.subject, one.object}
        holding = [other for other in holding if {other.subject, other.object} != pair]
    return chosen


def _text(facts: Facts, rng: np.random.Generator) -> str:
    """One wording of the facts. Lead-in and background go around the first sentence."""
    names = _Names(facts.things, [_phrase(thing, rng) for thing in facts.things])
    starts_with_name, rest = True, ""
    if not facts.relations or rng.random() < 0.2:
        body = _listed([names(i) for i in range(len(facts.things))])
        first = 0
        for said in facts.relations:
            subject, verb = names(said.subject), _is(facts.things[said.subject])
            wording = _pick(rng, _RELATION_WORDS[said.relation])
            rest += f". {subject} {verb} {wording} {names(said.object)}"
    else:
        body, first, starts_with_name = _chained(facts, names, rng)
    if starts_with_name and rng.random() < 0.3:
        there = f"there {_is(facts.things[first])}"
        body = f"{_pick(rng, ('a picture of', 'a drawing of', there))} {body}"
    if facts.background is None:
        return body + rest
    colour = facts.background
    ground = _usual(rng, (f"on {colour}", f"on a {colour} background", f"against {colour}"))
    return f"{ground}, {body}{rest}" if rng.random() < 0.2 else f"{body} {ground}{rest}"


class _Names:
    """Names things: in full at the first mention, "the red circle" after."""

    def __init__(self, things: tuple[Thing, ...], phrases: list[str]):
        self.things, self.phrases = things, phrases
        self.named: set[int] = set()

    def __call__(self, number: int) -> str:
        if number in self.named:
            thing = self.things[number]
            return f"the {thing.colour} {_noun(thing)}"
        self.named.add(number)
        return self.phrases[number]

    def unnamed(self) -> list[int]:
        return [i for i in range(len(self.things)) if i not in self.named]


def _chained(facts: Facts, names: _Names, rng: np.random.Generator) -> tuple[str, int, bool]:
    """The relations one after the other, then what no relation names.

    Returns the text, the number of the things it begins with, and whether it is a bare phrase that
    may follow "a picture of".
    """
    said, *others = facts.relations
    things = facts.things
    wording = _usual(rng, _RELATION_WORDS[said.relation])
    u = rng.random()
    if said.relation == "inside" and u < 0.45:
        holder, held = names(said.object), names(said.subject)
        form = "{} with {} inside" if u < 0.2 else "{} containing {}"
        if u > 0.35 and things[said.object].shape == "ring":
            form = "{} around {}"
        body, first, bare, subject = form.format(holder, held), said.object, True, None
    elif u > 0.92:
        other, this = names(said.object), names(said.subject)
        verb = f"there {_is(things[said.subject])}"
        body, first, bare, subject = f"{wording} {other} {verb} {this}", said.object, False, None
    else:
        bare = u < 0.8
        verb = "" if bare else _is(things[said.subject]) + " "
        body = f"{names(said.subject)} {verb}{wording} {names(said.object)}"
        first = subject = said.subject
    for said in others:
        wording = _usual(rng, _RELATION_WORDS[said.relation])
        if said.subject == subject:
            body += f" and {wording} {names(said.object)}"
        else:
            again = said.subject in names.named
            verb = _is(things[said.subject]) + " " if again else ""
            body += f", and {names(said.subject)} {verb}{wording} {names(said.object)}"
    left = names.unnamed()
    if left:
        link = _pick(rng, (", and", ", with"))
        body += f"{link} {_listed([names(i) for i in left])}"
    return body, first, bare


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    """A thing's full name: "a small red circle", "three striped green stars"."""
    words: list[str] = [thing.colour]
    finish, behind = thing.finish, ""
    if finish in _FINISH_PHRASES and rng.random() < 0.2:
        finish, behind = None, " " + _FINISH_PHRASES[finish]
    if finish:
        words.insert(0 if rng.random() < 0.75 else 1, finish)
    if thing.size:
        words.insert(0, _usual(rng, _SIZE_WORDS[thing.size]))
    if thing.count > 1:
        article = _NUMBERS[thing.count]
    else:
        article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)} {_noun(thing)}{behind}"


def _noun(thing: Thing) -> str:
    return thing.shape if thing.count == 1 else _PLURALS[thing.shape]


def _is(thing: Thing) -> str:
    return "is" if thing.count == 1 else "are"


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]


def _usual(rng: np.random.Generator, options):
    """The first option two times in three, else any of them."""
    return options[0] if rng.random() < 0.65 else _pick(rng, options)
