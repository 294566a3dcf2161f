"""How a store of embeddings comes to be: texts of a shard, encoded in groups of one length.

    texts -> gathered: those of each shard, once each, by their hashes
          -> encoded: the longest last, padded to a multiple of 8 tokens, so many at a time
          -> rounded -> one file, in the order of the hashes

A shard depends on its texts and on nothing that happened before, so whoever goes on after an
interruption, and any number of processes, writes the same shards.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cascade.config import to_json
from cascade.errors import UserError
from cascade.storage import checksums, paths
from cascade.storage.paths import Path
from cascade.text import store
from cascade.text.embedding import TextEncoder
from cascade.text.store import Making, StoreConfig
from cascade.text.tokenizer import Tokens

SHARD_TEXTS = 2**14
"""The most texts of a shard, on average: in int8 and 4096 channels a shard of captions takes 1 GB.
"""
STEP = 8
"""Texts are padded to a multiple of so many tokens to be encoded."""


class Gathered:
    """Texts, once each, by the shards that shall hold them, of which only some are kept."""

    def __init__(self, shards: int, own: Iterable[int]):
        """own: the numbers of the shards whose texts are kept."""
        self.shards, self.seen, self._sum = shards, 0, 0
        self.texts: dict[int, dict[bytes, str]] = {number: {} for number in own}

    def add(self, text: str) -> None:
        """Note a text. Raises UserError for one that is not Unicode."""
        key = store.hash_of(text)
        self._sum += int.from_bytes(key, "big")
        self.seen += 1
        if (kept := self.texts.get(store.shard_of(key, self.shards))) is not None:
            kept[key] = text

    @property
    def digest(self) -> str:
        """What stands for all texts that were noted, kept or not, in any order."""
        return f"{self._sum % 2**128:032x}"


def encoded(
    encoder: TextEncoder,
    tokens: Tokens,
    rows: int,
    place: Callable[[np.ndarray], Any] = np.asarray,
) -> Iterator[tuple[int, Float[np.ndarray, "t d"]]]:
    """Embed texts, the shortest first: yields (the text's row, its embedding without padding).

    rows: texts that are encoded together. place: puts ids and masks [rows, l] on the devices.
    """
    lengths = np.asarray(tokens.mask).sum(1)
    padded = np.minimum(-(-lengths // STEP) * STEP, tokens.mask.shape[1])
    for length in np.unique(padded):
        group = np.flatnonzero(padded == length)
        for first in range(0, len(group), rows):
            some = group[first : first + rows]
            # The last rows are there once more where there are too few, for one program a length.
            full = np.resize(some, rows)
            ids, mask = (np.asarray(x)[full, :length] for x in (tokens.ids, tokens.mask))
            values = encoder.embed(Tokens(ids=place(ids), mask=place(mask))).values
            for row, value in zip(some, np.asarray(values, np.float32), strict=False):
                yield int(row), value[: lengths[row]]


class Fact(NamedTuple):
    """What is known of a shard that is there."""

    texts: int
    tokens: int
    longest: int
    """Tokens of the longest text."""
    cosine: float
    """The lowest of a token to the encoder's float32."""
    digest: bytes
    """SHA-256 of the file."""


def make_shard(
    folder: Path,
    number: int,
    making: Making,
    texts: Mapping[bytes, str],
    encode: Callable[[Sequence[str]], Iterator[tuple[int, np.ndarray]]],
) -> Fact:
    """Write a shard into the folder of its store, whole or not at all.

    texts: those of the shard by their hashes. encode: texts -> what `encoded` yields of them.
    Raises UserError where the encoder says what is no finite number.
    """
    hashes = sorted(texts)
    found: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    cosine = 1.0
    if hashes:
        for row, value in encode([texts[key] for key in hashes]):
            if not np.isfinite(value).all():
                raise UserError(
                    f"text encoder {making.text_encoder}: embeds {texts[hashes[row]]!r:.200} as "
                    "values that are not finite; use another, or not int8"
                )
            found[row] = store.rounded(value, making.dtype)
            cosine = min(cosine, store.lowest_cosine(value, *found[row]))
    none = store.rounded(np.zeros((0, making.width), np.float32), making.dtype)
    parts = [none, *(found.pop(row) for row in range(len(hashes)))]
    lengths = [len(values) for values, _ in parts[1:]]
    scales = None if none[1] is None else np.concatenate([s for _, s in parts if s is not None])
    values = np.concatenate([v for v, _ in parts])
    with paths.writing(folder / store.shard_name(number)) as file:
        store.write_shard(file, hashes, values, scales, lengths, cosine)
        return _fact(file, number, making)


def fact_of(folder: Path, number: int, making: Making) -> Fact:
    """Look at a shard that is there. Raises UserError for one that is damaged."""
    with paths.reading(folder / store.shard_name(number)) as file:
        return _fact(file, number, making)


def config_of(making: Making, facts: Sequence[Fact], source: str) -> StoreConfig:
    """What the config.json of a store says. facts: of all shards. source: as the field of it."""
    return StoreConfig(
        **{field.name: getattr(making, field.name) for field in dataclasses.fields(Making)},
        source=source,
        texts=sum(fact.texts for fact in facts),
        tokens=sum(fact.tokens for fact in facts),
        longest=max(fact.longest for fact in facts),
        lowest_cosine=min(fact.cosine for fact in facts),
    )


def finish(folder: Path, config: StoreConfig, facts: Sequence[Fact]) -> None:
    """Write what makes a store of its shards: their checksums, and config.json last."""
    names = store.shard_names(config)
    sums = {name: fact.digest.hex() for name, fact in zip(names, facts, strict=True)}
    checksums.write_known(folder, sums)
    paths.write_json(folder / "config.json", to_json(config))


def clear_partial(folder: Path, names: Iterable[str]) -> None:
    """Remove what a process that was killed has left of files of these names, in a folder here."""
    if isinstance(folder, pathlib.Path):
        for file in folder.iterdir():
            if any(store.is_partial(file.name, name) for name in names):
                file.unlink()


def _fact(file: pathlib.Path, number: int, making: Making) -> Fact:
    shard = store.Shard(file, number, making)
    return Fact(
        texts=len(shard.hashes),
        tokens=len(shard.values),
        longest=shard.longest,
        cosine=shard.lowest_cosine,
        digest=bytes.fromhex(checksums.digest(file)),
    )
