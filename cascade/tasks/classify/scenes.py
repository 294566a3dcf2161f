"""Scenes whose captions leave out nothing that a classifier is asked of."""

from __future__ import annotations

import dataclasses
from typing import Any

from cascade.data.source import Example, Source
from cascade.scenes import spec
from cascade.scenes.dataset import ScenesData
from cascade.scenes.spec import Scene

ATTRIBUTES: tuple[str, ...] = (
    *(f"{background} background" for background in spec.BACKGROUNDS),
    *spec.COLOURS,
    *spec.SHAPES,
    *(f"{colour} {shape}" for colour in spec.COLOURS for shape in spec.SHAPES),
)
"""What can be asked of scenes: the background, and colours, shapes and pairs of them that occur."""


def listed(scene: Scene) -> str:
    """All that a scene shows, as a caption: "red circle, blue star, navy background"."""
    things = [f"{item.colour} {item.shape}" for item in scene.objects]
    return ", ".join([*things, f"{scene.background} background"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedScenes(ScenesData):
    """Scenes that are captioned by lists of all that they show."""

    def open(self, resolution: int) -> Source:
        return _Listed(self, super().open(resolution))


class _Listed(Source):
    def __init__(self, config: ListedScenes, scenes: Source):
        self._config, self._scenes = config, scenes
        self.resolution = scenes.resolution

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Example:
        return self.window(index, 0, 0, self.resolution)

    def window(self, index: int, y: int, x: int, size: int, rng: Any = None) -> Example:
        example = self._scenes.window(index, y, x, size, rng)
        return {**example, "caption": listed(self._config.scene(index)[0])}
