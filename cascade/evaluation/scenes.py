"""Prompts of the scenes grammar -> pictures -> how much of the prompts they show."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade import images
from cascade.errors import UserError
from cascade.evaluation import page
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.page import Judged, Set
from cascade.scenes import edges, judge
from cascade.scenes.captions import Caption, caption_at
from cascade.scenes.reading import SIDES, Reading, read


def evaluate_scenes(
    drawer: Drawer,
    folder: Path,
    *,
    sets: Sequence[Set],
    prompts: int,
    seed: int,
    until: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and judge `prompts` pictures of each set; write them and a page about them to `folder`.

    Prompt i is that of scene (seed, i) of its set; its picture's seed is seed + i. until: the side
    in pixels of the last stage that draws; None draws with all. advance: called after each picture.
    Returns {set: {side: judge.summary, with "edges": edges.summary}} and every picture with its
    verdicts, both as JSON values. Raises UserError as `check_sides` does.
    """
    check_sides(drawer, until)
    (folder / "pictures").mkdir()
    judged: list[Judged] = []
    for name in sets:
        for i in range(prompts):
            said = caption_at(seed, i, name)[1]
            one, _ = drawn_and_judged(
                drawer, folder, f"{name}_{i:04d}", name, said, seed + i, until
            )
            judged.append(one)
            advance()
    report = {name: summaries([one for one in judged if one.set == name]) for name in sets}
    page.write(folder / "index.html", judged, report)
    return report, [as_json(one) for one in judged]


def drawn_and_judged(
    drawer: Drawer,
    folder: Path,
    name: str,
    of_set: str,
    said: Caption,
    seed: int,
    until: int | None = None,
) -> tuple[Judged, dict[int, Reading]]:
    """Draw one caption, and judge the picture by its facts: the verdicts, and side -> reading.

    Its files are pictures/NAME_SIDE.png in the folder, where pictures/ must be.
    """
    files, verdicts, outlines, readings = {}, {}, {}, {}
    for side, picture in drawer(said.text, seed, until=until).items():
        files[side] = f"pictures/{name}_{side}.png"
        images.save_png(folder / files[side], picture, {"prompt": said.text})
        if side in SIDES:
            readings[side] = reading = read(picture)
            verdicts[side] = judge.verdicts(reading, said.facts)
            outlines[side] = edges.edges(picture, reading)
    one = Judged(set=of_set, seed=seed, prompt=said, files=files, verdicts=verdicts, edges=outlines)
    return one, readings


def check_sides(drawer: Drawer, until: int | None) -> list[int]:
    """The sides in pixels that will be drawn. Raises UserError if the judge reads none of them."""
    sides = [stage.config.resolution for stage, _ in drawer.cascade.select(until=until)]
    if not set(sides) & set(SIDES):
        raise UserError(
            f"this model draws {', '.join(map(str, sides))} px; scenes are read at "
            f"{', '.join(map(str, SIDES))} px only: evaluate a model that draws one of these"
        )
    return sides


def summaries(judged: Sequence[Judged]) -> dict[str, Any]:
    """Side -> `judge.summary` with "edges", of pictures that have the same sides."""
    facts = [one.prompt.facts for one in judged]
    return {
        str(side): judge.summary([one.verdicts[side] for one in judged], facts)
        | {"edges": edges.summary([one.edges[side] for one in judged])}
        for side in judged[0].verdicts
    }


def as_json(one: Judged) -> dict[str, Any]:
    """One picture with its verdicts, as results.json has it."""
    return {
        "set": one.set,
        "seed": one.seed,
        "prompt": one.prompt.text,
        "files": {str(side): file for side, file in one.files.items()},
        "verdicts": {
            str(side): [dataclasses.asdict(v) for v in verdicts]
            for side, verdicts in one.verdicts.items()
        },
        "edges": {
            str(side): [dataclasses.asdict(edge) for edge in found]
            for side, found in one.edges.items()
        },
    }
