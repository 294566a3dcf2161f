"""Two sets of pictures beside each other: FID, KID, precision and recall, density and coverage."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cascade import images
from cascade.data.source import Data, Source
from cascade.errors import UserError
from cascade.evaluation import distances
from cascade.evaluation.distances import NEAREST, Statistics
from cascade.evaluation.features import Features, Stored, place, store
from cascade.storage import paths

SUBSETS, SUBSET_SIZE = 100, 1000
"""The kernel distance is over so many subsets of so many pictures, as its authors have it."""
MOST_NEIGHBOURS = 10_000
"""Neighbourhoods are of the first so many pictures of a set, as in Dhariwal & Nichol 2021."""
SHOWN = 64
"""Pictures of a set on the sheet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """A set of pictures: a dataset, or what is known of one that is not here."""

    name: str
    """How a person called it."""
    side: int
    """The side that its pictures are brought to first, in pixels."""
    data: Data | None = None
    """The dataset; None where there are statistics alone."""
    source: Source | None = None
    """The pictures of `data` at that side."""
    count: int = 0
    """How many of them are taken, from the first; two or more."""
    known: Statistics | None = None
    """The statistics; None where the pictures are here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a network says of a set of pictures."""

    about: dict[str, Any]
    """The set's name and numbers, as JSON values."""
    statistics: Statistics
    """The Gaussian fitted to the features."""
    stored: Stored | None
    """The features; None where there are statistics alone."""


def seen(
    pictures: Pictures,
    network: Features,
    folder: paths.Path,
    *,
    batch: int,
    advance: Callable[[int], Any] = lambda pictures: None,
) -> Seen:
    """Let the network see a set. Its features lie in `folder`, and those that do are not made anew.

    All processes of the program call it. Raises UserError for statistics of another network, and
    for fewer than two pictures that can be read.
    """
    kind = network.of_side(pictures.side)
    if pictures.source is None or pictures.data is None:
        known: Any = pictures.known
        width = network.width
        if known.network not in (None, kind) or len(known.mean) != width:
            raise UserError(
                f"statistics {pictures.name}: are of {len(known.mean)} features of "
                f"({known.network or 'a network that they do not name'}), and these are {width} of "
                f"({kind}); choose that network, its weights and that --side, or make them anew "
                "with --save-statistics"
            )
        about = {"what": pictures.name, "pictures": known.count}
        return Seen(about=about, statistics=known, stored=None)
    stored = store(
        pictures.source,
        pictures.count,
        place(folder, network, pictures.data, pictures.source, pictures.count),
        lambda examples: network([example["image"] for example in examples], batch),
        batch=batch,
        advance=advance,
    )
    if len(stored) < 2:
        raise UserError(
            f"{pictures.name}: {len(stored)} pictures of {pictures.count} can be read; two are "
            "needed; look at the others with `cascade data inspect`"
        )
    if left_out := pictures.count - len(stored):
        print(f"warning: {pictures.name}: left out {left_out} pictures", file=sys.stderr)
    about = {"what": pictures.name, "pictures": len(stored), "left_out": left_out}
    return Seen(about=about, statistics=stored.statistics(kind), stored=stored)


def compare(drawn: Seen, true: Seen, network: Features, seed: int = 0) -> dict[str, Any]:
    """All figures of drawn pictures beside true ones, as JSON values.

    Names are those of Inception's figures; another network's have its own behind them. What needs
    the pictures themselves is None where there are statistics alone, and what needs neighbours
    where there are no more pictures than NEAREST has numbers.
    """
    found: dict[str, Any] = {
        f"{'fd' if network.suffix else 'fid'}{network.suffix}": distances.frechet(
            drawn.statistics, true.statistics
        )
    }
    kernel = f"{'kd' if network.suffix else 'kid'}{network.suffix}"
    found |= {kernel: None, **dict.fromkeys(("precision", "recall", "density", "coverage"))}
    a, b = drawn.stored, true.stored
    if a is None or b is None:
        return found
    fewer = min(len(a), len(b))
    size = SUBSET_SIZE if fewer >= SUBSET_SIZE else max(2, fewer // 2)
    found[kernel] = distances.kernel(
        a.take, b.take, (len(a), len(b)), subsets=SUBSETS, size=size, seed=seed
    )
    few = [min(len(stored), MOST_NEIGHBOURS) for stored in (a, b)]
    if min(few) <= max(NEAREST.values()):
        return found
    rows = [stored.take(np.arange(n)) for stored, n in zip((a, b), few, strict=True)]
    figures = {n: round(v, 6) for n, v in distances.neighbourhoods(*rows).items()}
    return found | figures | {"neighbours": {"pictures": few, "nearest": NEAREST}}


def sheet(folder: paths.Path, sets: Sequence[tuple[Pictures, Seen]]) -> None:
    """Write sheet.png: the first SHOWN pictures of each set that can be read, sets from left to
    right; none where all sets are statistics alone."""
    grids = []
    for pictures, found in sets:
        if pictures.source is not None and found.stored is not None:
            shown = found.stored.indices[:SHOWN]
            some = [pictures.source[int(i)]["image"] for i in shown]
            grids.append(images.grid([_at_most(picture, 128) for picture in some], columns=8))
    if grids:
        height = max(len(grid) for grid in grids)
        below = [((0, height - len(grid)), (0, 0), (0, 0)) for grid in grids]
        padded = [np.pad(g, p, constant_values=255) for g, p in zip(grids, below, strict=True)]
        images.save_png(folder / "sheet.png", images.grid(padded, columns=2, gap=16))


def _at_most(picture: np.ndarray, side: int) -> np.ndarray:
    step = max(1, len(picture) // side)
    return picture[::step, ::step]
