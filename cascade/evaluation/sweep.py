"""Facts right against FD-proxy over guidance weights and augmentation levels.

They are the counterpart of the CLIP-FID curves of Saharia et al. 2022 (figures 4 and A.14).
Guidance trades fidelity against faithfulness to the prompt; the augmentation level trades details
of the small picture against the freedom to repair it.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade.evaluation import quality
from cascade.evaluation.drawer import Drawer
from cascade.evaluation.scenes import check_sides
from cascade.scenes.captions import Facts, caption_at
from cascade.scenes.judge import judge, summary
from cascade.scenes.reading import SIDES
from cascade.scenes.render import render


def sweep(
    drawer: Drawer,
    folder: Path,
    *,
    guidance: Sequence[float],
    aug_levels: Sequence[float],
    prompts: int,
    seed: int,
    until: int | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Draw the same prompts of set "seen" at every guidance weight and augmentation level.

    The weights are the base stage's. The levels, in [0, 1], are those of all super-resolution
    stages, which enlarge the same base pictures at every level. until: the side in pixels of the
    last stage that draws; None draws with all. advance: called after each picture that the base
    stage draws, and after each that it is enlarged to.

    Writes sweep.csv and sweep.png to `folder`, and returns the rows of the former: guidance,
    aug_level (None for the base stage), side, the shares of facts and of prompts right with the
    facts' interval, and fd_proxy, the distance from the renders of the prompts' scenes. Raises
    UserError as `check_sides` does.
    """
    sides = [side for side in check_sides(drawer, until) if side in SIDES]
    base, *upper = (stage.config for stage, _ in drawer.cascade.select(until=until))
    pairs = [caption_at(seed, i, "seen") for i in range(prompts)]
    facts = [said.facts for _, said in pairs]
    truths = {side: quality.features(render(scene, side) for scene, _ in pairs) for side in sides}
    rows: list[dict[str, Any]] = []
    for weight in guidance:
        guided = drawer.replaced([base.name], guidance=weight)
        small = []
        for i, (_, said) in enumerate(pairs):
            small.append(guided(said.text, seed + i, until=base.resolution)[base.resolution])
            advance()
        if base.resolution in sides:
            scores = _Scores(facts)
            for picture in small:
                scores.add(picture)
            figures = scores.report(truths[base.resolution])
            rows.append(_row(weight, None, base.resolution, figures))
        for level in aug_levels if upper else ():
            augmented = guided.replaced([stage.name for stage in upper], aug_level=level)
            by_side = {side: _Scores(facts) for side in sides if side != base.resolution}
            for i, (_, said) in enumerate(pairs):
                pictures = augmented(said.text, seed + i, until=until, lowres=small[i])
                for side, scores in by_side.items():
                    scores.add(pictures[side])
                advance()
            rows += [
                _row(weight, level, side, scores.report(truths[side]))
                for side, scores in by_side.items()
            ]
    write_csv(folder / "sweep.csv", rows)
    plot(folder / "sweep.png", rows)
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys, one or more, below a line of their names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with a panel for each side and a curve for each level, over guidance weights."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    sides = sorted({row["side"] for row in rows})
    figure = Figure(figsize=(5 * len(sides), 4.2), layout="constrained")
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for side, panel in zip(sides, panels, strict=True):
        here = [row for row in rows if row["side"] == side]
        for level in sorted({row["aug_level"] for row in here}, key=lambda v: v or 0.0):
            curve = [row for row in here if row["aug_level"] == level]
            x = [max(row["fd_proxy"], 1e-6) for row in curve]  # rounding can leave 0, or less
            y = [row["facts"] for row in curve]
            low, high = (
                [abs(row[name] - row["facts"]) for row in curve]
                for name in ("facts_low", "facts_high")
            )
            label = None if level is None else f"augmentation {level:g}"
            panel.errorbar(x, y, yerr=[low, high], marker="o", capsize=2, label=label)
            for row, *at in zip(curve, x, y, strict=True):
                panel.annotate(f" {row['guidance']:g}", at, fontsize=8)
        # One weight too high can be ten times as far as the others.
        panel.set(title=f"{side} px", xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set(xlabel="FD-proxy (smaller is closer)", ylabel="facts right")
        if any(row["aug_level"] is not None for row in here):
            panel.legend(fontsize=8)
    figure.suptitle("points: guidance weight", fontsize=9)
    figure.savefig(path, dpi=120)


class _Scores:
    """Collects the scores of pictures that come one at a time, in the order of their facts."""

    def __init__(self, facts: Sequence[Facts]):
        self.facts, self.verdicts, self.features = facts, [], []

    def add(self, picture: np.ndarray) -> None:
        self.verdicts.append(judge(picture, self.facts[len(self.verdicts)]))
        self.features.append(quality.features([picture])[0])

    def report(self, of_truths: np.ndarray) -> dict[str, Any]:
        one = summary(self.verdicts, self.facts)
        low, high = one["facts"]["interval"]
        return {
            "facts": one["facts"]["share"],
            "facts_low": low,
            "facts_high": high,
            "prompts": one["prompts"]["share"],
            "fd_proxy": quality.frechet_distance(np.stack(self.features), of_truths),
        }


def _row(guidance: float, level: float | None, side: int, figures: dict[str, Any]):
    return {"guidance": guidance, "aug_level": level, "side": side, **figures}
