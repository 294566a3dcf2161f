"""Lists of the command line, a word a stage, laid over the stages' own settings.

A list such as 16,4,2 goes by stage, smallest first; one word is for all. Its words are those of the
tables beside what they name: `samplers.BY_WORD`, `grids.BY_WORD`, `denoise.PLANS_BY_WORD`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade.diffusion import denoise, grids, samplers
from cascade.errors import UserError
from cascade.published.schedulers import SECTIONS, Respaced
from cascade.stage import Sampling, StageConfig


def override(
    stages: Sequence[StageConfig],
    every: Sequence[StageConfig] | None = None,
    *,
    grid: str | None = None,
    steps: str | None = None,
    guidance: str | None = None,
    guidance_plan: str | None = None,
    rescale: str | None = None,
    aug_level: str | None = None,
    sampler: str | None = None,
    threshold: str | None = None,
) -> list[Sampling]:
    """The settings of the stages that draw, with the given lists laid over them.

    every: all stages of the model, as many as a list may have words too; None is those that draw.
    Raises UserError naming the flag for a list of the wrong length or a value out of range.
    """
    settings = {stage.name: stage.sampling for stage in stages}
    by_name = {stage.name: stage for stage in stages}

    def lay(flag: str, text: str | None, parse: Parse, enlarging: bool = False) -> None:
        """enlarging: the list goes by super-resolution stages."""
        if text is None:
            return
        for name, word in by_stage(flag, text, stages, every or stages, enlarging).items():
            try:
                fields = parse(word, settings[name], by_name[name])
                settings[name] = dataclasses.replace(settings[name], **fields)
                by_name[name].check(settings[name])
            except ValueError as e:
                raise UserError(f"{flag} {word}: {e}") from None

    lay("--grid", grid, lambda w, *_: {"grid": _one_of(grids.BY_WORD, w)})
    lay("--steps", steps, _steps)
    lay("--guidance", guidance, lambda w, *_: {"guidance": number(w)})
    lay("--guidance-plan", guidance_plan, _guidance_plan)
    lay("--rescale", rescale, lambda w, *_: {"guidance_rescale": number(w)})
    lay("--aug-level", aug_level, lambda w, *_: {"aug_level": number(w)}, True)
    lay("--sampler", sampler, _sampler)
    lay("--threshold", threshold, _threshold)
    return list(settings.values())


Parse = Callable[[str, Sampling, StageConfig], dict[str, Any]]
"""(word, settings of the stage so far, its config) -> the fields to replace."""


def by_stage(
    flag: str,
    text: str,
    stages: Sequence[StageConfig],
    every: Sequence[StageConfig],
    enlarging: bool = False,
) -> dict[str, str]:
    """A list's word for each of the stages that draw, or for those of them that enlarge."""

    def names(of: Sequence[StageConfig]) -> list[str]:
        return [s.name for s in of if not enlarging or s.lowres is not None]

    drawn, known = names(stages), names(every)
    words = [word.strip() for word in text.split(",")]
    if not drawn:
        raise UserError(f"{flag} {text}: no super-resolution stage draws; leave it out")
    if "" in words:
        raise UserError(f"{flag} {text!r}: value {words.index('') + 1} is empty")
    if len(words) == 1:
        words *= len(drawn)
    elif len(words) == len(known):
        words = [word for word, name in zip(words, known, strict=True) if name in drawn]
    if len(words) != len(drawn):
        count = "1 stage" if len(drawn) == 1 else f"{len(drawn)} stages"
        raise UserError(
            f"{flag} {text}: {len(words)} values for {count} ({', '.join(drawn)}); give one for "
            "each, or a single one for all"
        )
    return dict(zip(drawn, words, strict=True))


def number(word: str) -> float:
    """A finite number, or ValueError."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, such as 0.5, got {word!r}")
    return value


def _steps(word: str, now: Sampling, _: StageConfig) -> dict[str, Any]:
    if word in SECTIONS:
        name: Any = word
        grid = Respaced(name=name)
        return {"steps": grid.steps, "grid": grid}
    if not word.isdecimal():
        raise ValueError(f"must be a whole number, or one of {', '.join(SECTIONS)}")
    return {"steps": int(word), "grid": now.grid.of_any_length}


def _guidance_plan(word: str, *_: Any) -> dict[str, Any]:
    name, *numbers = word.split(":")
    plan = _one_of(denoise.PLANS_BY_WORD, name)
    if len(numbers) > (2 if name == "interval" else 0):
        raise ValueError("takes no numbers, interval at most two: sigma / alpha from and to")
    bounds = dict(zip(("low", "high"), map(number, numbers), strict=False))
    return {"guidance_plan": dataclasses.replace(plan, **bounds)}


def _sampler(word: str, _: Sampling, stage: StageConfig) -> dict[str, Any]:
    if word == "ancestral" and stage.variance is not None:
        return {"sampler": samplers.Ancestral(gamma="learned")}
    name, *numbers = word.split(":")
    step, field = _one_of(samplers.BY_WORD, name)
    if len(numbers) > (field is not None):
        raise ValueError(f"{name} takes {'one number' if field else 'no number'}")
    return {"sampler": step(**dict(zip((field,), map(number, numbers), strict=False)))}


def _threshold(word: str, now: Sampling, _: StageConfig) -> dict[str, Any]:
    kind, *numbers = word.split(":")
    if len(numbers) > (2 if kind == "dynamic" else 0):
        raise ValueError("takes no numbers, dynamic at most two: percentile and cap")
    fields = dict(zip(("percentile", "cap"), map(number, numbers), strict=False))
    kind = _one_of({k: k for k in ("none", "static", "dynamic")}, kind)
    return {"threshold": dataclasses.replace(now.threshold, kind=kind, **fields)}


def _one_of(values: Mapping[str, Any], word: str) -> Any:
    if word not in values:
        raise ValueError(f"must be one of {', '.join(values)}")
    return values[word]
