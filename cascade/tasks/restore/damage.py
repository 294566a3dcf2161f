"""What is done to pictures that a stage learns to undo (Saharia et al. 2022, "Palette", sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from cascade.data.degradation import jpeg
from cascade.data.source import Data, Example, Source

Picture = UInt8[np.ndarray, "h w 3"]


class Damaged(NamedTuple):
    """source uint8 [h, w, 3]: what is left of the picture. hole bool [h, w]: what is drawn. Where
    only a part of the picture is drawn, the source is the picture itself outside the hole."""

    source: Picture
    hole: Bool[np.ndarray, "h w"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Subclasses are the tasks; called with a picture and a generator they return a Damaged."""

    name: ClassVar[str]
    """What the command line calls it."""

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Damaged:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Grey(Damage):
    """The picture without its colours (its luma, as ITU-R BT.601 weighs it), to be coloured."""

    name: ClassVar[str] = "colouring"

    def __call__(self, picture, rng):
        return _whole(grey(picture))


@dataclass(frozen=True, kw_only=True)
class Jpeg(Damage):
    """The picture after JPEG. A quality q has a probability in proportion to exp(-q / scale)."""

    name: ClassVar[str] = "jpeg"

    quality: tuple[int, int] = (5, 30)
    """The least and the largest quality, as libjpeg counts it, in 1..95."""
    scale: float = 10.0
    """How slowly better qualities get rarer, above 0."""

    def __post_init__(self):
        if not 1 <= self.quality[0] <= self.quality[1] <= 95:
            raise ValueError(
                f"Jpeg.quality must be two of 1..95 in rising order, got {self.quality}"
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Jpeg.scale must be above 0, got {self.scale}")

    def __call__(self, picture, rng):
        qualities = np.arange(self.quality[0], self.quality[1] + 1)
        weights = np.exp(-(qualities - qualities[0]) / self.scale)
        quality = rng.choice(qualities, p=weights / weights.sum())
        return _whole(jpeg(picture.astype(np.float32), int(quality)).astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class Holes(Damage):
    """Holes to be filled: strokes of a brush, or a few boxes."""

    name: ClassVar[str] = "inpainting"

    strokes: float = 0.6
    """The share of the pictures whose holes are strokes; the others have one to five boxes."""
    covered: tuple[float, float] = (0.1, 0.4)
    """The least and the largest share of the picture that boxes cover."""

    def __post_init__(self):
        if not 0 <= self.strokes <= 1:
            raise ValueError(f"Holes.strokes must be in [0, 1], got {self.strokes}")
        if not 0 < self.covered[0] <= self.covered[1] < 1:
            raise ValueError(
                "Holes.covered must be two shares between 0 and 1 in rising order, got "
                f"{self.covered}"
            )

    def __call__(self, picture, rng):
        h, w = picture.shape[:2]
        if rng.random() < self.strokes:
            return Damaged(picture, brushed(h, w, rng))
        return Damaged(picture, boxes(h, w, rng, self.covered))


@dataclass(frozen=True, kw_only=True)
class Sides(Damage):
    """Half of the picture or so is missing, on one side or on all four, which are as frequent."""

    name: ClassVar[str] = "uncropping"

    kept: float = 0.5
    """The share of the picture's area that is left, between 0 and 1."""

    def __post_init__(self):
        if not 0 < self.kept < 1:
            raise ValueError(f"Sides.kept must be between 0 and 1, got {self.kept}")

    def __call__(self, picture, rng):
        h, w = picture.shape[:2]
        hole = np.ones((h, w), bool)
        if rng.random() < 0.5:
            side = math.sqrt(self.kept)
            tall, wide = max(1, round(h * side)), max(1, round(w * side))
            top, left = (h - tall) // 2, (w - wide) // 2
            hole[top : top + tall, left : left + wide] = False
        else:
            turns = int(rng.integers(4))
            turned = np.rot90(hole, turns)  # a view: what is written is written in `hole`
            turned[: max(1, round(len(turned) * self.kept))] = False
        return Damaged(picture, hole)


EVERY: tuple[Damage, ...] = (Grey(), Jpeg(), Holes(), Sides())
"""Palette's four tasks."""


def grey(picture: Picture) -> Picture:
    """The picture's luma in all three channels."""
    luma = np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=-1)


def boxes(
    h: int, w: int, rng: np.random.Generator, covered: tuple[float, float]
) -> Bool[np.ndarray, "h w"]:
    """One to five boxes, of a picture of h x w pixels, that cover together a share of it between
    these two: True inside."""
    wanted = rng.uniform(*covered) * h * w
    hole = np.zeros((h, w), bool)
    for left in range(int(rng.integers(1, 6)), 0, -1):
        area = max(1.0, (wanted - hole.sum()) / left)
        tall = min(h, max(1, round(math.sqrt(area) * rng.uniform(0.6, 1.6))))
        wide = min(w, max(1, round(area / tall)))
        y, x = int(rng.integers(h - tall + 1)), int(rng.integers(w - wide + 1))
        hole[y : y + tall, x : x + wide] = True
    return hole


def brushed(h: int, w: int, rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """Strokes of a brush over a picture of h x w pixels: True where it went.

    One to four strokes of several straight parts, each turning this way and that (compare Yu et al.
    2019, "Free-Form Image Inpainting with Gated Convolution", alg. 1).
    """
    from PIL import Image, ImageDraw

    side = min(h, w)
    sheet = Image.new("L", (w, h))
    pen = ImageDraw.Draw(sheet)
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.uniform(0, w), rng.uniform(0, h)
        angle, width = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.15) * side
        for turn in range(int(rng.integers(4, 9))):
            angle += rng.uniform(0.2, 1.0) * (math.pi if turn % 2 else -math.pi) / 2
            length = rng.uniform(0.1, 0.4) * side
            to = np.clip((x + length * math.cos(angle), y + length * math.sin(angle)), 0, (w, h))
            pen.line([(x, y), (to[0], to[1])], fill=1, width=max(1, round(width)))
            reach = width / 2
            pen.ellipse([to[0] - reach, to[1] - reach, to[0] + reach, to[1] + reach], fill=1)
            x, y = to
    hole = np.asarray(sheet) > 0
    if not hole.any():
        hole[int(y) % h, int(x) % w] = True
    return hole


def _whole(source: Picture) -> Damaged:
    return Damaged(source, np.ones(source.shape[:2], bool))


class DamagedSource(Source):
    """A dataset whose examples also hold `source` and `hole`, one of the damages drawn for each."""

    def __init__(self, whole: Source, damages: Sequence[Damage]):
        self._whole, self._damages = whole, tuple(damages)
        self.resolution, self.parts = whole.resolution, whole.parts
        self.left_out, self.filtered = whole.left_out, whole.filtered

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index):
        return self.drawn(index, np.random.default_rng(index))

    def hashes(self):
        return self._whole.hashes()

    def captions_of(self, index):
        return self._whole.captions_of(index)

    def drawn(self, index, rng):
        example = self._whole.drawn(index, rng)
        damage = self._damages[int(rng.integers(len(self._damages)))]
        made = damage(example["image"], rng)
        return _with(example, {"source": made.source, "hole": made.hole[..., None]})


def _with(example: Example, more: dict[str, np.ndarray]) -> Example:
    both: dict = {**example, **more}
    return both  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True)
class DamagedData(Data):
    """A dataset, and what is done to its pictures."""

    whole: Data
    """The pictures."""
    damages: tuple[Damage, ...]
    """What is done to them; each picture meets one, all are as frequent."""

    def open(self, resolution):
        return DamagedSource(self.whole.open(resolution), self.damages)

    @property
    def vocabulary(self):
        return self.whole.vocabulary
