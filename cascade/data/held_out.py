"""A share of a dataset that is never trained on, chosen by the names of its examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from cascade.data.source import Example, Source
from cascade.errors import UserError

MOST_EXAMPLES = 2**28
"""The largest dataset that is divided; it takes 8 bytes an example."""


def divided(source: Source, share: float) -> tuple[Source, Source]:
    """(what is trained on, what is held out), in the order of the source.

    share: about this part of all examples is held out, in (0, 1). Which ones are is a function of
    each example's name, so that an example stays where it is when others come or go, or when shards
    are cut anew; `cascade data convert` gives new names. Raises UserError where either part would
    be empty, and for a source of more than MOST_EXAMPLES.
    """
    if len(source) > MOST_EXAMPLES:
        raise UserError(
            f"validation={share:g}: a dataset of {len(source)} examples is too large to divide, at "
            f"most {MOST_EXAMPLES} are; leave validation at 0"
        )
    out = source.hashes() < share * 2**32
    if out.all() or not out.any():
        raise UserError(
            f"validation={share:g}: of {len(source)} examples {int(out.sum())} would be held out; "
            "give another share, or more pictures"
        )
    return _Part(source, np.flatnonzero(~out)), _Part(source, np.flatnonzero(out))


class _Part(Source):
    def __init__(self, source: Source, indices: Int[np.ndarray, " n"]):
        self._source, self._indices = source, indices
        self.resolution, self.left_out = source.resolution, source.left_out
        self.filtered = source.filtered
        starts = np.cumsum([0, *(size for size, _ in source.parts)])
        bounds = np.searchsorted(indices, starts)
        weights = [weight for _, weight in source.parts]
        sizes = [int(n) for n in np.diff(bounds)]
        self.parts = [pair for pair in zip(sizes, weights, strict=True) if pair[0]]

    def __len__(self) -> int:
        return len(self._indices)

    def hashes(self):
        return self._source.hashes()[self._indices]

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def captions_of(self, index: int) -> Sequence[str]:
        return self._source.captions_of(int(self._indices[index]))

    def drawn(self, index: int, rng: np.random.Generator) -> Example:
        return self._source.drawn(int(self._indices[index]), rng)

    def window(
        self, index: int, y: int, x: int, size: int, rng: np.random.Generator | None = None
    ) -> Example:
        return self._source.window(int(self._indices[index]), y, x, size, rng)
