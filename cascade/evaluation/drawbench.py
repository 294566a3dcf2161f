"""DrawBench's questions on scenes: how much of prompts of several kinds is drawn, by category.

After Saharia et al. 2022, sec. 4.1, whose prompts people judge. Prompts of the scenes grammar have
truth that `scenes.judge` reads back, in seven of DrawBench's categories:

    colors        one thing, or two of different colours
    counting      a thing of which there are two to four
    conflicting   one or two things, one of a shape in a colour that training never had
    positional    two things, one left of, right of, above or below the other
    descriptions  three or four objects, of more than one look
    misspellings  one or two things, with a typo in every noun and colour
    rare words    one or two things, whose nouns, colours and sizes are words that captions lack

The last two are drawn a second time as training spells them, from the same seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cascade.evaluation import page, scenes
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.page import Judged
from cascade.scenes import judge, spec
from cascade.scenes.captions import VOCABULARY, Caption, Facts, caption_at
from cascade.scenes.judge import Verdict
from cascade.scenes.reading import Reading

Category = Literal[
    "colors",
    "counting",
    "conflicting",
    "positional",
    "descriptions",
    "misspellings",
    "rare words",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
_SPLITS: dict[Category, spec.Split] = {"conflicting": "unseen", "descriptions": "long"}
PLAIN: dict[Category, str] = {
    "misspellings": "misspellings, spelled right",
    "rare words": "rare words, in common ones",
}
"""What the second drawings of the prompts of these categories are called."""
GROUPS: tuple[str, ...] = tuple(
    name for category in CATEGORIES for name in (category, PLAIN.get(category)) if name
)
"""All that is drawn, in the order of the plot."""

NOUNS = {shape: (shape + "s", "crosses")[shape == "cross"] for shape in spec.SHAPES}
"""Shape -> its plural."""
_RARE_NOUNS = {
    "circle": ("disc", "discs"),
    "square": ("quadrate", "quadrates"),
    "triangle": ("trigon", "trigons"),
    "star": ("pentagram", "pentagrams"),
    "ring": ("annulus", "annuli"),
    "cross": ("plus", "pluses"),
    "heart": ("cardioid", "cardioids"),
    "diamond": ("rhombus", "rhombi"),
}
RARE: dict[str, str] = {
    **dict(red="crimson", orange="tangerine", yellow="golden", lime="chartreuse", green="emerald"),
    **dict(cyan="turquoise", blue="azure", purple="violet", pink="rose", brown="chestnut"),
    **dict.fromkeys(("small", "little", "tiny"), "minuscule"),
    **dict.fromkeys(("big", "large"), "colossal"),
    **{shape: _RARE_NOUNS[shape][0] for shape in NOUNS},
    **{plural: _RARE_NOUNS[shape][1] for shape, plural in NOUNS.items()},
}
"""Word of a caption -> one of the same meaning that no caption has."""


def caption_of(category: Category, seed: int, number: int) -> tuple[Caption, Caption]:
    """Prompt `number` of a category: (as it is drawn, as training spells it), with its facts.

    A pure function, whose scenes training has none of. In most categories both are the same.
    """
    split = _SPLITS.get(category, "seen")
    first = 1_000_000 * (1 + CATEGORIES.index(category)) + 1000 * number
    plain = next(
        said
        for index in range(first, first + 1000)
        if _is_of(category, number, (said := caption_at(seed, index, split)[1]).facts)
    )
    rng = spec.generator(seed, first, split, purpose=7)
    if category == "misspellings":
        return Caption(text=misspelled(plain.text, rng), facts=plain.facts), plain
    if category == "rare words":
        return Caption(text=in_rare_words(plain.text), facts=plain.facts), plain
    return plain, plain


def misspelled(text: str, rng: np.random.Generator) -> str:
    """The text with a typo in every noun and colour: letters swapped, missing or twice there."""
    words = {*spec.COLOURS, *NOUNS, *NOUNS.values()}
    return re.sub(r"[a-z]+", lambda m: _typo(m[0], rng) if m[0] in words else m[0], text)


def in_rare_words(text: str) -> str:
    """The text with every word that RARE has in its place, and the article that fits it."""
    text = re.sub(r"[a-z]+", lambda m: RARE.get(m[0], m[0]), text)
    return re.sub(r"\ban? (?=([a-z]))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


def asked(category: str, verdicts: Sequence[Verdict], facts: Facts) -> list[bool]:
    """Which of the facts that a category is about are right; of some that is all facts."""
    about = {"colors": "colour", "counting": "counting", "positional": "position"}.get(category)
    if about is not None:
        return [v.right for v in verdicts if v.category == about]
    if category == "conflicting":
        new = {i for i, t in enumerate(facts.things) if (t.shape, t.colour) in spec.HELD_OUT}
        return [v.right for v in verdicts if v.thing in new and v.category in ("shape", "colour")]
    return [v.right for v in verdicts]


def evaluate_drawbench(
    drawer: Drawer,
    folder: Path,
    *,
    prompts: int,
    seed: int,
    until: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and judge `prompts` pictures, two or more, of each of GROUPS.

    Picture i of each is drawn from seed + i. until: the side in pixels of the last stage that
    draws; None draws with all. advance: called after each picture. Writes the pictures, a page and
    drawbench.png to `folder`. Returns {group: {side: RESULT}} and every picture with its verdicts,
    both as JSON values. A RESULT is `judge.summary` with "edges", and "asked" and "chance": see
    `_chance`. Raises UserError as `scenes.check_sides` does.
    """
    scenes.check_sides(drawer, until)
    (folder / "pictures").mkdir()
    report: dict[str, Any] = {}
    every: list[Judged] = []
    for category in CATEGORIES:
        said = [caption_of(category, seed, i) for i in range(prompts)]
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(prompts)
        for place, name in enumerate((category, PLAIN.get(category))):
            if name is None:
                continue
            judged, readings = [], []
            for i in range(prompts):
                file = f"{re.sub('[^a-z]+', '_', name)}_{i:04d}"
                one, read = scenes.drawn_and_judged(
                    drawer, folder, file, name, said[i][place], seed + i, until
                )
                judged.append(one)
                readings.append(read)
                advance()
            every += judged
            report[name] = scenes.summaries(judged)
            facts = [one.prompt.facts for one in judged]
            for key, result in report[name].items():
                side = int(key)
                rights = [asked(category, one.verdicts[side], one.prompt.facts) for one in judged]
                result["asked"] = judge.share(right for own in rights for right in own)
                of_side = [read[side] for read in readings]
                result["chance"] = _chance(category, of_side, facts, shuffled)
    page.write(folder / "index.html", every, report)
    plot(folder / "drawbench.png", report)
    return report, [scenes.as_json(one) for one in every]


