"""Measures on scenes, whose pictures are read back by analysis."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cascade.commands.eval.options import (
    Folder,
    Options,
    TextOptions,
    check,
    described,
    drawer_of,
    numbers_of,
    progress,
    write,
)
from cascade.commands.sample import ByStage, Until, judge_of
from cascade.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(TextOptions):
    """Draw prompts of the scenes grammar, read the pictures back, count the facts they show.

    A picture's shapes, colours, sizes, finishes, places and background are read by analysis alone.
    On stdout are, for each set and side, the shares of facts and of prompts wholly right, also by
    category, with 95 % intervals; and "edges", the mean distance in pixels between drawn outlines
    and ideal ones, by shape (from 256 px up of plain objects only). OUT gets index.html
    (every picture with its verdicts, the worst first), pictures/ and results.json. It must be new
    or empty.
    """

    out: Path
    """The folder to write."""
    set: Literal["seen", "unseen", "long", "all"] = "seen"
    """seen: prompts as in training. unseen: with combinations of shape and colour that training
    never had. long: with three or four objects. all: each of these."""
    prompts: int = 300
    """Prompts of each set."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels (64, 256 or 1024)."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by stage; 1 is none."""
    guidance_plan: ByStage = None
    """The weight over the steps, by stage, as `cascade sample --guidance-plan`."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""
    best_of: int = 1
    """Candidates drawn of each picture, as `cascade sample --best-of`."""
    clip: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")
    ] = None
    """The CLIP that chooses among them, as `cascade sample --clip`."""


