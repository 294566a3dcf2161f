"""The best of several: more pictures are drawn than are kept, and a judge says which.

Ramesh et al. 2021 ("DALL-E", sec. 2.6) keep the best of 512 by CLIP. Here the first stage draws
`count` candidates of each picture, and only the best goes on to super-resolution. Candidate j of
the picture with seed s has the seed count * s + j, and is what that seed draws by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt32

from cascade.errors import OptionError, UserError

MOST = 1024
"""At most so many candidates are drawn of a picture."""

Judge = Callable[[UInt8[np.ndarray, "n _ _ 3"], Sequence[str]], Float[np.ndarray, " n"]]
"""Pictures of the first stage, and the prompt of each -> how well it shows it; more is better."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf:
    """How many candidates are drawn of each picture, and who chooses."""

    count: int
    """The number of candidates, 2 to MOST."""
    judge: Judge
    """Who says how well a candidate shows its prompt."""

    def seeds(self, seeds: UInt32[np.ndarray, " b"]) -> UInt32[np.ndarray, "n b"]:
        """The seeds of all candidates of pictures with these seeds."""
        return seeds * np.uint32(self.count) + np.arange(self.count, dtype=np.uint32)[:, None]

    def scores(
        self, candidates: UInt8[np.ndarray, "n b h w 3"], prompts: Sequence[str]
    ) -> Float[np.ndarray, "n b"]:
        """How well each candidate shows the prompt of its picture.

        Raises UserError for a judge that gives anything but a number for each.
        """
        n, b = candidates.shape[:2]
        found = np.asarray(self.judge(np.concatenate(candidates), [*prompts] * n), np.float64)
        if found.shape != (n * b,) or not np.isfinite(found).all():
            finite = int(np.isfinite(found).sum())
            raise UserError(
                f"judge: must give a finite number for each of {n * b} pictures, got an array of "
                f"{list(found.shape)} with {finite} finite ones"
            )
        return found.reshape(n, b)


def best_of(count: Any, judge: Any, seed: int, num: int) -> BestOf | None:
    """What the options of these names ask for; None for one candidate.

    seed: the largest of the first pictures' seeds. Raises OptionError for counts and seeds that are
    out of range, UserError unless there is a judge where one is needed.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise OptionError("best_of", count, f"must be a whole number, 1 to {MOST}")
    if count == 1:
        return None
    if judge is None:
        raise UserError(f"best_of {count}: needs a judge, who says which candidate is the best")
    if count * (seed + num) > 2**32:
        raise OptionError(
            "best_of",
            count,
            f"picture {seed + num - 1} would have candidates with seeds up to "
            f"{count * (seed + num) - 1}, and seeds are below 2^32; give a smaller seed",
        )
    return BestOf(count=count, judge=judge)
