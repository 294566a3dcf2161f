"""What the commands of `cascade eval` share: options, the model that draws, the report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cascade import config
from cascade.commands.sample import ByStage
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.storage import paths

if TYPE_CHECKING:
    from cascade.evaluation.drawer import Drawer

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    seed: int = 0
    """Chooses the prompts, none of which are training's; picture i is drawn with seed + i."""
    steps: ByStage = None
    """Sampling steps, by stage that draws: 16,4,2, smallest first, or one value for all."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next run starts faster."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    null_text_in_sr: Literal["true", "false"] = "false"
    """Whether super-resolution stages draw without the prompt."""


def drawer_of(
    options: Options,
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
        null_text_in_sr=isinstance(options, TextOptions) and options.null_text_in_sr == "true",
    )


@contextmanager
def processes(compilation_cache: bool) -> Iterator[None]:
    """While entered, this process is one of all that run the command (see `distributed`)."""
    from cascade.devices import distributed, xla_flags
    from cascade.devices.programs import use_compilation_cache

    xla_flags.apply(xla_flags.expected_backend(), os.environ)
    with distributed.processes():
        if compilation_cache:
            use_compilation_cache()
        yield


def is_first() -> bool:
    """Whether this process is the first of those that run the command, which tells of it."""
    import jax

    return jax.process_index() == 0


def described(options: Options, drawer: Drawer) -> dict[str, Any]:
    return {
        "model": options.model,
        "model_sha256": drawer.cascade.digest,
        "seed": options.seed,
        "null_text_in_sr": drawer.null_text_in_sr,
        "settings": {name: config.to_json(s) for name, s in drawer.settings.items()},
    }


def write(folder: paths.Path, report: dict[str, Any]) -> None:
    paths.write_json(folder / "results.json", report)


@contextmanager
def progress(total: int) -> Iterator[Callable[..., Any]]:
    """While entered, a bar on stderr tells pictures done, pictures a second and time left.

    Of several processes the first has a bar, which is about its own share.
    """
    own = {"disable": not is_first(), "unit": "picture", "desc": "evaluating"}
    with bar(total=total, **own) as shown:
        yield shown.update


@contextmanager
def drawing(total: int, done: int) -> Iterator[Callable[[], Any]]:
    """As `progress`, of drawing, where `done` of `total` pictures are there already."""
    own = {"disable": not is_first(), "unit": "picture", "desc": "drawing"}
    with bar(total=total, initial=done, **own) as shown:
        yield shown.update


def check(options: Options, flag: str, count: int, least: int = 1, seeds: int = 1) -> None:
    """Raise UserError unless there are `least` pictures for each seed, and all seeds are valid."""
    if count < least:
        raise UserError(f"{flag} must be {least} or more, got {count}")
    if not 0 <= options.seed <= 2**32 - seeds * count:
        raise UserError(f"--seed must be in [0, 2^32 - {seeds * count}], got {options.seed}")


def numbers_of(flag: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{flag} {text}: must be numbers with commas between, as 1,2,4")
    return values
