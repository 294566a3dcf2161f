"""What `cascade eval ilvr` measures: pictures drawn of true scenes, held to them more or less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cascade import images
from cascade.devices.terminal import bar
from cascade.evaluation.claims import Property, above
from cascade.runner.cascade import Cascade
from cascade.scenes.captions import caption_at
from cascade.scenes.render import render
from cascade.tasks.ilvr.steering import ILVR

SETS = 2
"""Sets of references; claims are about both."""
DRAWN = 2
"""Pictures of each reference, whose difference is their diversity."""
SHOWN = 4
"""References on the sheet."""


def held(
    model: Cascade, downs: Sequence[int], references: int, until: float, seed: int
) -> tuple[dict[str, Property], list[UInt8[np.ndarray, "s s 3"]]]:
    """({"diversity", "distance"}, a sheet's tiles), where true scenes are the references.

    Captions are other scenes', so that nothing but ILVR tells of the reference. Diversity is the
    root mean squared difference of two pictures of one reference and caption, in levels; distance
    is that of a picture from its reference.
    """
    side = model.stages[0][0].config.resolution
    count = SETS * references
    scenes = [caption_at(seed, i, "seen") for i in range(2 * count)]
    true = [render(scene, side) for scene, _ in scenes[:count]]
    diversity: dict[int, list[float]] = {down: [] for down in downs}
    distance: dict[int, list[float]] = {down: [] for down in downs}
    tiles = []
    with bar(total=count * len(downs) * DRAWN, unit="picture", desc="drawing") as shown:
        for down in downs:
            for i, reference in enumerate(true):
                ilvr = ILVR(reference=images.to_float(reference), down=down, until=until)
                text, first = scenes[count + i][1].text, seed + DRAWN * i
                found = model(text, seed=first, until=side, num=DRAWN, steering=[ilvr])
                one, two = drawn = [picture.image for picture in found]
                diversity[down].append(_apart(one, two))
                distance[down].append(_apart(one, reference))
                tiles += [reference, *drawn] if i < SHOWN else []
                shown.update(DRAWN)
    apart, kept = (
        {down: np.reshape(values, (SETS, -1)) for down, values in of.items()}
        for of in (diversity, distance)
    )
    how = f"{count} true scenes of {side} px as references, each told by another scene's caption"
    return {
        "diversity": _rising(
            "the coarser pictures are held to a reference, the more they differ",
            "root mean squared difference of two pictures of one reference, in levels",
            how,
            apart,
        ),
        "distance": _rising(
            "the coarser, the less is kept of the reference",
            "root mean squared difference from the reference, in levels",
            how,
            kept,
        ),
    }, tiles


def _rising(title: str, unit: str, how: str, found: dict[int, Any]) -> Property:
    a, *_, b = found
    return Property(
        title=title,
        unit=unit,
        how=how,
        figures={f"N = {down}": values for down, values in found.items()},
        claims=[above(f"N = {b} above N = {a}", found[b], found[a])],
    )


def plot(path: Any, downs: Sequence[int], found: dict[str, Property]) -> None:
    """Write a PNG of both over N, with two standard errors of the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for panel, (name, one) in zip(figure.subplots(1, 2), found.items(), strict=True):
        values = list(one.figures.values())
        errors = [2 * v.std(ddof=1) / v.size**0.5 for v in values]
        panel.errorbar(downs, [v.mean() for v in values], yerr=errors, marker="o", capsize=2)
        panel.set(xscale="log", xlabel="N, of --ilvr-down", ylabel=f"{name}, in levels")
        panel.set_xticks(downs, [str(down) for down in downs], minor=False)
        panel.minorticks_off()
    figure.savefig(path, dpi=120)


def sheet(path: Any, downs: Sequence[int], tiles: Sequence[UInt8[np.ndarray, "s s 3"]]) -> None:
    """Write a PNG of references and what was drawn of them: a row for each N, with its name."""
    n, rows = len(tiles) // len(downs), []
    for i in range(len(downs)):
        large = [tile.repeat(2, 0).repeat(2, 1) for tile in tiles[i * n : (i + 1) * n]]
        rows.append(images.grid(large, n))
    names = [f"N = {down}: reference, two drawn of it, and so on" for down in downs]
    images.save_png(path, images.grid(images.captioned(rows, names), 1))


def _apart(a: UInt8[np.ndarray, "s s 3"], b: UInt8[np.ndarray, "s s 3"]) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2) ** 0.5)
