"""What `cascade eval restore` measures: pictures are damaged, restored and compared."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cascade import images
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.evaluation.claims import Property, above
from cascade.evaluation.quality import features, frechet_distance
from cascade.runner.cascade import Cascade
from cascade.scenes.judge import share
from cascade.scenes.words import dataset
from cascade.tasks.restore.damage import Damage, Grey, Jpeg, Picture
from cascade.tasks.restore.restoring import source_of
from cascade.tasks.restore.tints import SHARE, TintsData, is_common
from cascade.tasks.restore.training import restored

SETS = 2
"""Sets of pictures; claims are about both."""
SHOWN = 4
"""Rows of each task on the sheet."""
AT_ONCE = 16
WORST = Jpeg(quality=(5, 5))
"""The JPEG that restored pictures are compared with."""


def pictures(model: Cascade, data: str, count: int) -> UInt8[np.ndarray, "n s s 3"]:
    """SETS * count pictures of a dataset, spread evenly over it, at the size of the model's."""
    source = dataset(data).open(model.stages[0][0].config.resolution)
    wanted = SETS * count
    if len(source) < wanted:
        raise UserError(f"--data {data}: holds {len(source)} pictures, and {wanted} are needed")
    apart = min(len(source) // wanted, 1000)
    return np.stack([source[i * apart]["image"] for i in range(wanted)])


def tasks_of(model: Cascade) -> list[Damage]:
    """What a model undoes, JPEG at its worst. Raises UserError for a model that undoes nothing."""
    source = source_of(model)
    return [WORST if isinstance(damage, Jpeg) else damage for damage in source.damages]


def restorations(model: Cascade, true: UInt8[np.ndarray, "n s s 3"]) -> tuple[dict, list]:
    """{task: Property} of the root mean squared error of what is drawn, in levels, before and
    after; and a sheet's tiles, three for a row."""
    found, tiles = {}, []
    for damage in tasks_of(model):
        source, hole = damaged(damage, true)
        drawn = drawn_of(model, source, hole, desc=damage.name)
        if not np.array_equal(np.where(hole, 0, drawn), np.where(hole, 0, source)):
            raise AssertionError(f"{damage.name} has changed what was known")
        part = ~hole.all(axis=(1, 2, 3), keepdims=True)
        blank = np.where(hole & part, 128, source).astype(np.uint8)
        # Sets take turns, for neighbours in a dataset are alike.
        before, after = (_error(x, true, hole).reshape(-1, SETS).T for x in (blank, drawn))
        real = features(true)
        found[damage.name] = Property(
            title="nearer to the true pictures than the damaged ones",
            unit="root of the mean squared error where the picture is drawn, in levels",
            how=f"{len(true)} pictures, holes are grey in the damaged ones; FD-proxy to the true "
            f"ones {frechet_distance(features(blank), real):.4f} before, "
            f"{frechet_distance(features(drawn), real):.4f} after",
            figures={"damaged": before, "restored": after},
            claims=[above("damaged above restored", before, after)],
        )
        for i in range(SHOWN):
            tiles += [blank[i], drawn[i], true[i]]
    return found, tiles


def check_tints(model: Cascade) -> None:
    """Raise UserError unless a model has learned to colour, and nothing else."""
    if (known := [damage.name for damage in tasks_of(model)]) != [Grey.name]:
        raise UserError(
            f"--tints {model.name}: must have learned {Grey.name} alone, and has learned "
            f"{', '.join(known)}; train one with configs/restore/tints16.py"
        )


def proportion(model: Cascade, count: int = 512) -> dict[str, Any]:
    """How often squares, whose grey says nothing of their colour, get that of most of them; and how
    often two get two."""
    check_tints(model)
    source = TintsData().open(model.stages[0][0].config.resolution)
    true = np.stack([source[10**5 + i]["image"] for i in range(count)])
    (damage,) = tasks_of(model)
    drawn = drawn_of(model, *damaged(damage, true), desc="tints")
    red = [is_common(picture) for picture in drawn]
    first, second = red[::2], red[1::2]
    return {
        "share_in_training": SHARE,
        "red": share(red),
        "two_differ": share(a != b for a, b in zip(first, second, strict=True)),
    }


def damaged(damage: Damage, true: UInt8[np.ndarray, "n s s 3"]) -> tuple[Any, Any]:
    """(sources uint8 [n, s, s, 3], holes bool [n, s, s, 1]) of the pictures, each its own."""
    made = [damage(picture, np.random.default_rng([7, i])) for i, picture in enumerate(true)]
    return np.stack([m.source for m in made]), np.stack([m.hole for m in made])[..., None]


def drawn_of(model: Cascade, source: Any, hole: Any, *, desc: str) -> UInt8[np.ndarray, "n s s 3"]:
    """The pictures restored, some at once."""
    stage, params = model.stages[0]
    drawn = []
    with bar(total=len(source), unit="picture", desc=desc) as shown:
        for first in range(0, len(source), AT_ONCE):
            rows = np.minimum(np.arange(first, first + AT_ONCE), len(source) - 1)
            made = restored(stage, params, source[rows], hole[rows], first)
            drawn += list(np.asarray(made)[: len(source) - first])
            shown.update(min(AT_ONCE, len(source) - first))
    return np.stack(drawn)


def sheet(path: Any, tiles: list[Picture]) -> None:
    """Write a PNG of the tiles, each pixel twice: in a row two pictures, of three tiles each."""
    large = [jnp.asarray(t).repeat(2, 0).repeat(2, 1) for t in tiles]
    images.save_png(path, images.grid([np.asarray(t) for t in large], 6))


def _error(a: Any, b: Any, hole: Any) -> Float[np.ndarray, " n"]:
    """The root of the mean squared difference in holes, picture by picture, in levels."""
    squared = np.where(hole, (a.astype(np.float64) - b) ** 2, 0).sum(axis=(1, 2, 3))
    return np.sqrt(squared / (3 * hole.sum(axis=(1, 2, 3))))
