"""Properties as sets of claims that a quantity is above zero, with their standard errors to spare.

Measurements come in pairs (the same prompt, the same noise, one thing changed), so a claim is about
their differences d, from several seeds with as many pictures each. Two standard errors of the mean
are to be had: that of all differences taken alike, which is blind to what pictures of one seed
share (a training, say), and that of the seeds' means, which are few, and may agree by luck,

    se = max( s(d) / sqrt(seeds * pictures), s(means of seeds) / sqrt(seeds) ),

with s the sample standard deviation. The larger one counts. The margin is mean(d) / se.
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

    def __post_init__(self):
        if min(self.differences.shape) < 2:
            raise ValueError(
                "Claim.differences must be of two seeds and two pictures or more, got "
                f"{self.differences.shape}"
            )

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def standard_error(self) -> float:
        d = np.asarray(self.differences, np.float64)
        seeds = d.mean(axis=1)
        return float(max(d.std(ddof=1) / math.sqrt(d.size), seeds.std(ddof=1) / len(seeds) ** 0.5))

    @property
    def margin(self) -> float:
        """In standard errors; of infinite size where all differences are the same."""
        if self.standard_error > 1e-9 * abs(self.mean):  # what is less is rounding
            return self.mean / self.standard_error
        return math.copysign(math.inf, self.mean) if self.mean else 0.0

    @property
    def holds(self) -> bool:
        return self.margin >= NEEDED

    def as_json(self) -> dict[str, Any]:
        """margin None: infinite."""
        return {
            "claim": self.text,
            "by_seed": _rounded(self.differences.mean(axis=1)),
            "mean": _rounded([self.mean])[0],
            "standard_error": _rounded([self.standard_error])[0],
            "margin": _finite(self.margin),
            "holds": self.holds,
        }


def above(text: str, larger: Measured, smaller: Measured) -> Claim:
    """The claim that `larger` is above `smaller`, in the mean over pairs."""
    return Claim(text=text, differences=larger - smaller)


def alike(text: str, a: Measured, b: Measured, within: float) -> list[Claim]:
    """The claims that the means differ by less than `within`, neither being above by so much.

    "No difference was found" would be the easier claim the fewer the pictures; this one gets surer
    with more of them (Schuirmann 1987, "two one-sided tests").
    """
    return [
        Claim(text=f"{text}: not above by {within:g}", differences=within - (a - b)),
        Claim(text=f"{text}: not below by {within:g}", differences=within + (a - b)),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Property:
    """What holds if all of its claims do.

    figures: what was measured, by name. chance: the level that they are to be compared with, where
    there is one. how: the conditions, in words.
    """

    title: str
    unit: str
    how: str
    figures: Mapping[str, Measured]
    claims: Sequence[Claim]
    chance: float | None = None

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        """margin: of the claim that has the least, in standard errors; None: infinite."""
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
    """For JSON, which has no infinity."""
    return round(margin, 2) if math.isfinite(margin) else None


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
