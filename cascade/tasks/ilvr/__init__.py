"""ILVR: draw what the prompt says with the coarse look of a reference picture.

    cascade sample "a blue heart on white" --reference photo.png --ilvr-down 8

Iterative latent variable refinement (Choi et al. 2021) needs no training. After every step, what x
shows at low resolution is replaced by what the reference, as noisy, shows there:

    x_s = x_s' + phi(y_s) - phi(x_s'),    y_s ~ q(y_s | y)

phi shrinks by N and enlarges again. Where it is a projection, as means over blocks are, the picture
drawn has the reference's blocks exactly, if it is held to the end. The larger N is, the less of the
reference is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.errors import OptionError, UserError

if TYPE_CHECKING:
    from cascade.stage import Sampling, StageConfig, Steering

Filter = Literal["box", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What ILVR adds to `cascade sample`."""

    reference: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
    ] = None
    """Draw a picture with the coarse look of this one (its central square; any size)."""
    ilvr_down: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How coarse: the first stage's picture keeps what is left of --reference after shrinking it by
    this factor, which divides the side. Larger keeps less. Default: 8."""
    ilvr_until: Annotated[float | None, tyro.conf.arg(metavar="T", help_behavior_hint="")] = None
    """Leave the picture to the model once time, from 1 (noise) to 0 (clean), is below this, so that
    it wears off the blocks. With 0 it is held to the last step. Default: 0.2."""
    ilvr_filter: Annotated[
        Filter | None, tyro.conf.arg(metavar="{box,bicubic}", help_behavior_hint="")
    ] = None
    """How it is shrunk and enlarged: by means over blocks, the default, or bicubically as in the
    paper, which is no projection."""

    def __post_init__(self):
        more = {"--ilvr-down": self.ilvr_down, "--ilvr-until": self.ilvr_until}
        for flag, value in {**more, "--ilvr-filter": self.ilvr_filter}.items():
            if value is not None and self.reference is None:
                raise UserError(f"{flag} {value}: goes with --reference, which is missing")
        if self.ilvr_until is not None and not 0 <= self.ilvr_until < 1:
            raise OptionError("ilvr_until", self.ilvr_until, "must be in [0, 1)")

    def steering(
        self,
        stages: Sequence[StageConfig],
        every: Sequence[StageConfig],
        settings: Sequence[Sampling],
    ) -> list[Steering | None]:
        """Steers the first stage that draws; the others enlarge what it has drawn."""
        if self.reference is None:
            return [None] * len(stages)
        import numpy as np

        from cascade import images
        from cascade.runner.edits import warn_of_square
        from cascade.tasks.ilvr.steering import ILVR

        first = stages[0]
        side, down = first.resolution, 8 if self.ilvr_down is None else self.ilvr_down
        if first.space.shape() != (side, side, 3):
            raise UserError(
                f"--reference: stage {first.name} draws in {type(first.space).__name__}, and ILVR "
                "is for pixels"
            )
        if not 1 < down <= side or side % down:
            raise OptionError("ilvr_down", down, f"must divide the {side} px of stage {first.name}")
        picture = images.load_image(self.reference)
        warn_of_square(*picture.size)
        reference = images.to_float(images.square(picture, side))
        ilvr = ILVR(
            reference=np.asarray(reference),
            down=down,
            until=0.2 if self.ilvr_until is None else self.ilvr_until,
            filter=self.ilvr_filter or "box",
        )
        return [ilvr, *[None] * (len(stages) - 1)]

    def record(
        self, stages: Sequence[StageConfig], steering: Sequence[Steering | None]
    ) -> dict[str, Any]:
        """What the JSON beside a picture says of it."""
        if self.reference is None:
            return {"ilvr": None}
        ilvr: Any = steering[0]
        return {
            "ilvr": {
                "reference": self.reference,
                "down": ilvr.down,
                "until": ilvr.until,
                "filter": ilvr.filter,
            }
        }


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure how much pictures of one reference differ, by how coarsely they are held to it.

    OUT gets diversity.png, sheet.png (a row for each N: references, and pictures drawn of them) and
    results.json, which is also on stdout. It must be new or empty. The first stage alone draws.
    """

    out: Path
    """The folder to write."""
    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    downs: str = "4,8,16,32"
    """Values of --ilvr-down, two or more, with commas between."""
    references: int = 12
    """True scenes of each of two sets, 2 or more."""
    until: float = 0.2
    """As --ilvr-until."""
    seed: int = 0
    """Which scenes, 0 or more."""


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Diversity of ILVR's pictures over N, and what they keep of the reference."""
    options = config.parse(EvalOptions, argv, prog="cascade eval ilvr")
    if not 2 <= options.references <= 10_000:
        raise OptionError("references", options.references, "must be 2 to 10,000")
    if not 0 <= options.until < 1:
        raise OptionError("until", options.until, "must be in [0, 1)")
    if not 0 <= options.seed < 2**31:
        raise OptionError("seed", options.seed, "must be in [0, 2^31)")
    words = options.downs.split(",")
    downs = sorted({int(word) for word in words if word.isdecimal() and len(word) < 10})
    if len(downs) < max(2, len(words)) or downs[0] < 2:
        rule = "must be two or more above 1, none twice, as in 4,8,16"
        raise OptionError("downs", options.downs, rule)
    from cascade.runner.cascade import Cascade
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.tasks.ilvr import figures

    with WholeFolder(options.out) as folder:
        model = Cascade.load(options.model)
        side = model.stages[0][0].config.resolution
        if wrong := [down for down in downs if side % down or down > side]:
            raise OptionError("downs", wrong[0], f"must divide the model's {side} px")
        found, tiles = figures.held(model, downs, options.references, options.until, options.seed)
        figures.plot(folder / "diversity.png", downs, found)
        figures.sheet(folder / "sheet.png", downs, tiles)
        report = {
            "model": options.model,
            "model_sha256": model.digest,
            "references": figures.SETS * options.references,
            "until": options.until,
            **{name: one.as_json() for name, one in found.items()},
        }
        write_json(folder / "results.json", report)
    return report
