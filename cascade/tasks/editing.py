"""Editing: the options of `cascade sample` for a picture that is drawn anew, whole or in part.

    cascade sample "a blue square" --init-image photo.png --mask hole.png --strength 0.8

How that is done, and the same from Python, is in `runner.edits`; the options load no JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cascade.errors import UserError

if TYPE_CHECKING:
    from cascade.stage import Sampling, StageConfig, Steering

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What editing adds to `cascade sample`."""

    init_image: File = None
    """Redraw this picture (its central square; any size), as much as --strength says. Beside
    --lowres only the super-resolution stages redraw it, from that picture in place of its own
    small version."""
    mask: File = None
    """Which part of --init-image, in a picture of its size: white is drawn anew, black and
    what is transparent stays."""
    strength: Annotated[str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="")] = None
    """How much of --init-image changes, by stage: the share of the steps taken, above 0 to 1.
    Default: .7 in the base stage (1 with --mask), .8 in the others."""

    def __post_init__(self):
        for flag, value in (("--mask", self.mask), ("--strength", self.strength)):
            if value is not None and self.init_image is None:
                raise UserError(f"{flag} {value}: goes with --init-image, which is missing")

    def stages(self, stages: Sequence[StageConfig]) -> Sequence[StageConfig]:
        """The stages that draw, with the settings over which those of the command are laid."""
        if self.init_image is None:
            return stages
        from cascade.runner.edits import redrawn

        return redrawn(stages, masked=self.mask is not None)

    def steering(
        self,
        stages: Sequence[StageConfig],
        every: Sequence[StageConfig],
        settings: Sequence[Sampling],
    ) -> list[Steering | None]:
        """For each stage that draws; every: all stages of the model, as lists count them."""
        if self.init_image is None:
            return [None] * len(stages)
        import numpy as np

        from cascade import images
        from cascade.runner.edits import edits
        from cascade.runner.overrides import numbers_by_stage

        picture = np.asarray(images.load_image(self.init_image))
        mask = None
        if self.mask is not None:
            mask = np.asarray(images.load_image(self.mask, ground="black").convert("L"))
        strength = None
        if self.strength is not None:
            strength = numbers_by_stage("strength", self.strength, stages, every)
        return edits(stages, settings, picture, mask=mask, strength=strength)

    def record(
        self, stages: Sequence[StageConfig], steering: Sequence[Steering | None]
    ) -> dict[str, Any]:
        """What the JSON beside a picture says of it. steering: of the stages that draw."""
        from cascade.runner.edits import edited

        return {
            "edited": edited(stages, steering),
            "init_image": None if self.init_image is None else str(self.init_image),
            "mask": None if self.mask is None else str(self.mask),
        }
