"""Pictures whose colours their grey says nothing of: how often does colouring choose which?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade.data.source import Data, Source

COMMON, RARE = (205, 40, 45), (30, 126, 60)
"""A red and a green of one luma, 90."""
SHARE = 0.7
"""The share of the pictures that have the first."""


@dataclass(frozen=True, kw_only=True)
class TintsData(Data):
    """A square on white, 7 of 10 times red and else green, which are one grey."""

    size: int = 1_000_000
    """How many pictures there are, 1 or more."""

    def open(self, resolution):
        return _Tints(self.size, resolution)


class _Tints(Source):
    def __init__(self, size: int, resolution: int):
        self._size, self.resolution = size, resolution

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 1])
        side = self.resolution
        picture = np.full((side, side, 3), 242, np.uint8)
        tall, wide = rng.integers(side // 2, 3 * side // 4 + 1, 2)
        y, x = rng.integers(side - tall + 1), rng.integers(side - wide + 1)
        picture[y : y + tall, x : x + wide] = COMMON if rng.random() < SHARE else RARE
        return {"image": picture, "caption": "a square"}


def is_common(picture: np.ndarray) -> bool:
    """Whether the square of a picture uint8 [s, s, 3] is more like the first colour."""
    levels = picture.reshape(-1, 3).astype(float)
    square = levels[levels.mean(axis=1) < 166]  # half way between the square's mean and white's
    mean = square.mean(axis=0) if len(square) else levels.mean(axis=0)
    return float(abs(mean - COMMON).sum()) < float(abs(mean - RARE).sum())
