"""Properties as sets of claims that a quantity is above zero, with their standard errors to spare.

Measurements come in pairs (the same prompt, the same noise, one thing changed), so a claim is about
their differences d, from several seeds with equally many pictures. The mean has two standard
errors. That of all differences taken alike is blind to what pictures of one seed share (a training,
say). That of the seeds' means rests on few, which may agree by luck. The larger one counts,

    se = max( s(d) / sqrt(seeds * pictures), s(means of seeds) / sqrt(seeds) ),

with s the sample standard deviation. The margin is mean(d) / se.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

NEEDED = 2.0  # standard errors, which luck alone gives a claim about once in 44 times

Measured = Float[np.ndarray, "seeds pictures"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """The claim that the mean of `differences` is above zero."""

    text: str
    """The claim in words, for people."""
    differences: Measured
    """Pair by pair, in the unit of what is measured: float [seeds, pictures], 2 or more of each."""

    def __post_init__(self):
        if min(self.differences.shape) < 2:
            raise ValueError(
                "Claim.differences must be of two seeds and two pictures or more, got "
                f"{self.differences.shape}"
            )

    @property
    def mean(self) -> float:
        """The mean of all differences."""
        return float(self.differences.mean())

    @property
    def standard_error(self) -> float:
        """The larger of the two standard errors of the mean."""
        d = np.asarray(self.differences, np.float64)
        seeds = d.mean(axis=1)
        return float(max(d.std(ddof=1) / math.sqrt(d.size), seeds.std(ddof=1) / len(seeds) ** 0.5))

    @property
    def margin(self) -> float:
        """The mean in standard errors; it is infinite where all differences are the same."""
        if self.standard_error > 1e-9 * abs(self.mean):  # what is less is rounding
            return self.mean / self.standard_error
        return math.copysign(math.inf, self.mean) if self.mean else 0.0

    @property
    def holds(self) -> bool:
        """Whether the margin is NEEDED or more."""
        return self.margin >= NEEDED

    def as_json(self) -> dict[str, Any]:
        """The claim as JSON values, of which an infinite margin is None."""
        return {
            "claim": self.text,
            "by_seed": _rounded(self.differences.mean(axis=1)),
            "mean": _rounded([self.mean])[0],
            "standard_error": _rounded([self.standard_error])[0],
            "margin": _finite(self.margin),
            "holds": self.holds,
        }


def above(text: str, larger: Measured, smaller: Measured) -> Claim:
    """The claim that `larger` [seeds, pictures] is above `smaller`, in the mean over pairs."""
    return Claim(text=text, differences=larger - smaller)


def alike(text: str, a: Measured, b: Measured, within: float) -> list[Claim]:
    """The two claims that the means of a and b [seeds, pictures] differ by less than `within`.

    "No difference was found" would be easier to claim with fewer pictures. These get surer with
    more of them (Schuirmann 1987, "two one-sided tests").
    """
    return [
        Claim(text=f"{text}: not above by {within:g}", differences=within - (a - b)),
        Claim(text=f"{text}: not below by {within:g}", differences=within + (a - b)),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Property:
    """A property of a model, which holds if all of its claims do."""

    title: str
    """The property in words."""
    unit: str
    """The unit of the figures, in words."""
    how: str
    """The conditions of the measurement, in words."""
    figures: Mapping[str, Measured]
    """Name -> what was measured, [seeds, pictures]."""
    claims: Sequence[Claim]
    """What is claimed of the figures; one or more."""
    chance: float | None = None
    """The level that the figures are to be compared with, in their unit; None if there is none."""

    @property
    def holds(self) -> bool:
        """Whether all of its claims hold."""
        return all(claim.holds for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        """The property as JSON values.

        Its margin is the least of its claims', in standard errors; None is infinite.
        """
        return {
            "title": self.title,
            "holds": self.holds,
            "margin": _finite(min(claim.margin for claim in self.claims)),
            "chance": None if self.chance is None else _rounded([self.chance])[0],
            "unit": self.unit,
            "figures": {
                name: {
                    "mean": _rounded([values.mean()])[0],
                    "by_seed": _rounded(values.mean(axis=1)),
                }
                for name, values in self.figures.items()
            },
            "claims": [claim.as_json() for claim in self.claims],
            "how": self.how,
        }


def _finite(margin: float) -> float | None:
    """The margin for JSON, which has no infinity."""
    return round(margin, 2) if math.isfinite(margin) else None


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
