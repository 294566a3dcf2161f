"""What happens to an example on its way into a batch: crop, low resolution, degradation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cascade.data.degradation import Degradation
from cascade.data.source import BadRecord, Example, Source
from cascade.errors import UserError

BAD_RECORDS = "bad_records"
"""Under this name a loaded example lists the (key, reason) of those that it stands in for."""
MOST_BAD_IN_A_ROW = 1000


def block_means(image: UInt8[np.ndarray, "h w c"], factor: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The means over blocks of factor x factor pixels, rounded: -> [h / factor, w / factor, c].

    It equals `images.downsample` rounded to uint8, and is ten times as fast. `factor` must divide
    both sides.
    """
    h, w, c = image.shape
    rows = image.reshape(h // factor, factor, w * c)
    columns = np.add.reduce(rows, axis=1, dtype=np.float32).reshape(h // factor, -1, factor, c)
    total = sum(columns[:, :, i] for i in range(factor))
    return np.rint(total / factor**2).astype(np.uint8)


def check_resolutions(
    resolution: int,
    lowres_resolution: int | None,
    crop: int | None,
    degradation: Degradation | None,
    *,
    prefix: str = "",
) -> None:
    """Check that a picture of `resolution` pixels can be loaded as `LoadExample` does it.

    Raises ValueError where a crop or a degradation has no lowres_resolution, and where sides are no
    multiples of the factor between the two resolutions. It names the field, with `prefix`
    ("StageTraining.") before it.
    """
    if lowres_resolution is None:
        for name, value in (("crop", crop), ("degradation", degradation)):
            if value is not None:
                raise ValueError(
                    f"{prefix}{name} is for super-resolution: it needs a lowres_resolution, "
                    f"got {value}"
                )
        return
    if resolution % lowres_resolution:
        raise ValueError(
            f"{prefix}resolution must be a multiple of lowres_resolution={lowres_resolution}, "
            f"got {resolution}"
        )
    factor = resolution // lowres_resolution
    if crop is not None and (crop % factor or not 0 < crop <= resolution):
        raise ValueError(
            f"{prefix}crop must be a multiple of the upsampling factor {factor} in "
            f"{factor}..{resolution}, got {crop}"
        )


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Loads an example. For super-resolution it crops it, and adds `lowres`, its low resolution."""

    source: Source
    """The examples, at the resolution of the whole picture."""
    lowres_resolution: int | None
    """Side of the whole low-resolution picture in pixels; None for the example as it is."""
    crop: int | None
    """Side of the crop in pixels; None for the whole picture."""
    degradation: Degradation | None
    """What makes `lowres`; None for plain means over blocks."""

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Example `index`, of which crop and degradation are drawn from `rng`.

        In place of one that cannot be read there is another that can, drawn from `rng`: the next
        one would be seen more often than others. Raises UserError where so many in a row cannot
        that the whole dataset must be at fault.
        """
        bad: list[BadRecord] = []
        while len(bad) < MOST_BAD_IN_A_ROW:
            try:
                example = self._loaded(index, rng)
            except BadRecord as e:
                bad.append(e)
                index = int(rng.integers(*self._like(index)))
                continue
            loaded: dict[str, Any] = {k: v for k, v in example.items() if k != "captions"}
            named = [(record.key, record.reason) for record in bad]
            return {**loaded, BAD_RECORDS: named} if named else loaded
        raise UserError(f"{len(bad)} examples in a row cannot be read, the first: {bad[0]}")

    def _like(self, index: int) -> tuple[int, int]:
        """The first example and the one after the last of the same part of a mixture."""
        start = 0
        for size, _ in self.source.parts:
            if index < start + size:
                return start, start + size
            start += size
        return 0, len(self.source)

    def _loaded(self, index: int, rng: np.random.Generator) -> Example | dict[str, Any]:
        if self.lowres_resolution is None:
            return self.source.drawn(index, rng)
        factor = self.source.resolution // self.lowres_resolution
        if self.crop is None:
            example = self.source.drawn(index, rng)
        else:
            free = self.lowres_resolution - self.crop // factor
            y, x = (factor * int(i) for i in rng.integers(0, free + 1, 2))
            example = self.source.window(index, y, x, self.crop, rng)
        if self.degradation is None:
            lowres = block_means(example["image"], factor)
        else:
            lowres = self.degradation(example["image"], rng, factor)
        return {**example, "lowres": lowres}
