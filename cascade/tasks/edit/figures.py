"""What editing does to scenes whose truth is known: `cascade eval edit`.

SDEdit begins from strokes, and the more of the steps are taken, the less of the strokes and the
more of the prompt is in the picture. Inpainting hides one object of a true picture, tells what the
whole picture shows, and reads it back: once by replacement alone, once with RePaint's jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFilter

from cascade import images
from cascade.evaluation.claims import Property, above
from cascade.evaluation.quality import features, frechet_distance
from cascade.runner.cascade import Cascade
from cascade.scenes.captions import Caption, caption_at
from cascade.scenes.judge import judge, share
from cascade.scenes.render import render
from cascade.scenes.spec import Scene

Picture = UInt8[np.ndarray, "s s 3"]
SEEDS = 2
"""Sets of scenes; claims are about both."""
REPAINT = "1:10:1"
"""RePaint's ten looks at every step."""


class Case(NamedTuple):
    """scene: the truth. said: its caption. seed: of what is drawn."""

    scene: Scene
    said: Caption
    seed: int


def cases(seed: int, pictures: int) -> list[list[Case]]:
    """For each of SEEDS seeds so many scenes of two objects or more, which training never met."""
    found = []
    for first in range(seed, seed + SEEDS * pictures, pictures):
        own, i = [], 0
        while len(own) < pictures:
            scene, said = caption_at(first, i, "seen")
            if len(scene.objects) > 1 and len(scene.groups()) > 1:
                own.append(Case(scene, said, first + len(own)))
            i += 1
        found.append(own)
    return found


def strokes(scene: Scene, side: int) -> Picture:
    """A scene as somebody with a broad brush and six colours would paint it.

    Meng et al. 2022, App. C.2: a median filter of 23 pixels on 256, and a palette of six colours.
    """
    true = Image.fromarray(render(scene, 256)).filter(ImageFilter.MedianFilter(23))
    painted = true.quantize(6).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(painted)


def hole(scene: Scene, side: int) -> Bool[np.ndarray, "s s"]:
    """The box around the scene's last object, and a 20th of the picture more on each side."""
    thing = scene.objects[-1]
    at = (np.arange(side) + 0.5) / side
    reach = thing.radius + 0.05
    rows, columns = abs(at - thing.y) < reach, abs(at - thing.x) < reach
    return rows[:, None] & columns[None, :]


def seam(picture: Picture, mask: Bool[np.ndarray, "s s"]) -> float:
    """The mean difference between neighbours on both sides of the mask's edge, in levels."""
    levels, across = picture.astype(np.float64), []
    for axis in (0, 1):
        border = np.diff(mask.astype(int), axis=axis) != 0
        across.append(np.abs(np.diff(levels, axis=axis)).mean(axis=-1)[border])
    return float(np.concatenate(across).mean())


def right(picture: Picture, said: Caption) -> float:
    """The share of the caption's facts that the picture shows."""
    return float(np.mean([verdict.right for verdict in judge(picture, said.facts)]))


def strokes_kept(
    model: Cascade,
    scenes: Sequence[Sequence[Case]],
    strengths: Sequence[str],
    advance: Callable[[], Any] = lambda: None,
) -> tuple[list[dict[str, Any]], list[Picture]]:
    """The trade-off of SDEdit: a row for the strokes, and for each strength; and a sheet's tiles.

    Rows have "strength" (0 for the strokes), "distance" (root of the mean squared difference to the
    strokes, in levels), "facts" (right, with its interval) and "fd_proxy" (to the true pictures).
    """
    side = model.stages[0][0].config.resolution
    every = [case for own in scenes for case in own]
    true = features([render(case.scene, side) for case in every])
    guides = [strokes(case.scene, side) for case in every]
    rows, tiles = [], []
    for strength in ("0", *strengths):
        drawn = guides
        if strength != "0":
            drawn = []
            for case, guide in zip(every, guides, strict=True):
                options = {"seed": case.seed, "until": side, "strength": strength}
                drawn.append(model(case.said.text, init=guide, **options)[0].image)
                advance()
        apart = [np.mean((d.astype(float) - g) ** 2) for d, g in zip(drawn, guides, strict=True)]
        verdicts = [judge(d, c.said.facts) for d, c in zip(drawn, every, strict=True)]
        rows.append(
            {
                "strength": strength,
                "distance": round(float(np.mean(apart)) ** 0.5, 2),
                "fd_proxy": round(frechet_distance(features(drawn), true), 4),
                "facts": share(v.right for own in verdicts for v in own),
            }
        )
        tiles += drawn[:8]
    return rows, tiles