def _chance(
    category: str, readings: Sequence[Reading], facts: Sequence[Facts], shuffled: np.ndarray
) -> dict[str, Any]:
    """What pictures get that know nothing of their prompts: each is judged by the facts of the one
    that follows it in a shuffled order, as {"asked", "facts", "prompts"}: SHARE."""
    rights, every, whole = [], [], []
    for here, there in zip(shuffled, np.roll(shuffled, 1), strict=True):
        other = facts[there]
        verdicts = judge.verdicts(readings[here], other)
        rights += asked(category, verdicts, other)
        every += [v.right for v in verdicts]
        whole.append(all(v.right for v in verdicts))
    return {
        name: judge.share(v) for name, v in dict(asked=rights, facts=every, prompts=whole).items()
    }


def table(report: dict[str, Any]) -> str:
    """The figures for people, in percent, with what chance gives in brackets."""
    heads = ["category", "px", "asked", "all facts", "prompts wholly right"]
    rows = [heads]
    for name, sides in report.items():
        for side, result in sides.items():
            cells = [name, side]
            for what in ("asked", "facts", "prompts"):
                low, high = (round(100 * bound) for bound in result[what]["interval"])
                chance = round(100 * result["chance"][what]["share"])
                cells.append(f"{100 * result[what]['share']:.0f} ({low}-{high}) [{chance}]")
            rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "percent right (95 % interval) [judged by another prompt]"])


def plot(path: Path, report: dict[str, Any]) -> None:
    """Write a PNG with a panel for each side: bars of what is asked, with intervals, of wholly
    right prompts, and marks where chance is."""
    from matplotlib.figure import Figure

    names = list(report)
    sides = list(report[names[0]])
    figure = Figure(figsize=(10, 1 + 3.2 * len(sides)), layout="constrained")
    panels = figure.subplots(len(sides), 1, squeeze=False, sharex=True)[:, 0]
    at = np.arange(len(names))
    for side, panel in zip(sides, panels, strict=True):
        for shift, (what, label) in zip(
            (-0.2, 0.2),
            (("asked", "facts that are asked"), ("prompts", "prompts wholly right")),
            strict=True,
        ):
            own = [report[name][side][what] for name in names]
            shares = np.array([100 * one["share"] for one in own])
            bounds = 100 * np.array([one["interval"] for one in own]).T
            panel.bar(
                at + shift,
                shares,
                0.38,
                yerr=np.maximum(np.abs(bounds - shares), 0),
                capsize=2,
                label=label,
                color={"asked": "#4878a8", "prompts": "#b8cce0"}[what],
            )
            chance = [100 * report[name][side]["chance"][what]["share"] for name in names]
            panel.hlines(
                chance,
                at + shift - 0.19,
                at + shift + 0.19,
                color="#b00020",
                label="judged by another prompt" if what == "asked" else None,
            )
        panel.set_title(f"{side} px", loc="left")
        panel.set(ylabel="right, %", ylim=(0, 105))
        panel.set_xticks(at, [name.replace(", ", ",\n") for name in names])
        panel.tick_params(axis="x", labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside upper right")
    figure.savefig(path, dpi=120)


def _is_of(category: Category, number: int, facts: Facts) -> bool:
    things = facts.things
    alone = all(thing.count == 1 for thing in things)
    if category == "colors":  # in turn one and two
        apart = len({thing.colour for thing in things}) == len(things)
        return alone and len(things) == 1 + number % 2 and apart
    if category == "counting":
        return not alone
    if category == "positional":
        said = {relation.relation for relation in facts.relations}
        return alone and len(things) == 2 and bool(said) and "inside" not in said
    if category == "descriptions":
        return True
    return sum(thing.count for thing in things) <= 2


def _typo(word: str, rng: np.random.Generator) -> str:
    while True:
        at, kind = int(rng.random() * (len(word) - 1)), int(rng.random() * 3)
        first, second = word[at], word[at + 1]
        wrong = word[:at] + (second + first, second, first + first + second)[kind] + word[at + 2 :]
        if wrong != word and wrong not in VOCABULARY:
            return wrong
