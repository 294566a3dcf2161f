"""Measures on any pictures: distances between two sets, nearness of pictures and captions."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade.commands.eval.options import (
    Folder,
    Options,
    drawer_of,
    drawing,
    is_first,
    processes,
    progress,
    write,
)
from cascade.errors import UserError

if TYPE_CHECKING:
    from cascade.data.samples import SamplesData
    from cascade.data.source import Data, Source
    from cascade.evaluation.features import Features
    from cascade.storage.paths import Path as AnyPath


@dataclass(frozen=True, kw_only=True)
class _Options:
    side: int = 256
    """Pictures are cropped to their central square and brought to this side, in pixels, first."""
    split: str = "train"
    """The split of datasets that have several."""
    batch_size: int = 32
    """Pictures that the network sees together."""
    seed: int = 0
    """Chooses what is drawn at random: subsets of pictures, other captions, scenes."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts faster."""


@dataclass(frozen=True, kw_only=True)
class FIDOptions(_Options):
    """Say how far two sets of pictures are apart: FID, KID, precision, recall, density, coverage.

    PICTURES are beside REFERENCE, the true ones. Each is a folder of pictures, a folder of `cascade
    sample` (samples:DIR), any other dataset (tar:, parquet:, hf:, table:, tfds:NAME@DIR,
    scenes:seen), or statistics (.npz, also those of pytorch-fid). PICTURES may be a model
    (model:NAME), which draws the captions of REFERENCE into OUT/drawn. FID and KID are by
    Inception, and need its weights; with CLIP, or with a random network that needs none, figures
    have other names.
    FID falls with the number of pictures: compare values of equally many alone. JSON is on stdout;
    OUT gets results.json and sheet.png. A run that was stopped goes on when the same command is
    given again with its OUT, which several processes may share (see `cascade train --help`).
    """

    pictures: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")]
    """The set that is measured."""
    reference: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[REFERENCE]", help_behavior_hint="")
    ] = ""
    """The set that it is measured by; without it there are statistics alone."""
    network: Literal["inception", "clip", "random"] = "inception"
    """The network whose features are compared; random makes FD-proxy, for settings of one model."""
    weights: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")
    ] = None
    """Inception's weights as a safetensors file, or a CLIP: a folder, or OWNER/NAME of the hub."""
    like: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity"
    """How pictures come to 299 px for Inception: as TensorFlow had it, or as pytorch-fid has it."""
    count: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: all)")] = None
    """Pictures of each set, from the first."""
    out: Folder = None
    """A folder for results.json and sheet.png, which is new or empty, or of a run that was
    stopped."""
    captions: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the reference's)")
    ] = None
    """What a model draws: prompts in text, csv, tsv or JSON lines, as `cascade eval prompts` reads
    them. It draws with its own settings; picture i has the seed --seed + 1000 i."""
    save_statistics: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
    ] = None
    """A new .npz for the statistics of PICTURES, to be given in their place."""


@dataclass(frozen=True, kw_only=True)
class CLIPOptions(_Options):
    """Say how well pictures show their captions: CLIP score and R-precision.

    PICTURES are a folder of `cascade sample` (samples:DIR), whose prompts are the captions, or any
    dataset with captions, as in `cascade eval fid`. JSON is on stdout, with 95 % intervals; OUT
    gets results.json, clip.png (the distribution) and sheet.png (the best and the worst). A run
    that was stopped goes on when the same command is given again with its OUT.
    """

    pictures: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")]
    """The pictures with their captions."""
    weights: str = "openai/clip-vit-large-patch14"
    """The CLIP that judges: a folder as transformers writes it, or OWNER/NAME of the hub."""
    count: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: all)")] = None
    """Pictures, from the first."""
    out: Folder = None
    """A folder for what is written, which is new or empty, or of a run that was stopped."""


