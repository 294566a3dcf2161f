"""Pictures of a dataset that are there twice, or nearly so."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MOST_BITS = 3
"""In so many of 64 bits the hashes of near duplicates may differ."""
MOST_COLOUR = 6
"""By so many levels may their mean colours differ, in each channel."""
_MOST_ALIKE = 200
"""So many pictures at most are compared with one another for having a part of a hash in common."""


def perceptual_hash(image: UInt8[np.ndarray, "s s 3"]) -> tuple[int, tuple[float, ...]]:
    """64 bits that a smaller size, a JPEG or a little noise hardly change, and the mean colour.

    A bit says whether a cell of a 9 x 8 grid is lighter than the one to its left.
    """
    grey = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    levels = np.asarray(grey, np.int16)
    bits = (levels[:, 1:] > levels[:, :-1] + 1).ravel()
    number = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return number, tuple(float(mean) for mean in image.mean(axis=(0, 1)))


def near(hashes: Sequence[tuple[int, tuple[float, ...]]]) -> list[list[int]]:
    """Groups of pictures, by their numbers, that are alike or linked by others that are.

    Hashes that differ in MOST_BITS bits have one of MOST_BITS + 1 parts in common, so only pictures
    with a common part are compared. Of very many with one part in common, some pairs are missed.
    """
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for part in range(MOST_BITS + 1):
        alike = collections.defaultdict(list)
        for number, (bits, _) in enumerate(hashes):
            alike[bits >> 16 * part & 0xFFFF].append(number)
        for numbers in alike.values():
            numbers.sort(key=lambda n: hashes[n])  # so that what is alike stands together
            for place, a in enumerate(numbers):
                for b in numbers[place + 1 : place + 1 + _MOST_ALIKE]:
                    if _alike(hashes[a], hashes[b]):
                        parent[root(a)] = root(b)
    return grouped([root(i) for i in range(len(hashes))])


def grouped(names: Sequence[object]) -> list[list[int]]:
    """The numbers of what has the same name, for each name that several have."""
    found = collections.defaultdict(list)
    for number, name in enumerate(names):
        found[name].append(number)
    return [numbers for numbers in found.values() if len(numbers) > 1]


def _alike(a: tuple[int, tuple[float, ...]], b: tuple[int, tuple[float, ...]]) -> bool:
    if (a[0] ^ b[0]).bit_count() > MOST_BITS:
        return False
    return all(abs(x - y) <= MOST_COLOUR for x, y in zip(a[1], b[1], strict=True))
