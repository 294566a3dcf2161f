"""The job of a text encoder that learns the captions of any dataset.

For whoever has captions in words that no encoder at hand knows, and none of the hub's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from cascade.data import Data
from cascade.data.pipeline import order
from cascade.data.source import BadRecord, Source
from cascade.data.transforms import MOST_BAD_IN_A_ROW
from cascade.errors import UserError
from cascade.text.vocabulary import with_words
from cascade.training.text_job import TextJob, Texts

_RESOLUTION = 64
"""Data is opened at some resolution; no picture is looked at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTraining(TextJob):
    """Make a text encoder of the captions of a dataset. It ends in WORKDIR/text_encoder."""

    data: Data
    """The captions, and pictures, which are not looked at."""

    @property
    def fixed(self) -> dict[str, Any]:
        return {name: value for name, value in super().fixed.items() if name != "data"}

    def texts(self):
        return _DataTexts(self, self.data.open(_RESOLUTION))


class _DataTexts(Texts):
    others = "its captions, hidden elsewhere"

    def __init__(self, job: TextTraining, source: Source):
        super().__init__(job)
        self._source = source
        self._bad = [(record.key, record.reason) for record in source.left_out]

    @functools.cached_property
    def _order(self) -> Any:
        if not len(self._source):
            raise UserError("the dataset holds no captions; name one that has some")
        return order(self._source, self.job.seed)

    def vocabulary(self) -> Iterator[str]:
        count = min(len(self._source), self.job.vocabulary_captions)
        return with_words(text for i in range(count) for text in self._captions_of(i))

    def captions(self, index, rng, most, other):
        found = ()
        for _ in range(MOST_BAD_IN_A_ROW):
            if found := self._captions_of(index):
                break
            index = int(rng.integers(2**31))  # for the next one would be seen more often
        if not found:
            raise UserError(f"{MOST_BAD_IN_A_ROW} examples in a row have no caption; give others")
        chosen = rng.permutation(len(found))[:most]
        return [found[i] for i in chosen]

    def skipped(self):
        bad, self._bad = self._bad, []
        return bad

    def _captions_of(self, position: int) -> Sequence[str]:
        """The different captions at a place of the shuffled data; none where it is damaged."""
        try:
            return tuple(dict.fromkeys(self._source.captions_of(int(self._order[position]))))
        except BadRecord as e:
            self._bad.append((e.key, e.reason))
            return ()