def evaluate_fid(options: FIDOptions) -> dict[str, Any] | None:
    """Do `cascade eval fid`: fill options.out, and return what goes to stdout."""
    _check(options)
    if not options.reference and options.save_statistics is None:
        raise UserError(
            "REFERENCE is missing: give the true pictures, or --save-statistics FILE for those of "
            f"{options.pictures} alone"
        )
    kept = new_statistics(options)
    with _program(options, "another `cascade eval fid`") as (folder, unfinished):
        from cascade.evaluation import fid
        from cascade.evaluation.features import own

        words = [options.pictures, *([options.reference] if options.reference else [])]
        sets = [_set(word, options, unfinished) for word in words]
        network = network_of(options)
        with progress(sum(own(s.count) for s in sets)) as advance:
            seen = [
                fid.seen(s, network, unfinished, batch=options.batch_size, advance=advance)
                for s in sets
            ]
        if not is_first():
            return None
        report = {
            "network": network.name,
            "weights_sha256": network.digest,
            "side": options.side,
            **{name: s.about for name, s in zip(("pictures", "reference"), seen, strict=False)},
        }
        if kept is not None:
            report["statistics"] = str(kept)
        if len(seen) > 1:
            report |= fid.compare(seen[0], seen[1], network, options.seed)
        if folder is not None:
            if len(sets) > 1:
                fid.sheet(folder, list(zip(sets, seen, strict=True)))
            write(folder, report)
        if kept is not None:  # last, for where it is there the command is not given again
            seen[0].statistics.save(kept)
    return report


def evaluate_clip(options: CLIPOptions) -> dict[str, Any] | None:
    """Do `cascade eval clip`: fill options.out, and return what goes to stdout."""
    _check(options)
    with _program(options, "another `cascade eval clip`") as (folder, unfinished):
        from cascade.evaluation import clip_score, features
        from cascade.published import clip

        data, source, count = _source(options.pictures, options)
        model = clip.load(options.weights)
        network = features.of_clip(model)
        place = features.place(unfinished / "captions", network, data, source, count)
        with progress(features.own(count)) as advance:
            found = clip_score.score(
                *(source, count, model, network, place),
                batch=options.batch_size,
                seed=options.seed,
                advance=advance,
            )
        if not is_first():
            return None
        report = {
            "network": network.name,
            "weights_sha256": network.digest,
            "what": options.pictures,
            "left_out": count - len(found.indices),
            **found.as_json(),
        }
        if folder is not None:
            clip_score.sheet(folder, source, found)
            write(folder, report)
    return report


COMMANDS = {
    "fid": (
        FIDOptions,
        evaluate_fid,
        "how far two sets of pictures are apart: FID, KID, precision, recall",
    ),
    "clip": (
        CLIPOptions,
        evaluate_clip,
        "how well pictures show their captions: CLIP score, R-precision",
    ),
}


def _check(options: Any) -> None:
    for name, least, most in (("side", 8, 4096), ("batch_size", 1, 4096), ("count", 2, 10**8)):
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise UserError(f"{flag} must be {least} or more, got {value}")
        if value is not None and value > most:
            raise UserError(f"{flag} must be at most {most}, got {value}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2^32), got {options.seed}")


@contextlib.contextmanager
def _program(options: Any, held_by: str) -> Iterator[tuple[AnyPath | None, AnyPath]]:
    """While entered, this process is one of all that run the command: (OUT, what is unfinished)."""
    with processes(options.compilation_cache):
        import jax

        from cascade.evaluation import resumable

        if options.out is not None:
            with resumable.folder(options.out, held_by) as folders:
                yield folders
        elif jax.process_count() > 1:
            raise UserError("--out is missing: several processes need a folder that all see")
        else:
            with tempfile.TemporaryDirectory(prefix="cascade-") as folder:
                yield None, Path(folder)


def network_of(options: Any) -> Features:
    """The network of --network, --weights and --like, and for CLIP its own."""
    from cascade.evaluation import features
    from cascade.published import clip, inception

    if options.network == "random":
        if options.weights is not None:
            raise UserError("--weights: a random network has none; leave them out")
        return features.of_random()
    if options.network == "clip":
        return features.of_clip(clip.load(options.weights or "openai/clip-vit-large-patch14"))
    if options.weights is None:
        raise UserError(f"--weights FILE is missing: {inception.HOW}; or give --network random")
    return features.of_inception(options.weights, options.like)


