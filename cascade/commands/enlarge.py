"""Enlarge a picture of any shape, tile by tile."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cascade import config
from cascade.commands.sample import ByStage
from cascade.devices.programs import use_compilation_cache
from cascade.errors import UserError
from cascade.runner import output
from cascade.storage import paths


@dataclass(frozen=True, kw_only=True)
class Options:
    """Enlarge a picture of any shape by a model's last stage, in overlapping tiles.

    The stage of the model that ships takes 256 px to 1024, so a picture of 1024 x 768 px becomes
    one of 4096 x 3072. The prompt is told to every tile. It writes a PNG of at most 2^26 pixels,
    and a line of JSON on stdout.
    """

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """The picture to enlarge, at least as large as a tile on both sides."""
    prompt: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
    ] = ""
    """What it shows, for a model that reads a text."""
    out: Path
    """The PNG to write; gs:// and s3:// names are understood."""
    model: str = "scenes"
    """As `cascade sample --model` takes it; its last stage draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """As for `cascade sample`: the type of public weights and of their computation."""
    seed: int = 0
    """Seed of the noise that all tiles share."""
    steps: ByStage = None
    """Sampling steps."""
    guidance: ByStage = None
    """Weight of classifier-free guidance; 1 is none."""
    aug_level: ByStage = None
    """Noise on the picture, 0 to 1."""
    sampler: ByStage = None
    """As for `cascade sample`."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Tiles drawn together, at most 4096; default 1 on a CPU, 8 elsewhere."""
    quiet: bool = False
    """Say nothing on stderr but errors."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade enlarge` with the words after it. Raises UserError for a person's mistake."""
    options = config.parse(Options, argv, prog="cascade enlarge")
    out = paths.path(options.out)
    if out.suffix.lower() != ".png" or out.exists():
        raise UserError(f"--out {out}: must be a new file whose name ends in .png")
    output.folder_of(options.out.parent)
    use_compilation_cache()
    from cascade.images import load_image
    from cascade.runner.cascade import Cascade, default_batch_size
    from cascade.runner.overrides import override
    from cascade.runner.progress import Bar
    from cascade.runner.tiles import corners, enlarge

    picture = load_image(options.picture)
    model = Cascade.load(options.model, dtype=options.dtype)
    (stage, _) = model.stages[-1]
    if not options.prompt.strip() and stage.config.text is not None:
        raise UserError("the prompt is missing: behind the picture, write what it shows")
    if options.prompt and stage.config.text is None:
        raise UserError(f"model {options.model}: reads no text; leave the prompt out")
    lists = {name: getattr(options, name) for name in ("steps", "guidance", "aug_level", "sampler")}
    (settings,) = override([stage.config], **lists)
    batch_size = options.batch_size or default_batch_size()
    tiles = len(corners(model, picture.height, picture.width))
    steps = {stage.config.name: settings.steps}
    with Bar(-(-tiles // batch_size), steps, shown=not options.quiet) as bar:
        drawn = enlarge(
            model,
            options.prompt or options.picture.stem,
            picture,
            seed=options.seed,
            settings=[settings],
            batch_size=batch_size,
            progress=bar.told,
        )
    paths.make_folder(out.parent)
    drawn.save(out)
    h, w = drawn.image.shape[:2]
    told = {"file": str(out), "width": w, "height": h, "tiles": tiles}
    print(json.dumps(told | {"prompt": options.prompt, "seed": options.seed}))
    if not options.quiet:
        print(f"{picture.width} x {picture.height} -> {w} x {h} px: {out}", file=sys.stderr)
