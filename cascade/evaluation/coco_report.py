"""What the COCO protocol shows: drawn pictures beside true ones, FID against CLIP score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade import images
from cascade.data.source import BadRecord, Source
from cascade.evaluation.sweep import write_csv
from cascade.storage import paths

SHOWN = 24
"""Captions on the sheet."""
CELLS = 12
"""Pictures in a row of the sheet, or more where one caption has more."""
MOST_SIDE = 128
"""Pixels of a picture's side on the sheet, at most."""


def name_of(suffix: str, pictures: int) -> str:
    """What a distance is called with its number of pictures: FID-30K, FID-500, FD-proxy-1K.

    suffix: of the network, as `Features.suffix`.
    """
    many = f"{pictures // 1000}K" if pictures % 1000 == 0 else str(pictures)
    return f"{'FD' if suffix else 'FID'}{suffix.replace('_', '-')}-{many}"


def sheet(
    file: Path, drawn: Mapping[float, Source], true: Source | None, places: Sequence[int] | None
) -> None:
    """Write the first SHOWN captions, each under its pictures: drawn ones, by weight, and the true.

    places: the examples of `true` that the captions are about, in turn.
    """
    cells, captions = [], []
    for i in range(min(SHOWN, *map(len, drawn.values()), SHOWN)):
        examples = {f"guidance {weight:g}": source[i] for weight, source in drawn.items()}
        captions.append(next(iter(examples.values()))["caption"])
        pictures = {name: _small(example["image"]) for name, example in examples.items()}
        if true is not None and places is not None:
            try:
                pictures["true"] = _small(true[places[i]]["image"])
            except BadRecord:
                pictures["cannot be read"] = np.zeros_like(next(iter(pictures.values())))
        row = images.captioned(list(pictures.values()), list(pictures))
        cells.append(images.grid(row, columns=len(row)))
    columns = max(1, CELLS // (len(drawn) + (true is not None)))
    images.save_png(file, images.grid(images.captioned(cells, captions), columns=columns, gap=16))


def _small(picture: Any) -> Any:
    step = -(-len(picture) // MOST_SIDE)
    return picture[::step, ::step]


def pareto(folder: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write pareto.csv and pareto.png of the points of several weights; of one, remove them.

    The curve is that of Saharia et al. 2022, figure 4a: FID over CLIP score, a point for each
    weight. Without CLIP scores, it is over the weight.
    """
    table, plotted = folder / "pareto.csv", folder / "pareto.png"
    if len(points) == 1:
        table.unlink(missing_ok=True)
        plotted.unlink(missing_ok=True)
        return
    with paths.writing(table) as part:
        write_csv(part, [_row(point) for point in points])
    with paths.writing(plotted) as part:
        _plot(part, points)


def _row(point: Mapping[str, Any]) -> dict[str, Any]:
    row = {}
    for name, value in point.items():
        if name in ("folder", "name", "neighbours"):
            continue
        if name in ("kid", "kd_proxy"):
            row |= {name: value and value["mean"], f"{name}_std": value and value["std"]}
        elif name == "clip_score_interval":
            row |= dict(zip(("clip_score_low", "clip_score_high"), value, strict=True))
        elif name == "r_precision":
            row[name] = value["share"]
        else:
            row[name] = value
    return row


def _plot(file: Path, points: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure

    by_clip = all("clip_score" in point for point in points)
    across = "clip_score" if by_clip else "guidance"
    points = sorted(points, key=lambda point: point["guidance"])
    name, count = points[0]["name"], points[0]["pictures"]
    distance = next(key for key in points[0] if key in ("fid", "fd_proxy"))
    x, y = ([point[key] for point in points] for key in (across, distance))
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, marker="o")
    for point, at in zip(points, zip(x, y, strict=True), strict=True):
        axes.annotate(
            f"{point['guidance']:g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    axes.margins(0.08)
    axes.set_xlabel("CLIP score (100 cos)" if by_clip else "guidance weight")
    axes.set_ylabel(f"{name} (smaller is closer)")
    axes.set_title(f"{name} of {count} pictures; points: guidance weight", fontsize=10)
    figure.savefig(file, dpi=120, format="png")
