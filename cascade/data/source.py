"""What a dataset is: examples at one resolution, and the configuration that opens them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import UInt8

from cascade.errors import UserError


class Example(TypedDict):
    """A picture, levels 0..255, and its caption.

    It may hold more, for conditions that take it of a batch: arrays or numbers under names of their
    own, of one shape in all examples.
    """

    image: UInt8[np.ndarray, "s s 3"]
    """The picture, a square."""
    caption: str
    """What it shows, as the dataset has it."""


class BadRecord(UserError):
    """An example that cannot be had: training leaves it out and goes on."""

    def __init__(self, message: str, key: str = "", reason: str = ""):
        """message: for people, in a line.

        key: names the example in its dataset. reason: a few words, alike for all that is bad in the
        same way.
        """
        super().__init__(message)
        self.key, self.reason = key, reason


class Source:
    """Random access to the examples of a dataset, all at one resolution.

    A source is small, pickles, and holds no open file, so that every data worker can have its own.
    """

    resolution: int
    """Side of the pictures in pixels."""
    left_out: Sequence[BadRecord] = ()
    """What looked like an example when the source was opened, and is none of those counted."""

    def __len__(self) -> int:
        """The number of examples."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Example `index` in 0..len - 1. Raises BadRecord if it cannot be read."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """The caption of example `index`, without its picture where that can be. Raises BadRecord
        if it cannot be read."""
        return self[index]["caption"]

    def window(self, index: int, y: int, x: int, size: int) -> Example:
        """The example with only the part [y : y + size, x : x + size] of its picture, in pixels."""
        example = self[index]
        return {**example, "image": example["image"][y : y + size, x : x + size]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A configuration of captioned examples; each subclass builds its own source."""

    def open(self, resolution: int) -> Source:
        """The examples with pictures of `resolution` x `resolution` pixels.

        Raises UserError where files are missing or make no sense.
        """
        raise NotImplementedError

    @property
    def vocabulary(self) -> Sequence[str]:
        """All words that captions can hold, sorted, where these form a closed list; else empty."""
        return ()


def known_words(configs: Sequence[Data]) -> list[str]:
    """All words of the configs' captions, sorted; empty unless every vocabulary is closed."""
    vocabularies = [config.vocabulary for config in configs]
    return sorted({word for words in vocabularies for word in words}) if all(vocabularies) else []
