"""What a dataset is: examples at one resolution, and the configuration that opens them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import UInt8, UInt32

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
    captions: NotRequired[Sequence[str]]
    """All that say what it shows, where there are several; `caption` is the first."""


class BadRecord(UserError):
    """An example that cannot be had: training leaves it out and goes on."""

    def __init__(self, message: str, key: str = "", reason: str = ""):
        """message: for people, in a line.

        key: names the example in its dataset. reason: a few words, alike for all that is bad in the
        same way.
        """
        super().__init__(message)
        self.key, self.reason = key, reason


FILTERED = "filtered: "
"""How the reason of a record begins that a person's filters take out."""


def hashes_of(keys: Iterable[str]) -> UInt32[np.ndarray, " n"]:
    """A number of 32 bits for each key, spread evenly whatever the keys are."""
    digests = (hashlib.blake2b(k.encode(errors="replace"), digest_size=4).digest() for k in keys)
    return np.frombuffer(b"".join(digests), "<u4").astype(np.uint32)


class Source:
    """Random access to the examples of a dataset, all at one resolution.

    A source is small, pickles, and holds no open file, so that every data worker can have its own.
    """

    resolution: int
    """Side of the pictures in pixels."""
    left_out: Sequence[BadRecord] = ()
    """What looked like an example when the source was opened, and is none of those counted."""
    filtered: Mapping[str, int] = MappingProxyType({})
    """How many examples a person's filters took out when the source was opened, by reason."""
    parts: Sequence[tuple[int, float]] = ()
    """A mixture says here how many examples each of its sources has, one after the other, and in
    what proportion to the others they are drawn; other sources have no parts."""

    def __len__(self) -> int:
        """The number of examples."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Example `index` in 0..len - 1. Raises BadRecord if it cannot be read."""
        raise NotImplementedError

    def hashes(self) -> UInt32[np.ndarray, " n"]:
        """A number of 32 bits for each example, which it keeps when others come or go.

        Where examples have no names of their own, it is made of their place.
        """
        return hashes_of(map(str, range(len(self))))

    def captions_of(self, index: int) -> Sequence[str]:
        """All captions that example `index` may be trained with, without its picture where that can
        be. Raises BadRecord if they cannot be read."""
        example = self[index]
        return example.get("captions") or (example["caption"],)

    def drawn(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index` as it is trained on: what is random of it is drawn from `rng`.

        Nothing is, unless a subclass says so. Raises BadRecord as above.
        """
        return self[index]

    def window(
        self, index: int, y: int, x: int, size: int, rng: np.random.Generator | None = None
    ) -> Example:
        """The example with only the part [y : y + size, x : x + size] of its picture, in pixels.

        rng: if given, the example is as `drawn` has it.
        """
        example = self[index] if rng is None else self.drawn(index, rng)
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
