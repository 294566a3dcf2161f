"""Redraw a picture from its strokes or colours, or a part of it (SDEdit, RePaint).

    cascade edit strokes.png "a blue heart on white" --strength 0.5
    cascade edit photo.png "a red circle" --mask hole.png --strength 1:10:2
    cascade edit photo.png "two stars" --around 0.25

SDEdit (Meng et al. 2022) noises the picture as far as a share of the steps leads, and draws from
there; with a mask, what stays is put back after every step, and RePaint (Lugmayr et al. 2022) lets
some steps be taken again, so that both parts come to fit. How that is done, and the same from
Python, is in `runner.edits`; the options load no JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cascade import config
from cascade.devices.terminal import bar
from cascade.errors import OptionError, UserError

if TYPE_CHECKING:
    from cascade.stage import Sampling, StageConfig, Steering

USAGE = """usage: cascade edit PICTURE PROMPT [--strength LIST] [--mask FILE] [--around SHARE] ...

Redraw a picture from its strokes or colours, or a part of it.

  PICTURE   any picture; its central square is redrawn
  PROMPT    what it is to show

This is `cascade sample PROMPT --init-image PICTURE`, and takes all options of that:
`cascade sample --help` tells of them."""

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


def main(argv: Sequence[str]) -> list[str] | None:
    """The words of `cascade sample` that do what `cascade edit` is asked for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return None
    picture, *rest = argv
    if picture.startswith("-"):
        raise UserError(f"the first word must be a picture, got {picture}; see cascade edit --help")
    if any(word.partition("=")[0] == "--init-image" for word in rest):
        raise UserError(f"--init-image: the picture is {picture} already; leave it out")
    return ["sample", *rest, "--init-image", picture]


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
    around: Annotated[
        float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint="(default: none)")
    ] = None
    """Draw what lies around --init-image, on all sides this share of its own side, up to 1."""
    strength: Annotated[str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="")] = None
    """How much of --init-image changes, by stage: the share of the steps taken, above 0 to 1.
    0.5:3 takes them three times (SDEdit's repeats), 1:10:2 two at a time, ten times each (RePaint's
    jumps, with --mask). Default: .7 in the base stage (1 with --mask or --around), .8 in the
    others."""

    def __post_init__(self):
        given = {"--mask": self.mask, "--strength": self.strength, "--around": self.around}
        for flag, value in given.items():
            if value is not None and self.init_image is None:
                raise UserError(f"{flag} {value}: goes with --init-image, which is missing")
        if self.around is not None and not 0 < self.around <= 1:
            raise OptionError("around", self.around, "must be above 0, and at most 1")
        if self.around is not None and self.mask is not None:
            raise UserError("--around and --mask: give one of them; the former makes its own mask")

    def stages(self, stages: Sequence[StageConfig]) -> Sequence[StageConfig]:
        """The stages that draw, with the settings over which those of the command are laid."""
        if self.init_image is None:
            return stages
        from cascade.runner.edits import redrawn

        return redrawn(stages, masked=self.mask is not None or self.around is not None)

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
        from cascade.runner.edits import edits, warn_of_square
        from cascade.runner.overrides import by_stage

        picture = np.asarray(images.load_image(self.init_image))
        mask = None
        if self.mask is not None:
            mask = np.asarray(images.load_image(self.mask, ground="black").convert("L"))
        if self.around is not None:
            warn_of_square(*picture.shape[1::-1])
            picture, mask = widened(picture, self.around)
        strength = None
        if self.strength is not None:
            strength = list(by_stage("strength", self.strength, stages, every).values())
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
            "around": self.around,
        }


def widened(picture: Any, share: float) -> tuple[Any, Any]:
    """The central square of a picture uint8 [h, w, 3] with more around it, and the mask of that.

    share: of its side, added on all sides. What is added repeats the picture's border until it is
    drawn: uint8 [s, s, 3], and the mask uint8 [s, s], 255 there.
    """
    import numpy as np

    h, w, _ = picture.shape
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = picture[top : top + side, left : left + side]
    more = max(1, round(share * side))
    mask = np.pad(np.zeros((side, side), np.uint8), more, constant_values=255)
    return np.pad(square, ((more, more), (more, more), (0, 0)), mode="edge"), mask


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure editing on scenes whose truth is known, with a model that draws scenes.

    OUT gets strokes.png (facts right and FD-proxy over the distance to the strokes that SDEdit
    begins from, by strength), strokes_sheet.png (a row for the strokes and each strength),
    holes_sheet.png (the true picture, what was hidden, and what each way of inpainting drew) and
    results.json, which is also on stdout. It must be new or empty. The first stage alone draws.
    """

    out: Path
    """The folder to write."""
    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    inpainting: Annotated[
        str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: none)")
    ] = None
    """A model that was fine-tuned to fill holes, which fills them too."""
    pictures: int = 20
    """Scenes of each of two seeds, 2 or more."""
    strengths: str = "0.2,0.4,0.6,0.8,1"
    """What SDEdit is measured at, as in --strength, with commas between."""
    seed: int = 0
    """Which scenes, 0 or more."""


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """The trade-off of SDEdit from strokes; inpainting with and without RePaint's jumps."""
    options = config.parse(EvalOptions, argv, prog="cascade eval edit")
    if options.pictures < 2:
        raise UserError(f"--pictures must be 2 or more, got {options.pictures}")
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed must be in [0, 2^31), got {options.seed}")
    from cascade.runner.cascade import Cascade
    from cascade.runner.edits import walk_of
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.tasks.edit import figures

    strengths = options.strengths.split(",")
    for word in strengths:
        try:
            walk_of(word)
        except OptionError as e:
            raise UserError(f"--strengths {options.strengths}: {e}") from None
    with WholeFolder(options.out) as folder:
        model = Cascade.load(options.model)
        scenes = figures.cases(options.seed, options.pictures)
        count = figures.SEEDS * options.pictures
        ways = {
            "replacement": figures.by_replacement(model, "1"),
            "RePaint": figures.by_replacement(model, figures.REPAINT),
        }
        if options.inpainting is not None:
            other = Cascade.load(options.inpainting)
            ways["fine-tuned"] = figures.by_replacement(other, "1")
        total = count * (len(strengths) + len(ways))
        with bar(total=total, unit="picture", desc="editing") as shown:
            rows, tiles = figures.strokes_kept(model, scenes, strengths, shown.update)
            figures.plot(folder / "strokes.png", rows)
            names = ["strokes", *(f"strength {word}" for word in strengths)]
            figures.sheet_of_rows(folder / "strokes_sheet.png", tiles, names)
            found, tiles = figures.holes_filled(model, scenes, ways, shown.update)
            names = ["the true picture", "hidden", *ways]
            figures.sheet_of_columns(folder / "holes_sheet.png", tiles, names)
        report = {
            "model": options.model,
            "model_sha256": model.digest,
            "inpainting": options.inpainting,
            "seed": options.seed,
            "pictures": count,
            "strokes": rows,
            "holes": {name: one.as_json() for name, one in found.items()},
        }
        write_json(folder / "results.json", report)
    return report
