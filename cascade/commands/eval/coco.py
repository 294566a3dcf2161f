"""The zero-shot COCO protocol as one command."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade.commands.eval.options import (
    Options,
    drawer_of,
    drawing,
    numbers_of,
    processes,
    progress,
)
from cascade.commands.eval.pictures import network_of, new_statistics
from cascade.commands.sample import ByStage, Until
from cascade.errors import UserError

if TYPE_CHECKING:
    from cascade.evaluation import coco as protocols
    from cascade.evaluation import fid
    from cascade.evaluation.features import Features

Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class CocoOptions(Options):
    """Take the zero-shot FID of COCO, FID-30K, as Imagen, GLIDE and DALL-E 2 have it.

    CAPTIONS is captions_val2014.json of MS COCO, and --pictures the folder of val2014. Captions are
    drawn at random from all of val2014, a picture of each is drawn, and these are beside all
    pictures of val2014, cropped to their central squares and resized to 256 px. On stdout are for
    each weight of guidance FID, KID, precision and recall, and with --clip the CLIP score and the
    distance by CLIP's features. OUT gets captions.jsonl (the draw; one that lies there before, such
    as a published one, is taken), guidance-W/ for each weight (pictures as `cascade sample` writes
    them), results.json, sheet.png (drawn beside true), and of several weights pareto.png and
    pareto.csv (FID against CLIP score). The command may be stopped at any time: given again, it
    goes on where it was. With another model, captions, draw or settings it is refused; weights may
    be added. Several processes, started as `cascade train --help` says, share the work.
    """

    captions: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTIONS")]
    """captions_val2014.json, or a file like it."""
    pictures: Folder = None
    """The folder of the true pictures that CAPTIONS names, COCO_val2014_*.jpg."""
    reference: File = None
    """Statistics of the true pictures (.npz of --save-statistics or pytorch-fid), in their place;
    KID, precision, recall and the distance by CLIP need the pictures."""
    out: Path
    """The folder to write, or to go on with."""
    seed: int = 0
    """Chooses the captions; the picture of caption i, counted from 0, has this seed + 1000 i."""
    prompts: int = 30_000
    """Captions drawn, each with one picture. Fewer are the first of more; FID of fewer is larger,
    and cannot be compared with published values."""
    guidance: Annotated[
        str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="(default: the model's own)")
    ] = None
    """Weights of classifier-free guidance in the base stage, with commas between; 1 is none. All
    captions are drawn at each. Imagen's curve has 1 to 10."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage, as `cascade sample --guidance-plan`."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels; default the first of --side or more."""
    side: int = 256
    """Pictures are brought to this side, in pixels, before they are compared."""
    network: Literal["inception", "random"] = "inception"
    """The network whose features are compared; random makes FD-proxy, for settings of one model."""
    weights: Name = None
    """Inception's weights as a safetensors file."""
    like: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity"
    """How pictures come to 299 px for Inception: as TensorFlow had it, or as pytorch-fid has it."""
    clip: Name = None
    """A CLIP for the CLIP score: a folder as transformers writes it, or OWNER/NAME of the hub.
    Imagen's is ViT-L/14."""
    batch: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Pictures drawn together, at most 4096; default 1 on a CPU, 8 elsewhere. Another number may
    round a last bit of a picture otherwise."""
    batch_size: int = 32
    """Pictures that a network sees together."""
    save_statistics: File = None
    """A new .npz for the statistics of the true pictures, to be given as --reference."""


def evaluate_coco(options: CocoOptions) -> dict[str, Any] | None:
    """Do `cascade eval coco`: fill options.out, and return what goes to stdout."""
    guidance = _check(options)
    kept = new_statistics(options)
    from cascade.evaluation import coco
    from cascade.runner import output

    folder = output.folder_of(options.out)
    if not isinstance(folder, Path):
        raise UserError(f"--out {options.out}: must be a folder of this machine")
    captions = coco.read(options.captions)
    with processes(options.compilation_cache):
        from cascade.published import clip

        network = network_of(options)
        true = _true(options, captions, network)
        judges = coco.Judges(
            network=network,
            clip=None if options.clip is None else clip.load(options.clip),
            side=options.side,
            batch=options.batch_size,
        )
        protocol = _protocol(options, captions, folder, guidance)
        with protocol.opened() as runs:
            _draw(options, runs)
            with progress(judges.pictures(protocol, true)) as advance:
                measured = coco.measure(protocol, runs, true, judges, advance)
            if measured is None:
                return None
            report, statistics = measured
            if kept is not None:
                statistics.save(kept)
                report["statistics"] = str(kept)
            coco.finish(protocol, runs, true, report, options.side)
        for note in report["notes"]:
            print(f"warning: {note}", file=sys.stderr)
    return report


COMMANDS = {
    "coco": (CocoOptions, evaluate_coco, "the zero-shot COCO protocol: FID-30K, CLIP score"),
}


def _check(options: CocoOptions) -> tuple[float, ...] | None:
    for name, least in (("side", 8), ("batch_size", 1), ("prompts", 2), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if options.batch is not None and options.batch > 4096:
        raise UserError(f"--batch {options.batch}: must be 1 to 4096")
    from cascade.evaluation import coco
    from cascade.evaluation.prompt_runs import SEEDS_APART

    last = options.seed + SEEDS_APART * (options.prompts - 1)
    if options.seed < 0 or last >= 2**32:
        raise UserError(
            f"--seed {options.seed}: must be 0 or more, and the last picture's, {last}, below 2^32"
        )
    if (options.pictures is None) == (options.reference is None):
        raise UserError(
            "give the true pictures by --pictures DIR, or their statistics by --reference FILE.npz "
            f"in their place. {coco.SOURCES}"
        )
    if options.guidance is None:
        return None
    guidance = numbers_of("--guidance", options.guidance)
    if not all(0 <= weight <= 1e6 for weight in guidance):
        raise UserError(f"--guidance {options.guidance}: weights must be in 0 to 1e6; 1 is none")
    names = [coco.folder_name(weight) for weight in guidance]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--guidance {options.guidance}: two weights are of {twice[0]}; give one")
    return guidance


def _true(options: CocoOptions, captions: protocols.Captions, network: Features) -> fid.Pictures:
    from cascade.data import FolderData
    from cascade.evaluation import coco, fid
    from cascade.evaluation.distances import Statistics
    from cascade.storage import paths

    if options.reference is not None:
        known = Statistics.load(paths.path(options.reference))
        true = fid.Pictures(name=str(options.reference), side=options.side, known=known)
        fid.seen(true, network, options.out, batch=1)  # those of another network are refused now
        return true
    assert options.pictures is not None
    source = coco.TruePictures(captions, options.pictures, options.side)
    if len(source) < 2:
        raise UserError(f"{captions.path}: names {len(source)} picture; two or more are needed")
    return fid.Pictures(
        name=str(options.pictures),
        side=options.side,
        data=FolderData(path=str(options.pictures)),
        source=source,
        count=len(source),
    )


def _protocol(
    options: CocoOptions,
    captions: protocols.Captions,
    folder: Path,
    guidance: tuple[float, ...] | None,
) -> protocols.Protocol:
    from cascade.evaluation import coco

    drawer = drawer_of(
        options,
        guidance_plan=options.guidance_plan,
        aug_level=options.aug_level,
        until=options.until,
    )
    stages = [stage.config for stage, _ in drawer.cascade.select(until=options.until)]
    sides = [stage.resolution for stage in stages]
    until = next((side for side in sides if side >= options.side), None)
    if until is None:
        raise UserError(
            f"--side {options.side}: pictures are drawn at {sides[-1]} px at most; give --side "
            f"{sides[-1]} or less"
        )
    until = options.until or until
    names = [stage.name for stage in stages if stage.resolution <= until]
    settings = {name: drawer.settings[name] for name in names}
    return coco.Protocol(
        folder=folder,
        captions=captions,
        prompts=options.prompts,
        seed=options.seed,
        drawer=dataclasses.replace(drawer, settings=settings),
        weights=guidance or (settings[names[0]].guidance,),
        until=until,
    )


def _draw(options: CocoOptions, runs: Any) -> None:
    from cascade.runner.cascade import default_batch_size

    batch = options.batch or default_batch_size()
    own = {weight: run.own(batch) for weight, run in runs.items()}
    done = sum(len(set(own[w]).intersection(run.drawn())) for w, run in runs.items())
    next(iter(runs.values())).warn()
    with drawing(sum(map(len, own.values())), done) as advance:
        for run in runs.values():
            run.draw(batch, advance)
