"""Restore a picture: its colours, what is hidden or around it, or what JPEG took (Palette).

    cascade train configs/restore/restore64.py --workdir runs/restore
    cascade export runs/restore models/restore
    cascade restore old.png --task colouring --model models/restore --out coloured.png
    cascade restore photo.png --task jpeg --model models/restore --out clean.png

Palette (Saharia et al. 2022) draws a picture while it is shown the damaged one, as three more
channels. One model learns all four tasks, and is told of none: it sees what is wrong. Holes are
shown as noise, errors count inside them alone, and what is known is put back after every step.

`damage.py` has the tasks, `source.py` what the stage is told and the steering, `training.py` the
job, `restoring.py` pictures of any size, `tints.py` and `figures.py` what `cascade eval restore`
measures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cascade import config
from cascade.errors import OptionError, UserError

TRAIN = "train one with configs/restore/restore64.py"
"""What a person can do who has no model for a task."""
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Restore a picture of any size: colour it, fill a hole, draw what lies around, undo JPEG.

    It writes a PNG of at most 2^22 pixels, and a line of JSON on stdout. What is known of the
    picture is in it exactly as it was. Another --seed draws it otherwise.
    """

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """The picture to restore."""
    task: Literal["colouring", "jpeg", "inpainting", "uncropping"]
    """What is to be done: give a grey picture its colours, take away what JPEG has left, fill what
    --mask says, or draw what lies --around."""
    out: Path
    """The PNG to write; gs:// and s3:// names are understood."""
    mask: File = None
    """For inpainting: what is drawn, in a picture of the size of PICTURE; white is drawn, black and
    what is transparent stays."""
    around: Annotated[
        float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint="(default: 0.25)")
    ] = None
    """For uncropping: how much is drawn on each side, as a share of the picture's own, up to 1."""
    model: str
    """A folder that `cascade export` wrote of a run of configs/restore/restore64.py."""
    seed: int = 0
    """Seed of the noise."""
    steps: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the model's)")
    ] = None
    """Sampling steps."""
    quiet: bool = False
    """Say nothing on stderr but errors."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade restore` with the words after it. Raises UserError for a person's mistake."""
    options = config.parse(Options, argv, prog="cascade restore")
    from cascade.devices.programs import use_compilation_cache
    from cascade.runner import output
    from cascade.storage import paths

    if (options.mask is None) == (options.task == "inpainting"):
        missing = options.mask is None
        raise UserError(
            "--task inpainting needs --mask FILE, white where the picture is to be drawn"
            if missing
            else f"--mask {options.mask}: is for --task inpainting, and this is {options.task}"
        )
    if options.around is not None and options.task != "uncropping":
        raise UserError(
            f"--around {options.around}: is for --task uncropping, and this is {options.task}"
        )
    if options.around is not None and not 0 < options.around <= 1:
        raise OptionError("around", options.around, "must be above 0, and at most 1")
    if not 0 <= options.seed < 2**32:
        raise OptionError("seed", options.seed, "must be in [0, 2^32)")
    if options.steps is not None and not 1 <= options.steps <= 10_000:
        raise OptionError("steps", options.steps, "must be 1 to 10,000")
    out = paths.path(options.out)
    if out.suffix.lower() != ".png" or out.exists():
        raise UserError(f"--out {out}: must be a new file whose name ends in .png")
    output.folder_of(options.out.parent)
    from cascade.images import load_image

    picture = load_image(options.picture)
    mask = None
    if options.mask is not None:
        mask = load_image(options.mask, ground="black").convert("L")
    use_compilation_cache()
    from cascade.runner.cascade import Cascade
    from cascade.runner.progress import Bar
    from cascade.tasks.restore.restoring import restorer, whole_picture

    model = Cascade.load(options.model)
    stage = restorer(model, options.task)
    steps = options.steps or stage.sampling.steps
    with Bar(1, {stage.name: steps}, shown=not options.quiet) as shown:
        drawn = whole_picture(
            model,
            picture,
            options.task,
            mask=mask,
            around=0.25 if options.around is None else options.around,
            seed=options.seed,
            steps=steps,
            progress=shown.told,
        )
    paths.make_folder(out.parent)
    drawn.save(out)
    h, w = drawn.image.shape[:2]
    told = {"file": str(out), "width": w, "height": h, "task": options.task, "seed": options.seed}
    print(json.dumps(told | {"model": options.model}))
    if not options.quiet:
        print(f"{options.task}: {out}, {w} x {h} px", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure restoration on pictures that are known whole, scenes or a folder's.

    OUT gets sheet.png (rows of damaged, restored and true pictures, for each task) and
    results.json, which is also on stdout. It must be new or empty.
    """

    out: Path
    """The folder to write."""
    model: str
    """A folder that `cascade export` wrote of a run of configs/restore/restore64.py."""
    data: str = "scenes:seen"
    """The pictures, which it must not have learned from: KIND:PLACE as for `cascade train`."""
    tints: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="MODEL ...", help_behavior_hint="(default: none)")
    ] = ()
    """Models of configs/restore/tints16.py: how often each colours squares red is told, and how
    often two differ."""
    pictures: int = 32
    """Pictures of each of two sets, 2 or more."""


def evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Four tasks of Palette, on pictures known whole, and on colours that nothing tells of."""
    options = config.parse(EvalOptions, argv, prog="cascade eval restore")
    if not 2 <= options.pictures <= 10_000:
        raise OptionError("pictures", options.pictures, "must be 2 to 10,000")
    from cascade.runner.cascade import Cascade
    from cascade.storage.paths import WholeFolder, write_json
    from cascade.tasks.restore import figures

    with WholeFolder(options.out) as folder:
        model = Cascade.load(options.model)
        tinting = {name: Cascade.load(name) for name in options.tints}
        for one in tinting.values():
            figures.check_tints(one)
        true = figures.pictures(model, options.data, options.pictures)
        found, tiles = figures.restorations(model, true)
        report: dict[str, Any] = {
            "model": options.model,
            "model_sha256": model.digest,
            "data": options.data,
            "pictures": figures.SETS * options.pictures,
            "tasks": {task: one.as_json() for task, one in found.items()},
        }
        if tinting:
            report["tints"] = {name: figures.proportion(one) for name, one in tinting.items()}
        figures.sheet(folder / "sheet.png", tiles)
        write_json(folder / "results.json", report)
    return report
