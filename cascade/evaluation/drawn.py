"""A model as a set of pictures: what it draws of the captions of others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cascade import config
from cascade.data.samples import SamplesData
from cascade.devices import distributed
from cascade.errors import UserError
from cascade.evaluation import prompt_runs, prompt_sets
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.prompt_runs import PromptRun
from cascade.evaluation.prompt_sets import PromptFile
from cascade.storage import paths

FOLDER = "drawn"
"""The name of the folder of the pictures, which are as `cascade sample` writes them."""


def kept(captions: Iterable[str], folder: Path) -> PromptFile:
    """Captions as a file of prompts in a folder, which all processes of the program have then."""
    file = folder / "captions.jsonl"

    def write() -> None:
        with paths.writing(file) as part, open(part, "w", encoding="utf-8") as opened:
            opened.writelines(json.dumps({"prompt": text}) + "\n" for text in captions)

    distributed.all_or_none(write)
    return prompt_sets.read([file])[0]


def stage_of(drawer: Drawer, side: int) -> int:
    """The side of the first stage that draws `side` pixels or more. UserError where none does."""
    sides = [stage.config.resolution for stage, _ in drawer.cascade.stages]
    if large := [own for own in sides if own >= side]:
        return large[0]
    raise UserError(
        f"--side {side}: model {drawer.cascade.name} draws {max(sides)} px at most; give that"
    )


def draw(
    drawer: Drawer,
    file: PromptFile,
    folder: Path,
    *,
    side: int,
    seed: int,
    batch: int,
    bar: Callable[[int, int], Any],
) -> SamplesData:
    """Draw one picture of each prompt of a file into folder/FOLDER, or what is missing there.

    side: pixels that the pictures have at least. seed: of the first picture. batch: pictures drawn
    together. bar: (how many, how many are there) -> a context whose value is called after each. All
    processes of the program call it, and share the drawing. Raises as `prompt_runs.opened` does.
    """
    until = stage_of(drawer, side)
    stages = [stage.config.name for stage, _ in drawer.cascade.select(until=until)]
    drawer = dataclasses.replace(drawer, settings={n: drawer.settings[n] for n in stages})
    run = PromptRun(
        drawer=drawer,
        files=[file],
        folder=folder / FOLDER,
        samples=1,
        seed=seed,
        until=until,
        settings={name: config.to_json(s) for name, s in drawer.settings.items()},
    )
    with prompt_runs.opened(run):
        run.warn()
        own: Sequence[int] = run.own(batch)
        with bar(len(own), len(set(own).intersection(run.drawn()))) as advance:
            run.draw(batch, advance)
    return SamplesData(path=str(run.folder))