@dataclass(frozen=True, kw_only=True)
class SuperResolutionOptions(TextOptions):
    """Let each super-resolution stage enlarge true small pictures of scenes.

    On stdout are, for each stage and next to bicubic enlargement, PSNR against the render,
    sharpness (the share of the render's gradient energy) and FD-proxy (a Fréchet distance on
    features of a random network; it is not FID). "truth" is the FD-proxy of renders of other scenes
    to these: chance alone makes so much, and no model can be expected to be nearer.
    """

    pictures: int = 100
    """Scenes to enlarge."""
    out: Folder = None
    """A folder for results.json and a sheet for each stage; new or empty."""
    guidance: ByStage = None
    """Weight of classifier-free guidance, by super-resolution stage; 1 is none."""
    aug_level: ByStage = None
    """Noise on the low-resolution picture, 0 to 1, by super-resolution stage."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(TextOptions):
    """Draw the same prompts at several guidance weights and augmentation levels.

    OUT gets sweep.png (facts right against FD-proxy), sweep.csv and results.json. It must be new or
    empty.
    """

    out: Path
    """The folder to write."""
    guidance: str = "1,2,4,8"
    """Weights of classifier-free guidance in the base stage, with commas between; 1 is none."""
    aug_level: str = "0,0.1,0.2,0.4"
    """Levels of noise on the low-resolution picture, 0 to 1, with commas between; each is that of
    all super-resolution stages."""
    prompts: int = 100
    """Prompts drawn at each combination."""
    until: Until = None
    """Stop at the stage that draws this side, in pixels; 1024 takes long."""


@dataclass(frozen=True, kw_only=True)
class PropertiesOptions(Options):
    """Measure whether the mechanisms of an Imagen cascade do their work.

    Six properties are measured, with three seeds: (a) prompt-following grows with guidance; (b)
    shuffled captions fall to chance; (c) saturated pixels are most without thresholding and fewest
    with dynamic thresholding; (d) super-resolution trained with augmentation survives a noisy small
    picture, and without it does not (two small stages are trained for each seed: this one is not
    about the model); (e) sensitivity to the prompt grows with the augmentation level; (f) the last
    stage runs on larger images than its crops. On stdout are the figures of each seed, and the
    margin of each claim: a claim holds from two standard errors on, a property if all of its claims
    do. A table is on stderr.
    """

    out: Folder = None
    """A folder for results.json and properties.png; new or empty."""
    prompts: int = 128
    """Prompts of each seed, 8 or more; e and f take a quarter of them."""


def evaluate_scenes(options: ScenesOptions) -> dict[str, Any]:
    """Do `cascade eval scenes`: fill options.out, and return what goes to stdout."""
    check(options, "--prompts", options.prompts)
    from cascade.evaluation import page, scenes
    from cascade.storage.paths import WholeFolder

    sets = page.SETS if options.set == "all" else (options.set,)
    with WholeFolder(options.out) as folder:
        drawer = drawer_of(
            options,
            guidance=options.guidance,
            guidance_plan=options.guidance_plan,
            aug_level=options.aug_level,
            until=options.until,
        )
        judge = judge_of(options.best_of, options.clip)
        if judge is not None:
            drawer = replace(drawer, best_of=options.best_of, judge=judge.likeness)
        with progress(len(sets) * options.prompts) as advance:
            results, pictures = scenes.evaluate_scenes(
                drawer,
                folder,
                sets=sets,
                prompts=options.prompts,
                seed=options.seed,
                until=options.until,
                advance=advance,
            )
        report = {**described(options, drawer), "prompts": options.prompts, "sets": results}
        if judge is not None:
            report |= {"best_of": options.best_of, "clip": judge.name, "clip_sha256": judge.digest}
        write(folder, {**report, "pictures": pictures})
    return report


def evaluate_super_resolution(options: SuperResolutionOptions) -> dict[str, Any]:
    """Do `cascade eval sr`: fill options.out, if it is named, and return what goes to stdout."""
    check(options, "--pictures", options.pictures, least=2)
    from cascade.evaluation import super_resolution
    from cascade.storage.paths import WholeFolder

    def run(folder: Path | None) -> dict[str, Any]:
        drawer = drawer_of(
            options, guidance=options.guidance, aug_level=options.aug_level, enlarging=True
        )
        with progress(len(drawer.settings) * options.pictures) as advance:
            results = super_resolution.evaluate_super_resolution(
                drawer,
                pictures=options.pictures,
                seed=options.seed,
                folder=folder,
                advance=advance,
            )
        return {**described(options, drawer), "stages": results}

    if options.out is None:
        return run(None)
    with WholeFolder(options.out) as folder:
        report = run(folder)
        write(folder, report)
    return report


def sweep(options: SweepOptions) -> dict[str, Any]:
    """Do `cascade eval sweep`: fill options.out, and return what goes to stdout."""
    check(options, "--prompts", options.prompts, least=2)
    guidance = numbers_of("--guidance", options.guidance)
    aug_levels = numbers_of("--aug-level", options.aug_level)
    if not all(0 <= level <= 1 for level in aug_levels):
        raise UserError(f"--aug-level {options.aug_level}: levels must be in [0, 1]")
    from cascade.evaluation import sweep as sweeping
    from cascade.storage.paths import WholeFolder

    with WholeFolder(options.out) as folder:
        drawer = drawer_of(options, until=options.until)
        alone = len(drawer.cascade.select(until=options.until)) == 1
        rounds = len(guidance) * (1 if alone else 1 + len(aug_levels))
        with progress(rounds * options.prompts) as advance:
            rows = sweeping.sweep(
                drawer,
                folder,
                guidance=guidance,
                aug_levels=aug_levels,
                prompts=options.prompts,
                seed=options.seed,
                until=options.until,
                advance=advance,
            )
        report = {**described(options, drawer), "prompts": options.prompts, "points": rows}
        write(folder, report)
    return report


def properties(options: PropertiesOptions) -> dict[str, Any]:
    """Do `cascade eval properties`: fill options.out, if named, and return what goes to stdout."""
    check(options, "--prompts", options.prompts, least=8, seeds=3)
    from cascade.evaluation import augmentation, scenes, super_resolution
    from cascade.evaluation import properties as measures
    from cascade.storage.paths import WholeFolder

    def run(folder: Path | None) -> dict[str, Any]:
        drawer = drawer_of(options)
        scenes.check_sides(drawer, drawer.cascade.stages[0][0].config.resolution)
        super_resolution.super_resolution_stages(drawer.cascade)
        prompts = measures.prompts_of(options.seed, options.prompts)
        quarter = measures.quarter(prompts)
        with progress(measures.drawings(prompts)) as advance:
            a, b = measures.following(drawer, prompts, advance)
            c = measures.saturation(drawer, prompts, advance)
            e = measures.sensitivity(drawer, quarter, advance)
            f = measures.larger_pictures(drawer, quarter, advance)
        seeds = measures.seeds_of(options.seed, options.prompts)
        d = augmentation.augmentation(seeds, options.prompts)
        found = {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f}
        print(measures.table(found), file=sys.stderr)
        report = {
            **described(options, drawer),
            "prompts": options.prompts,
            "seeds": seeds,
            "holds": all(one.holds for one in found.values()),
            "properties": {name: one.as_json() for name, one in found.items()},
        }
        if folder is not None:
            measures.plot(folder / "properties.png", found)
            write(folder, report)
        return report

    if options.out is None:
        return run(None)
    with WholeFolder(options.out) as folder:
        return run(folder)


COMMANDS = {
    "scenes": (
        ScenesOptions,
        evaluate_scenes,
        "draw prompts, read the pictures back, count the facts that they show",
    ),
    "sr": (
        SuperResolutionOptions,
        evaluate_super_resolution,
        "super-resolution of true small pictures: PSNR, sharpness, FD-proxy",
    ),
    "sweep": (
        SweepOptions,
        sweep,
        "facts right against FD-proxy, by guidance and augmentation level",
    ),
    "properties": (
        PropertiesOptions,
        properties,
        "whether guidance, thresholding and augmentation do their work",
    ),
}
