"""Measure a model: facts right, sweeps, properties."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.commands.sample import ByStage, Until
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.tasks import that_have

if TYPE_CHECKING:
    from cascade.evaluation.drawer import Drawer

USAGE = """usage: cascade eval WHAT ...

Figures of merit as JSON on stdout, pictures and plots into --out.

  scenes      draw prompts, read the pictures back, count the facts that they show
  sr          super-resolution of true small pictures: PSNR, sharpness, FD-proxy
  sweep       facts right against FD-proxy, by guidance and augmentation level
  properties  whether guidance, thresholding and augmentation do their work"""


Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class _Options:
    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    seed: int = 0
    """Chooses the prompts, none of which are training's; picture i is drawn with seed + i."""
    steps: ByStage = None
    """Sampling steps, by stage that draws: 16,4,2, smallest first, or one value for all."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts faster."""


@dataclass(frozen=True, kw_only=True)
class _TextOptions(_Options):
    null_text_in_sr: Literal["true", "false"] = "false"
    """Whether super-resolution stages draw without the prompt."""


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(_TextOptions):
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


@dataclass(frozen=True, kw_only=True)
class SuperResolutionOptions(_TextOptions):
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
class SweepOptions(_TextOptions):
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
class PropertiesOptions(_Options):
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


def main(argv: Sequence[str]) -> None:
    """Run `cascade eval` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    tasks = that_have("evaluate")
    tasks = {name.rpartition(".")[2]: evaluate for name, evaluate in tasks.items()}
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(tasks))
    elif argv[0] in tasks:
        print(json.dumps(tasks[argv[0]](argv[1:]), indent=2))
    elif argv[0] in _COMMANDS:
        options_class, command = _COMMANDS[argv[0]]
        options = config.parse(options_class, argv[1:], prog=f"cascade eval {argv[0]}")
        print(json.dumps(command(options), indent=2))
    else:
        near = config.nearest(argv[0], [*_COMMANDS, *tasks])
        raise UserError(f"{argv[0]!r} is no command of cascade eval{near}")


def _usage(tasks: Mapping[str, Callable[..., Any]]) -> str:
    """With what the tasks measure, each told of by the first line of its function's docstring."""
    told = {name: (evaluate.__doc__ or "").partition("\n")[0] for name, evaluate in tasks.items()}
    lines = [f"  {name:<11} {of[:1].lower()}{of[1:].rstrip('.')}" for name, of in told.items()]
    more = "`cascade eval WHAT --help` shows what each takes, with units and defaults."
    return "\n".join([USAGE, *lines, "", more])


def evaluate_scenes(options: ScenesOptions) -> dict[str, Any]:
    """Do `cascade eval scenes`: fill options.out, and return what goes to stdout."""
    _check(options, "--prompts", options.prompts)
    from cascade.evaluation import page, scenes
    from cascade.storage.paths import WholeFolder

    sets = page.SETS if options.set == "all" else (options.set,)
    with WholeFolder(options.out) as folder:
        drawer = _drawer(
            options,
            guidance=options.guidance,
            guidance_plan=options.guidance_plan,
            aug_level=options.aug_level,
            until=options.until,
        )
        with _progress(len(sets) * options.prompts) as advance:
            results, pictures = scenes.evaluate_scenes(
                drawer,
                folder,
                sets=sets,
                prompts=options.prompts,
                seed=options.seed,
                until=options.until,
                advance=advance,
            )
        report = {**_described(options, drawer), "prompts": options.prompts, "sets": results}
        _write(folder, {**report, "pictures": pictures})
    return report


def evaluate_super_resolution(options: SuperResolutionOptions) -> dict[str, Any]:
    """Do `cascade eval sr`: fill options.out, if it is named, and return what goes to stdout."""
    _check(options, "--pictures", options.pictures, least=2)
    from cascade.evaluation import super_resolution
    from cascade.storage.paths import WholeFolder

    def run(folder: Path | None) -> dict[str, Any]:
        drawer = _drawer(
            options, guidance=options.guidance, aug_level=options.aug_level, enlarging=True
        )
        with _progress(len(drawer.settings) * options.pictures) as advance:
            results = super_resolution.evaluate_super_resolution(
                drawer,
                pictures=options.pictures,
                seed=options.seed,
                folder=folder,
                advance=advance,
            )
        return {**_described(options, drawer), "stages": results}

    if options.out is None:
        return run(None)
    with WholeFolder(options.out) as folder:
        report = run(folder)
        _write(folder, report)
    return report


