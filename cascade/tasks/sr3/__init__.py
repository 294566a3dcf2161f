"""SR3: enlarge pictures by diffusion, next to a regression that only predicts their mean.

    cascade train configs/sr3/sr64.py --workdir runs/sr3
    cascade export runs/sr3 models/sr3
    cascade enlarge small.png --model models/sr3 --out large.png
    cascade eval sr3 --model models/sr3 --regression models/regression --out report

SR3 (Saharia et al. 2021, "Image Super-Resolution via Iterative Refinement") draws a picture while
it is shown the small one, enlarged, as three more channels; the network is told how much noise
there is as a real number, so that the steps of drawing are chosen afterwards. A network of the same
size that is trained on the squared error alone (`regression.py`) is nearer to the true picture on
average, and blurred. `figures.py` measures both, and searches for a schedule of few steps.

The stage is an ordinary one with a LowRes, without a text and without noise on the small picture;
our enlargement is bilinear, the paper's bicubic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cascade import config
from cascade.errors import OptionError

Model = Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Enlarge pictures that are known at both sizes, and search for a schedule of few steps.

    OUT gets sheet.png (columns: bicubic, regression, SR3, true), search.png (the FD-proxy of every
    schedule tried) and results.json, which is also on stdout. It must be new or empty.
    """

    out: Path
    """The folder to write."""
    model: str = "sr3"
    """The model that ships (sr3), or a folder that `cascade export` wrote."""
    regression: Model = None
    """A model of configs/sr3/sr64.py --regression True, of equal size."""
    data: str = "scenes:seen"
    """The pictures, which neither has learned from: KIND:PLACE as for `cascade train`."""
    pictures: int = 64
    """Pictures of each of two sets, 2 or more. The schedule is chosen on other ones."""
    search: int = 0
    """Schedules to try, at most 1000; 0 searches for none."""
    search_steps: int = 6
    """How many steps a schedule that is searched for has."""
    seed: int = 0
    """The seed of what is drawn and tried, 0 or more."""


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Regression and SR3 beside each other: PSNR, FD-proxy, sharpness; a search for a schedule."""
    options = config.parse(EvalOptions, argv, prog="cascade eval sr3")
    for name, least, most in (
        ("pictures", 2, 10_000),
        ("search", 0, 1000),
        ("search_steps", 1, 1000),
        ("seed", 0, 2**31 - 1),
    ):
        if not least <= getattr(options, name) <= most:
            raise OptionError(name, getattr(options, name), f"must be {least} to {most}")
    from cascade.runner.cascade import Cascade
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.tasks.sr3 import figures

    with WholeFolder(options.out) as folder:
        ways = {"SR3": Cascade.load(options.model)}
        if options.regression is not None:
            ways["regression"] = Cascade.load(options.regression)
            figures.check_alike(ways["SR3"], ways["regression"])
        true, others = figures.pictures(ways["SR3"], options.data, options.pictures)
        found, drawn = figures.enlarged(ways, true, options.seed)
        figures.sheet(folder / "sheet.png", ways["SR3"], true, drawn)
        report: dict[str, Any] = {
            "model": options.model,
            "model_sha256": ways["SR3"].digest,
            "regression": options.regression,
            "data": options.data,
            "pictures": len(true),
            **found,
        }
        if options.search:
            report["search"] = figures.searched(
                *(ways["SR3"], others, true, options.search, options.search_steps, options.seed),
                plot=folder / "search.png",
            )
        write_json(folder / "results.json", report)
    return report
