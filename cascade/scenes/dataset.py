"""Scenes as training data: rendered on the fly, at any resolution, by a pure function."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cascade.data.source import Data, Example, Source
from cascade.scenes.captions import VOCABULARY, Caption, caption_at
from cascade.scenes.render import render
from cascade.scenes.spec import Object, Scene, Split, check_counts, generator

_MOST = 2**31  # Grain shuffles 32-bit indices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesData(Data):
    """Scenes rendered on the fly; nothing is on disk.

    `seed` and `split` name an endless list of scenes, of which the first `size` are the dataset.
    """

    split: Split = "train"
    """The kind of scenes: "train" and "seen" have no held-out combination of shape and colour;
    "unseen" has one in every scene; "long" has none, and always three or four objects."""
    seed: int = 0
    """Which endless list of scenes, 0 or more."""
    size: int = 1_000_000_000
    """Number of scenes, in 1..2**31."""
    min_objects: int = 1
    """Scenes of fewer objects are left out, for a curriculum; in 1..max_objects."""
    max_objects: int = 4
    """Scenes of more objects are left out; in 1..4, or 3..4 of split "long"."""
    closeup: int = 1
    """1 shows the whole scene. 2 shows a random square of half the scene's side that holds all its
    objects, and leaves out scenes where none does, as in all of split "long": such closeups need
    half the resolution for the same shapes, and so train as much on them for less."""

    def __post_init__(self):
        check_counts(self.split, self.min_objects, self.max_objects, prefix="ScenesData.")
        if self.seed < 0:
            raise ValueError(f"ScenesData.seed must not be negative, got {self.seed}")
        if not 1 <= self.size <= _MOST:
            raise ValueError(f"ScenesData.size must lie in 1..{_MOST}, got {self.size}")
        if self.closeup not in (1, 2) or self.closeup > 1 and self.split == "long":
            raise ValueError(
                "ScenesData.closeup must be 1 (none) or, but for split 'long', 2, "
                f"got {self.closeup} for {self.split!r}"
            )

    def scene(self, index: int) -> tuple[Scene, Caption]:
        """Scene number `index`, and its caption."""
        # A window of whole pixels holds what is narrower than it by two at 64 pixels.
        within = 1.0 if self.closeup == 1 else 1 / self.closeup - 1 / 32
        return caption_at(
            self.seed,
            index,
            self.split,
            min_objects=self.min_objects,
            max_objects=self.max_objects,
            within=within,
        )

    def corner(self, index: int, scene: Scene, resolution: int) -> tuple[int, int]:
        """The first pixel (y, x) of what the example shows of its scene, in a picture of the whole.

        The example has `resolution` pixels squared, the whole scene `closeup` times as many.
        """
        if self.closeup == 1:
            return 0, 0
        rng = generator(self.seed, index, self.split, purpose=2)
        return _around(scene.objects, resolution * self.closeup, resolution, rng)

    def open(self, resolution: int) -> Source:
        """The scenes, or their closeups, rendered at `resolution` pixels squared."""
        return _ScenesSource(self, resolution)

    @property
    def vocabulary(self) -> Sequence[str]:
        """All words of the captions' grammar, sorted."""
        return sorted(VOCABULARY)


class _ScenesSource(Source):
    def __init__(self, config: ScenesData, resolution: int):
        self.config, self.resolution = config, resolution

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Example:
        return self.window(index, 0, 0, self.resolution)

    def captions_of(self, index: int) -> tuple[str]:
        return (self.config.scene(index)[1].text,)

    def window(
        self, index: int, y: int, x: int, size: int, rng: np.random.Generator | None = None
    ) -> Example:
        """The window of the example, as `Source.window` has it, rendered alone."""
        config = self.config
        scene, caption = config.scene(index)
        top, left = config.corner(index, scene, self.resolution)
        picture = render(scene, self.resolution * config.closeup, (top + y, left + x, size))
        return {"image": picture, "caption": caption.text}


def _around(
    objects: Sequence[Object], side: int, size: int, rng: np.random.Generator
) -> tuple[int, int]:
    """The corner (y, x) of a random window that holds all objects, in a picture of `side` pixels.

    size: side of the window in pixels.
    """
    corner = []
    for axis in ("y", "x"):
        start = min(getattr(item, axis) - item.radius for item in objects)
        end = max(getattr(item, axis) + item.radius for item in objects)
        low = max(0, math.ceil(end * side) - size)
        high = min(side - size, math.floor(start * side))
        corner.append(low + int(rng.random() * (high - low + 1)))
    return corner[0], corner[1]