def sweep(options: SweepOptions) -> dict[str, Any]:
    """Do `cascade eval sweep`: fill options.out, and return what goes to stdout."""
    _check(options, "--prompts", options.prompts, least=2)
    guidance = _numbers("--guidance", options.guidance)
    aug_levels = _numbers("--aug-level", options.aug_level)
    if not all(0 <= level <= 1 for level in aug_levels):
        raise UserError(f"--aug-level {options.aug_level}: levels must be in [0, 1]")
    from cascade.evaluation import sweep as sweeping
    from cascade.storage.paths import WholeFolder

    with WholeFolder(options.out) as folder:
        drawer = _drawer(options, until=options.until)
        alone = len(drawer.cascade.select(until=options.until)) == 1
        rounds = len(guidance) * (1 if alone else 1 + len(aug_levels))
        with _progress(rounds * options.prompts) as advance:
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
        report = {**_described(options, drawer), "prompts": options.prompts, "points": rows}
        _write(folder, report)
    return report


def properties(options: PropertiesOptions) -> dict[str, Any]:
    """Do `cascade eval properties`: fill options.out, if named, and return what goes to stdout."""
    _check(options, "--prompts", options.prompts, least=8, seeds=3)
    from cascade.evaluation import augmentation, scenes, super_resolution
    from cascade.evaluation import properties as measures
    from cascade.storage.paths import WholeFolder

    def run(folder: Path | None) -> dict[str, Any]:
        drawer = _drawer(options)
        scenes.check_sides(drawer, drawer.cascade.stages[0][0].config.resolution)
        super_resolution.super_resolution_stages(drawer.cascade)
        prompts = measures.prompts_of(options.seed, options.prompts)
        quarter = measures.quarter(prompts)
        with _progress(measures.drawings(prompts)) as advance:
            a, b = measures.following(drawer, prompts, advance)
            c = measures.saturation(drawer, prompts, advance)
            e = measures.sensitivity(drawer, quarter, advance)
            f = measures.larger_pictures(drawer, quarter, advance)
        seeds = measures.seeds_of(options.seed, options.prompts)
        d = augmentation.augmentation(seeds, options.prompts)
        found = {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f}
        print(measures.table(found), file=sys.stderr)
        report = {
            **_described(options, drawer),
            "prompts": options.prompts,
            "seeds": seeds,
            "holds": all(one.holds for one in found.values()),
            "properties": {name: one.as_json() for name, one in found.items()},
        }
        if folder is not None:
            measures.plot(folder / "properties.png", found)
            _write(folder, report)
        return report

    if options.out is None:
        return run(None)
    with WholeFolder(options.out) as folder:
        return run(folder)


_COMMANDS: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    "scenes": (ScenesOptions, evaluate_scenes),
    "sr": (SuperResolutionOptions, evaluate_super_resolution),
    "sweep": (SweepOptions, sweep),
    "properties": (PropertiesOptions, properties),
}


def _drawer(
    options: _Options,
    *,
    guidance: str | None = None,
    guidance_plan: str | None = None,
    aug_level: str | None = None,
    until: int | None = None,
    enlarging: bool = False,
) -> Drawer:
    """The model, with the command line's lists laid over the settings of the stages that draw.

    These are the stages up to `until`, or with `enlarging` the super-resolution stages alone.
    """
    from cascade.devices.programs import use_compilation_cache
    from cascade.evaluation.drawer import Drawer
    from cascade.evaluation.super_resolution import super_resolution_stages
    from cascade.runner.cascade import Cascade
    from cascade.runner.overrides import override

    if options.compilation_cache:
        use_compilation_cache()
    cascade = Cascade.load(options.model)
    chosen = cascade.stages if until is None else cascade.select(until=until)
    stages = [stage.config for stage, _ in chosen]
    if enlarging:
        names = [name for name, _, _ in super_resolution_stages(cascade)]
        stages = [stage for stage in stages if stage.name in names]
    every = [stage.config for stage, _ in cascade.stages]
    lists = {
        "steps": options.steps,
        "guidance": guidance,
        "guidance_plan": guidance_plan,
        "aug_level": aug_level,
    }
    settings = override(stages, every, **lists)
    return Drawer(
        cascade=cascade,
        settings={stage.name: s for stage, s in zip(stages, settings, strict=True)},
        null_text_in_sr=isinstance(options, _TextOptions) and options.null_text_in_sr == "true",
    )


def _described(options: _Options, drawer: Drawer) -> dict[str, Any]:
    return {
        "model": options.model,
        "model_sha256": drawer.cascade.digest,
        "seed": options.seed,
        "null_text_in_sr": drawer.null_text_in_sr,
        "settings": {name: config.to_json(s) for name, s in drawer.settings.items()},
    }


def _write(folder: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], Any]]:
    """While entered, a bar on stderr tells pictures done, pictures a second and time left."""
    with bar(total=total, unit="picture", desc="evaluating") as shown:
        yield shown.update


def _check(options: _Options, flag: str, count: int, least: int = 1, seeds: int = 1) -> None:
    """Raise UserError unless there are `least` pictures for each seed, and all seeds are valid."""
    if count < least:
        raise UserError(f"{flag} must be {least} or more, got {count}")
    if not 0 <= options.seed <= 2**32 - seeds * count:
        raise UserError(f"--seed must be in [0, 2^32 - {seeds * count}], got {options.seed}")


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{flag} {text}: must be numbers with commas between, as 1,2,4")
    return values