def holes_filled(
    model: Cascade,
    scenes: Sequence[Sequence[Case]],
    ways: Mapping[str, Callable[[Case, Picture, UInt8[np.ndarray, "s s"]], Picture]],
    advance: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Property], list[Picture]]:
    """How well an object that was hidden is drawn anew, by each way; and a sheet's tiles.

    ways: name -> (case, picture with the object, mask 255 over it) -> the picture drawn. Each is
    claimed to be better than the first.
    """
    side = model.stages[0][0].config.resolution
    facts = {name: [] for name in ways}
    seams = {name: [] for name in ("the true picture", *ways)}
    tiles: list[Picture] = []
    for own in scenes:
        for found in (*facts.values(), *seams.values()):
            found.append([])
        for case in own:
            mask, picture = hole(case.scene, side), render(case.scene, side)
            seams["the true picture"][-1].append(seam(picture, mask))
            if own is scenes[0] and len(facts[next(iter(ways))][0]) < 8:
                tiles += [picture, _hidden(picture, mask)]
            for name, way in ways.items():
                drawn = way(case, picture, (255 * mask).astype(np.uint8))
                if not np.array_equal(drawn[~mask], picture[~mask]):
                    raise AssertionError(f"{name} has changed what was to stay")
                facts[name][-1].append(right(drawn, case.said))
                seams[name][-1].append(seam(drawn, mask))
                if own is scenes[0] and len(facts[name][0]) <= 8:
                    tiles.append(drawn)
                advance()
    first, *others = ways
    facts_right = {name: np.array(values) for name, values in facts.items()}
    least = facts_right[first]
    across = {name: np.array(values) for name, values in seams.items()}
    how = f"one object of a true {side} px picture is hidden, the caption tells of all"
    return {
        "facts": Property(
            title=f"more of the facts are right than by {first}",
            unit="share of a caption's facts that the picture shows",
            how=how,
            figures=facts_right,
            claims=[above(f"{w} above {first}", facts_right[w], least) for w in others],
        ),
        "seam": Property(
            title=f"smaller seams than by {first}",
            unit="mean difference across the mask's edge, in levels",
            how=how,
            figures=across,
            claims=[above(f"{first} above {w}", across[first], across[w]) for w in others],
        ),
    }, tiles


def _hidden(picture: Picture, mask: Bool[np.ndarray, "s s"]) -> Picture:
    """Stripes where the mask is."""
    stripes = 96 + 64 * (np.indices(mask.shape).sum(0) // 4 % 2)
    return np.where(mask[..., None], stripes[..., None].astype(np.uint8), picture)


def by_replacement(model: Cascade, strength: str) -> Callable[..., Picture]:
    """A way for `holes_filled`: what stays is put back after every step."""

    def way(case: Case, picture: Picture, mask: UInt8[np.ndarray, "s s"]) -> Picture:
        options = {"seed": case.seed, "until": len(picture), "strength": strength}
        return model(case.said.text, init=picture, mask=mask, **options)[0].image

    return way


def plot(path: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of the trade-off: facts right and FD-proxy over the distance to the strokes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [row["distance"] for row in rows]
    y = [row["facts"]["share"] for row in rows]
    ends = [[row["facts"]["interval"][end] for row in rows] for end in (0, 1)]
    off = [[abs(e - v) for e, v in zip(limit, y, strict=True)] for limit in ends]
    left.errorbar(x, y, yerr=off, marker="o", capsize=2)
    left.set(ylabel="facts right")
    right.plot(x, [row["fd_proxy"] for row in rows], marker="o")
    right.set(ylabel="FD-proxy to true pictures")
    for panel, values in ((left, y), (right, [row["fd_proxy"] for row in rows])):
        panel.set(xlabel="distance to the strokes, in levels")
        for row, *at in zip(rows, x, values, strict=True):
            word = "strokes" if row["strength"] == "0" else row["strength"]
            panel.annotate(word, at, (5, 5), textcoords="offset points", fontsize=8)
        panel.margins(x=0.15, y=0.1)
    figure.suptitle("points: the strokes themselves, and strengths", fontsize=9)
    figure.savefig(path, dpi=120)


def sheet_of_rows(path: Any, tiles: Sequence[Picture], names: Sequence[str]) -> None:
    """Write a PNG of small pictures, each pixel four times: a row for each name, with the name."""
    n = len(tiles) // len(names)
    rows = [images.grid(_large(tiles[i * n : (i + 1) * n]), n) for i in range(len(names))]
    images.save_png(path, images.grid(images.captioned(rows, names), 1))


def sheet_of_columns(path: Any, tiles: Sequence[Picture], names: Sequence[str]) -> None:
    """Write a PNG of small pictures, each pixel four times: a column for each name, with it."""
    columns = [images.grid(_large(tiles[i :: len(names)]), 1) for i in range(len(names))]
    images.save_png(path, images.grid(images.captioned(columns, names), len(names)))


def _large(tiles: Sequence[Picture]) -> list[np.ndarray]:
    return [tile.repeat(4, 0).repeat(4, 1) for tile in tiles]
