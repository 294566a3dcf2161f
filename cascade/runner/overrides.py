"""Options that go by stage, laid over the stages' own settings: of the command line and of Python.

A list goes by stage, smallest first: 16,4,2 in words, [16, 4, 2] in Python; one value is for all.
Words are those of the tables beside what they name: `samplers.BY_WORD`, `grids.BY_WORD`,
`denoise.PLANS_BY_WORD`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade import ranges
from cascade.diffusion import denoise, grids, samplers
from cascade.errors import OptionError
from cascade.published.schedulers import SECTIONS, Respaced
from cascade.stage import Sampling, StageConfig

ByStage = str | int | float | Sequence[str | int | float | Sequence[int]]
"""A value for all stages, or a list with one for each: numbers and words, or a text of them with
commas between. A value that is a list itself, of table entries, is 999/500/0 in words."""


def override(
    stages: Sequence[StageConfig],
    every: Sequence[StageConfig] | None = None,
    *,
    grid: ByStage | None = None,
    steps: ByStage | None = None,
    guidance: ByStage | None = None,
    guidance_plan: ByStage | None = None,
    rescale: ByStage | None = None,
    aug_level: ByStage | None = None,
    sampler: ByStage | None = None,
    threshold: ByStage | None = None,
) -> list[Sampling]:
    """The settings of the stages that draw, with the given lists laid over them.

    every: all stages of the model, as many as a list may have values too; None is those that draw.
    Raises OptionError for a list of the wrong length or a value out of range.
    """
    settings = {stage.name: stage.sampling for stage in stages}
    by_name = {stage.name: stage for stage in stages}

    def lay(option: str, given: ByStage | None, parse: Parse, enlarging: bool = False) -> None:
        """enlarging: the list goes by super-resolution stages."""
        if given is None:
            return
        for name, value in by_stage(option, given, stages, every or stages, enlarging).items():
            try:
                fields = parse(str(value), settings[name], by_name[name])
                settings[name] = dataclasses.replace(settings[name], **fields)
                by_name[name].check(settings[name])
            except ValueError as e:
                raise OptionError(option, value, _without_class(str(e))) from None

    lay("grid", grid, lambda w, *_: {"grid": _one_of(grids.BY_WORD, w)})
    _warn_of_timesteps(steps)
    lay("steps", steps, _steps)
    lay("guidance", guidance, lambda w, *_: {"guidance": number(w)})
    lay("guidance_plan", guidance_plan, _guidance_plan)
    lay("rescale", rescale, lambda w, *_: {"guidance_rescale": number(w)})
    lay("aug_level", aug_level, lambda w, *_: {"aug_level": number(w)}, True)
    lay("sampler", sampler, _sampler)
    lay("threshold", threshold, _threshold)
    return list(settings.values())


Parse = Callable[[str, Sampling, StageConfig], dict[str, Any]]
"""(word, settings of the stage so far, its config) -> the fields to replace."""


def by_stage(
    option: str,
    given: ByStage,
    stages: Sequence[StageConfig],
    every: Sequence[StageConfig],
    enlarging: bool = False,
) -> dict[str, str | int | float]:
    """A list's value for each of the stages that draw, or for those of them that enlarge."""

    def names(of: Sequence[StageConfig]) -> list[str]:
        return [s.name for s in of if not enlarging or s.lowres is not None]

    drawn, known = names(stages), names(every)
    if isinstance(given, str):
        values: list[Any] = [word.strip() for word in given.split(",")]
    else:
        values = [given] if isinstance(given, (int, float, numbers.Number)) else list(given)
        values = ["/".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in values]
    if not drawn:
        raise OptionError(option, given, "no super-resolution stage draws; leave it out")
    if "" in map(str, values):
        raise OptionError(option, given, f"value {values.index('') + 1} is empty")
    if len(values) == 1:
        values *= len(drawn)
    elif len(values) == len(known):
        values = [value for value, name in zip(values, known, strict=True) if name in drawn]
    if len(values) != len(drawn):
        count = "1 stage" if len(drawn) == 1 else f"{len(drawn)} stages"
        raise OptionError(
            option,
            given,
            f"{len(values)} value{'s' * (len(values) != 1)} for {count} ({', '.join(drawn)}); give "
            "one for each, or a single one for all",
        )
    return dict(zip(drawn, values, strict=True))


def _warn_of_timesteps(steps: ByStage | None) -> None:
    """So many steps of the second stage are rare; entries of a table are such numbers."""
    given: list[Any] = list(steps) if isinstance(steps, (list, tuple)) else []
    if all(ranges.is_whole(n) for n in given) and len(given) > 1 and given[0] > given[1] > 250:
        warnings.warn(
            f"steps={given}: so many steps are taken by each stage; a list of timesteps is a list "
            f"in that of stages, [{given}]",
            stacklevel=4,
        )


def number(word: str) -> float:
    """A finite number, or ValueError."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"must be a number, such as 0.5, got {word!r}")
    return value


def _without_class(message: str) -> str:
    """An error of a config's class, for a person who has met options alone: it begins with neither
    `Sampling.steps` nor the class of `DDIM.eta`."""
    return re.sub(r"^(Sampling\.\w+ |[A-Z]\w*\.)", "", message)


def _steps(word: str, now: Sampling, _: StageConfig) -> dict[str, Any]:
    if word in SECTIONS:
        name: Any = word
        grid = Respaced(name=name)
        return {"steps": grid.steps, "grid": grid}
    if "/" in word:
        entries = word.split("/")
        if not all(entry.isdecimal() for entry in entries):
            raise ValueError("a list of table entries is whole numbers, such as 999/750/500/250/0")
        try:
            chosen = grids.Chosen(chosen=tuple(map(int, entries)))
        except ValueError:
            raise ValueError("the entries must fall, within 999 to 0") from None
        return {"steps": len(entries), "grid": chosen}
    if not word.isdecimal():
        raise ValueError(
            f"must be a whole number, entries of a table such as 999/500/0, or one of "
            f"{', '.join(SECTIONS)}"
        )
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
    fields = dict(zip((field,), map(number, numbers), strict=False))
    return {"sampler": dataclasses.replace(step, **fields)}


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
