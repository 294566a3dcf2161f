"""How published models are sampled: diffusers' schedulers, and the lists of steps to take.

`read_scheduler` turns a `scheduler_config.json` into our schedule, grid, sampler and threshold,
which take the steps that diffusers takes, or warns where they do not; `Respaced` is a list of
DeepFloyd IF's or GLIDE's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cascade.config import read_json
from cascade.diffusion import denoise, grids, process, samplers
from cascade.errors import UserError
from cascade.published.fields import flag, integer, number


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What a scheduler comes to here."""

    schedule: process.Discrete
    """The table of betas that the network was trained on."""
    prediction: process.Prediction
    """What the network's output is: eps, v or x0."""
    sampler: samplers.Ancestral | samplers.DDIM
    """The rule of one step."""
    threshold: denoise.Threshold
    """What is done to estimates of the picture that leave [-1, 1]."""
    grid: grids.OnTable
    """Which entries of the table a number of steps visits."""


def read_scheduler(file: Path) -> Scheduler:
    """Read a DDPMScheduler or a DDIMScheduler, with their defaults for fields that the file lacks.

    Raises UserError naming the file and the field that has no counterpart here. Warns of a file
    with which diffusers samples otherwise.
    """
    found = _read(file)
    for difference in _differences(found):
        warnings.warn(f"{file}: {difference}", stacklevel=2)
    return found


def read_schedule(file: Path) -> process.Discrete:
    """Read the table of a scheduler with which nothing is sampled, as `read_scheduler` does."""
    return _read(file).schedule


def _differences(found: Scheduler) -> list[str]:
    """What diffusers does otherwise with such a scheduler; nothing in most."""
    grid, sampler = found.grid, found.sampler
    differences = []
    if isinstance(sampler, samplers.DDIM) and grid.spacing == "trailing":
        differences.append(
            "with steps that do not divide the table, diffusers' DDIM aims each step of "
            'timestep_spacing="trailing" at an entry beside the one that it takes next; here it '
            f"aims at that one, and pictures differ. A number of steps that divides {grid.entries} "
            "gives the same"
        )
    if sampler.needs_variance and (grid.spacing == "trailing" or grid.offset):
        differences.append(
            'with variance_type="learned_range", diffusers adds noise to the finished picture if '
            "the last step does not start from the table's first entry, as with "
            'timestep_spacing="trailing" or steps_offset; here it adds none'
        )
    return differences


def _read(file: Path) -> Scheduler:
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file}: must hold a scheduler's fields, got {fields!r}")
    name = fields.get("_class_name", "DDPMScheduler")
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise UserError(
            f"{file}: _class_name must be 'DDPMScheduler' or 'DDIMScheduler', got {name!r}"
        )
    given = {**_DEFAULTS, **{k: v for k, v in fields.items() if not k.startswith("_")}}

    def one_of(field: str, known: dict[Any, Any]) -> Any:
        for value, here in known.items():
            if given[field] == value:
                return here
        names = " or ".join(map(repr, known))
        raise UserError(f"{file}: {field} must be {names}, got {given[field]!r}")

    for field in ("trained_betas", "rescale_betas_zero_snr"):
        one_of(field, {_DEFAULTS[field]: None})
    steps, numbers = _numbers(file, given)
    spacing = one_of("timestep_spacing", {"leading": "leading", "trailing": "trailing"})
    if given["thresholding"]:
        threshold: dict[str, Any] = {
            "percentile": numbers["dynamic_thresholding_ratio"],
            "cap": numbers["sample_max_value"],
        }
    elif given["clip_sample"]:
        one_of("clip_sample_range", {1.0: None})
        threshold = {"kind": "static"}
    else:
        threshold = {"kind": "none"}
    if name == "DDIMScheduler":
        sampler = samplers.DDIM(eps="predicted")
    else:
        gamma = one_of("variance_type", {"learned_range": "learned", "fixed_small": 0.0})
        sampler = samplers.Ancestral(gamma=gamma)
    try:
        return Scheduler(
            schedule=process.Discrete(
                betas=one_of(
                    "beta_schedule",
                    {
                        "squaredcos_cap_v2": "cosine",
                        "linear": "linear",
                        "scaled_linear": "scaled linear",
                    },
                ),
                steps=steps,
                first=numbers["beta_start"],
                last=numbers["beta_end"],
            ),
            prediction=one_of(
                "prediction_type", {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
            ),
            sampler=sampler,
            threshold=denoise.Threshold(**threshold),
            grid=grids.OnTable(
                spacing=spacing,
                entries=steps,
                offset=given["steps_offset"] if spacing == "leading" else 0,
                ends_clean=name == "DDPMScheduler" or given["set_alpha_to_one"],
                full_last_step=name == "DDIMScheduler",
            ),
        )
    except UserError:
        raise
    except (TypeError, ValueError) as e:
        raise UserError(f"{file}: {e}") from None


def _numbers(file: Path, given: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The entries of the table, and the other numbers; all flags are flags."""
    ranges = {
        "beta_start": (0, 1),
        "beta_end": (0, 1),
        "dynamic_thresholding_ratio": (0, 1),
        "sample_max_value": (0, 1e6),
    }
    try:
        for field in ("thresholding", "clip_sample", "set_alpha_to_one"):
            flag(given, field)
        if type(given["steps_offset"]) is not int:
            raise ValueError(f"steps_offset must be a whole number, got {given['steps_offset']!r}")
        steps = integer(given, "num_train_timesteps", process.MOST_ENTRIES)
        return steps, {field: number(given, field, *ends) for field, ends in ranges.items()}
    except ValueError as e:
        raise UserError(f"{file}: {e}") from None


# What both have for fields that a scheduler_config.json lacks.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True, kw_only=True)
class Respaced(grids.Grid):
    """A chain of 1000 steps thinned to the named list of its entries, as DeepFloyd IF samples.

    The table is cut into equal sections, the first at the clean end, and each is given its own
    number of entries, spread over the section with both its ends (Nichol & Dhariwal 2021, "Improved
    DDPM", as published with the paper). GLIDE has fast27 (Nichol et al. 2022). The name fixes the
    number of `steps`.
    """

    name: Literal[
        "fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100"
    ]
    """A list of `SECTIONS`."""

    def __post_init__(self):
        if self.name not in SECTIONS:
            raise ValueError(f"Respaced.name: one of {', '.join(SECTIONS)}; got {self.name!r}")

    @property
    def steps(self) -> int:
        return sum(SECTIONS[self.name])

    @property
    def of_any_length(self) -> grids.Grid:
        return grids.OnTable()

    @property
    def entries(self) -> list[int]:
        """The entries kept of a table of 1000, the noisiest first."""
        counts = SECTIONS[self.name]
        sizes = [1000 // len(counts) + (i < 1000 % len(counts)) for i in range(len(counts))]
        chosen, start = [], 0
        for size, count in zip(sizes, counts, strict=True):
            stride = (size - 1) / (count - 1) if count > 1 else 1.0
            at = 0.0
            for _ in range(count):  # summed, not multiplied: some entries hang on the last bit
                chosen.append(start + round(at))
                at += stride
            start += size
        return chosen[::-1]

    def check(self, steps):
        if steps != self.steps:
            raise ValueError(f"steps must be {self.steps} on the grid {self.name}, got {steps}")

    def __call__(self, steps, schedule):
        self.check(steps)
        return grids.at_entries(np.array(self.entries), 1000)


SECTIONS = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super40": (2, 2, 2, 2, 2, 2, 3, 4, 6, 15),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
"""How many entries each section of a `Respaced` table keeps, from the clean end on."""
