"""A picture of any size restored."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from cascade import images
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.edits import check_mask
from cascade.runner.picture import Picture
from cascade.stage import StageConfig
from cascade.tasks.restore import TRAIN
from cascade.tasks.restore.damage import grey
from cascade.tasks.restore.source import Restoring, Source

MOST_PIXELS = 2**22
"""A picture restored has at most so many."""


def source_of(model: Cascade) -> Source:
    """What the first stage of a model is told of damaged pictures; UserError where it is not."""
    conditions = model.stages[0][0].config.conditions
    if len(model.stages) == len(conditions) == 1 and isinstance(conditions[0], Source):
        return conditions[0]
    raise UserError(f"model {model.name}: restores no pictures; {TRAIN}")


def restorer(model: Cascade, task: str) -> StageConfig:
    """The stage of a model that does a task; UserError where it has none."""
    known = [damage.name for damage in source_of(model).damages]
    if task not in known:
        raise UserError(
            f"--task {task}: model {model.name} has learned {', '.join(known)} alone; {TRAIN}"
        )
    return model.stages[0][0].config


def whole_picture(
    model: Cascade,
    picture: Image.Image,
    task: str,
    *,
    mask: Image.Image | None = None,
    around: float = 0.25,
    seed: int = 0,
    **options: Any,
) -> Picture:
    """The picture restored; what is known of it is as it was.

    task: the name of a `Damage`. mask: of inpainting, white where the picture is drawn. around: of
    uncropping, the share of each side that is drawn beyond it. options: of `Cascade.draw`, such as
    steps and progress. Raises UserError for what does not fit.
    """
    config = restorer(model, task)
    source = np.asarray(picture.convert("RGB"))
    hole = np.ones(source.shape[:2], bool)
    if task == "colouring":
        source = grey(source)
    elif task == "inpainting":
        levels = None if mask is None else np.asarray(mask.convert("L"))
        check_mask(source, levels)
        hole = hole if levels is None else levels >= 128
        if hole.all():
            raise UserError("the mask is white all over: leave something to go by")
    elif task == "uncropping":
        source, hole = _widened(source, around)
    h, w = source.shape[:2]
    if h * w > MOST_PIXELS:
        raise UserError(
            f"the picture would have {w}x{h} px, more than {MOST_PIXELS} in all; give a smaller one"
        )
    source, hole = _fitted(source, hole, config.network.side_multiple)
    steering = Restoring(source=images.to_float(source), hole=hole[..., None])
    # The stage reads no prompt; the word is for the picture's record.
    (drawn,) = model(task, seed=seed, size=source.shape[:2], steering=[steering], **options)
    return Picture(task, seed, {max(h, w): drawn.image[:h, :w]}, drawn.metadata | {"task": task})


def _widened(source: UInt8[np.ndarray, "h w 3"], around: float) -> tuple[Any, Any]:
    """The picture with more around it, and where that is."""
    h, w = source.shape[:2]
    more = (max(1, round(around * h)),) * 2, (max(1, round(around * w)),) * 2
    hole = np.pad(np.zeros((h, w), bool), more, constant_values=True)
    return np.pad(source, (*more, (0, 0)), mode="edge"), hole


def _fitted(
    source: UInt8[np.ndarray, "h w 3"], hole: Bool[np.ndarray, "h w"], multiple: int
) -> tuple[Any, Any]:
    """Both with their last rows and columns repeated, so that the sides are multiples of it."""
    h, w, _ = source.shape
    more = (0, -h % multiple), (0, -w % multiple)
    return np.pad(source, (*more, (0, 0)), mode="edge"), np.pad(hole, more, mode="edge")
