"""Several datasets as one, drawn from in given proportions."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from cascade.data.source import Data, Example, Source, known_words
from cascade.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Data):
    """Several datasets, of which each has its share of every stretch of a run.

    Each is shuffled and gone through by itself, so a small one comes round more often. Where one
    example lies in the order is a function of the seed alone.
    """

    sources: tuple[Data, ...]
    """The datasets, at least one."""
    weights: tuple[float, ...] = ()
    """In what proportions they are drawn from, above 0 and one for each; () is by their numbers of
    examples. They are kept to within a hundredth of the least."""

    def __post_init__(self):
        if not self.sources:
            raise ValueError("Mixture.sources must be at least one dataset, got ()")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"Mixture.weights must be one for each of the {len(self.sources)} sources, got "
                f"{self.weights}"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"Mixture.weights must be above 0, got {self.weights}")

    def open(self, resolution: int) -> Source:
        """The examples of one dataset after the other; see `Data.open`."""
        return _Mixed([data.open(resolution) for data in self.sources], self.weights, resolution)

    @property
    def vocabulary(self) -> Sequence[str]:
        """The words of all sources, if each has a closed list."""
        return known_words(self.sources)


class _Mixed(Source):
    def __init__(self, sources: Sequence[Source], weights: Sequence[float], resolution: int):
        self.resolution, self._sources = resolution, list(sources)
        sizes = [len(source) for source in sources]
        if not all(sizes):
            raise UserError(f"sources[{sizes.index(0)}] of the mixture holds no examples")
        self._ends = list(itertools.accumulate(sizes))
        self.left_out = [record for source in sources for record in source.left_out]
        self.filtered = {}
        self.parts = []
        for source, size, weight in zip(sources, sizes, weights or sizes, strict=True):
            for reason, count in source.filtered.items():
                self.filtered[reason] = self.filtered.get(reason, 0) + count
            whole = sum(share for _, share in source.parts)
            inside = [(n, weight * share / whole) for n, share in source.parts]
            self.parts += inside or [(size, weight)]

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)

    def hashes(self):
        return np.concatenate([source.hashes() for source in self._sources])

    def __getitem__(self, index: int) -> Example:
        source, inside = self._at(index)
        return source[inside]

    def captions_of(self, index: int) -> Sequence[str]:
        source, inside = self._at(index)
        return source.captions_of(inside)

    def drawn(self, index: int, rng: np.random.Generator) -> Example:
        source, inside = self._at(index)
        return source.drawn(inside, rng)

    def window(
        self, index: int, y: int, x: int, size: int, rng: np.random.Generator | None = None
    ) -> Example:
        source, inside = self._at(index)
        return source.window(inside, y, x, size, rng)