def _set(word: str, options: FIDOptions, unfinished: AnyPath) -> Any:
    from cascade.evaluation import fid
    from cascade.evaluation.distances import Statistics
    from cascade.storage import paths

    if word.endswith(".npz"):
        known = Statistics.load(paths.path(word))
        return fid.Pictures(name=word, side=options.side, known=known)
    if word.startswith("model:"):
        data = _drawn(word, options, unfinished)
        source = data.open(options.side)
        return fid.Pictures(
            name=word, side=options.side, data=data, source=source, count=len(source)
        )
    data, source, count = _source(word, options, needs_captions=False)
    return fid.Pictures(name=word, side=options.side, data=data, source=source, count=count)


def _source(word: str, options: Any, *, needs_captions: bool = True) -> tuple[Data, Source, int]:
    from cascade.data import FolderData
    from cascade.scenes.dataset import ScenesData
    from cascade.scenes.words import dataset

    data = dataset(word, options.split, options.seed)
    if isinstance(data, FolderData):
        data = replace(data, needs_captions=needs_captions)
    if isinstance(data, ScenesData) and options.count is None:
        raise UserError(f"{word}: scenes have no end; say how many with --count, such as 2000")
    source = data.open(options.side)
    count = min(len(source), options.count or len(source))
    if count < 2:
        raise UserError(f"{word}: has {count} picture; two or more are needed")
    return data, source, count


def _drawn(word: str, options: FIDOptions, unfinished: AnyPath) -> SamplesData:
    """What a model draws of the captions, as a dataset."""
    from cascade.evaluation import drawn, prompt_sets
    from cascade.evaluation.prompt_runs import SEEDS_APART
    from cascade.runner.cascade import default_batch_size

    if options.out is None or not isinstance(unfinished, Path):
        raise UserError(f"{word}: needs --out DIR, a folder of this machine for what it draws")
    if word != options.pictures:
        raise UserError(f"{word}: is drawn of the captions of the reference; give it as PICTURES")
    own = Options(model=word.removeprefix("model:"), compilation_cache=options.compilation_cache)
    drawer = drawer_of(own)
    drawn.stage_of(drawer, options.side)  # what is wrong is told before anything is written
    if options.captions is not None:
        texts = [prompt.text for prompt in prompt_sets.read([options.captions])[0].prompts]
        texts = texts[: options.count]
    elif not options.reference or options.reference.endswith(".npz"):
        raise UserError(f"{word}: needs --captions FILE, where no reference has captions")
    else:
        _, source, count = _source(options.reference, options)
        texts = [source.captions_of(i)[0] for i in range(count)]
    last = options.seed + SEEDS_APART * (len(texts) - 1)
    if len(texts) < 2 or last >= 2**32:
        raise UserError(
            f"{word}: {len(texts)} captions, the last with the seed {last}; there must be two or "
            "more, and seeds are below 2^32"
        )
    return drawn.draw(
        *(drawer, drawn.kept(texts, unfinished), unfinished.parent),
        side=options.side,
        seed=options.seed,
        batch=default_batch_size(),
        bar=drawing,
    )


def new_statistics(options: Any) -> AnyPath | None:
    """The file of --save-statistics, which must be new; None where none is asked for."""
    from cascade.storage import paths

    if options.save_statistics is None:
        return None
    file = paths.path(options.save_statistics)
    if file.suffix != ".npz":
        raise UserError(f"--save-statistics {file}: must end with .npz")
    if file.exists():
        raise UserError(f"--save-statistics {file}: exists already; name a new file")
    folder = file.parent
    if not paths.is_remote(file) and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"--save-statistics {file}: {folder} is no folder that can be written to; make it, or "
            "name another"
        )
    return file
