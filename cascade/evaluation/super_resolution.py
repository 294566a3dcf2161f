"""Super-resolution stages on true small pictures, next to bicubic enlargement and the truth."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cascade import images
from cascade.data.transforms import block_means
from cascade.errors import UserError
from cascade.evaluation import quality
from cascade.evaluation.drawer import Drawer
from cascade.runner.cascade import Cascade
from cascade.scenes.captions import caption_at
from cascade.scenes.render import render
from cascade.scenes.spec import scene_at

SHOWN = 6  # pictures on a sheet


def evaluate_super_resolution(
    drawer: Drawer,
    *,
    pictures: int,
    seed: int,
    folder: Path | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Let each super-resolution stage enlarge the block means of `pictures` scenes of set "seen".

    folder: gets a sheet for each stage, with rows of bicubic, drawn and true pictures; None is no
    sheet. advance: called after each picture.

    Returns, as JSON values, {stage: {"lowres", "resolution", "pictures", "model": FIGURES,
    "bicubic": FIGURES, "truth": {"fd_proxy"}}}, where FIGURES are

        psnr_db    the mean over pictures against the renders, in dB; None: all are equal
        sharpness  the ratio of their gradient energy to the renders': 1 is right, less is blurred
        fd_proxy   the distance from the renders

    The truth's fd_proxy is its distance from renders of other scenes: what chance alone makes. A
    finish that a prompt leaves open cannot be guessed, which bounds the PSNR of any model.
    """
    report = {}
    for name, small, large in super_resolution_stages(drawer.cascade):
        figures = {"model": _Figures(), "bicubic": _Figures()}
        truths, others, rows = [], [], []
        for i in range(pictures):
            scene, said = caption_at(seed, i, "seen")
            truth = render(scene, large)
            lowres = block_means(truth, large // small)
            drawn = drawer(said.text, seed + i, until=large, lowres=lowres)[large]
            enlarged = quality.bicubic(lowres, large)
            figures["model"].add(drawn, truth)
            figures["bicubic"].add(enlarged, truth)
            other = render(scene_at(seed, pictures + i, "seen"), large)
            truths.append(quality.features([truth])[0])
            others.append(quality.features([other])[0])
            if i < SHOWN:
                rows += [enlarged, drawn, truth]
            advance()
        of_truths = np.stack(truths)
        chance = quality.frechet_distance(np.stack(others), of_truths)
        report[name] = {
            "lowres": small,
            "resolution": large,
            "pictures": pictures,
            **{kind: of.report(of_truths) for kind, of in figures.items()},
            "truth": {"fd_proxy": chance},
        }
        if folder is not None:
            images.save_png(folder / f"{name}.png", images.grid(rows, columns=3))
    return report


def super_resolution_stages(cascade: Cascade) -> list[tuple[str, int, int]]:
    """(name, side of the small picture, side of the large one) of each such stage, in pixels.

    Raises UserError if there are none.
    """
    configs = [stage.config for stage, _ in cascade.stages]
    found = [(c.name, c.lowres_resolution, c.resolution) for c in configs if c.lowres_resolution]
    if not found:
        raise UserError("this model has no super-resolution stage; try `cascade eval scenes`")
    return found


class _Figures:
    """Collects the figures of pictures that come one at a time.

    A few hundred pictures of 1024 pixels would fill the memory.
    """

    def __init__(self):
        self.psnr_db, self.energy, self.true_energy, self.features = [], 0.0, 0.0, []

    def add(self, picture: np.ndarray, truth: np.ndarray) -> None:
        self.psnr_db.append(quality.psnr(picture, truth))
        self.energy += quality.gradient_energy(picture)
        self.true_energy += quality.gradient_energy(truth)
        self.features.append(quality.features([picture])[0])

    def report(self, of_truths: np.ndarray) -> dict[str, float | None]:
        mean = float(np.mean(self.psnr_db))
        return {
            "psnr_db": round(mean, 3) if math.isfinite(mean) else None,  # JSON has no infinity
            "sharpness": round(self.energy / self.true_energy, 4),
            "fd_proxy": quality.frechet_distance(np.stack(self.features), of_truths),
        }
