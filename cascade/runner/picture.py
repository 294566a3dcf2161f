"""One drawn picture at every size."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade import images as files
from cascade.errors import OptionError, UserError
from cascade.storage import paths


@dataclass(frozen=True, repr=False, eq=False)
class Picture:
    """One drawn picture at every size, with what made it. A notebook shows the largest."""

    prompt: str
    """What it is to show."""
    seed: int
    """The seed of all its random numbers, in 0..2**32 - 1."""
    images: dict[int, UInt8[np.ndarray, "_ _ 3"]]
    """Side in pixels, the longer one if they differ -> the picture of that size, smallest first."""
    metadata: dict[str, Any]
    """All that made it, as JSON values: prompt, seed, model, and the settings of each stage."""
    frames: dict[int, UInt8[np.ndarray, "n _ _ 3"]] = field(default_factory=dict)
    """Side in pixels -> what the stage thought the picture was, from noise to the end; empty unless
    `Cascade.draw` was told of `frames`."""

    @property
    def image(self) -> UInt8[np.ndarray, "_ _ 3"]:
        """The largest."""
        return self.images[max(self.images)]

    def pil(self, side: int | None = None) -> Image.Image:
        """As a PIL image. side: in pixels, one of those in `images`; None is the largest."""
        return Image.fromarray(self._of(side))

    def save(self, path: str | os.PathLike[str], side: int | None = None) -> None:
        """Write it as a PNG that holds prompt and seed as text, as `cascade sample` does.

        path: ends in .png; a name in a bucket (gs://, s3://) will do. A file that is there is
        replaced. side: as for `pil`.
        """
        if not os.fspath(path).lower().endswith(".png"):
            raise UserError(f"path {path}: pictures are saved as PNG; end the name with .png")
        _check_folder(path)
        files.save_png(path, self._of(side), {"prompt": self.prompt, "seed": str(self.seed)})

    def strip(self) -> Image.Image:
        """How it came about: its `frames`, a row for each stage, the first guess on the left."""
        return Image.fromarray(files.grid(self._rows(128, 8), columns=8))

    def save_strip(self, path: str | os.PathLike[str]) -> None:
        """Write `strip` as a PNG, as `save` does."""
        _check_folder(path)
        files.save_png(path, np.asarray(self.strip()), {"prompt": self.prompt})

    def save_gif(self, path: str | os.PathLike[str]) -> None:
        """Write how it came about as an animation of at most 256 px: its `frames`, stage after
        stage, then the picture for 2 seconds."""
        _check_folder(path)
        shown = [Image.fromarray(frame) for frame in self._rows(256)]
        times = [80] * (len(shown) - 1) + [2000]
        with paths.writing(paths.path(path)) as file:
            shown[0].save(
                file,
                format="GIF",
                save_all=True,
                append_images=shown[1:],
                duration=times,
                loop=0,
            )

    def _rows(self, most: int, columns: int | None = None) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """The frames of all stages, of one size, at most so large. columns: so many of a stage,
        white ones after those it has; None is all of them."""
        if not self.frames:
            raise UserError("this picture has no frames; draw it with frames=8, or so many as fit")
        side, rows = min(most, max(self.frames)), []
        for own, frames in self.frames.items():
            how = Image.Resampling.NEAREST if own < side else Image.Resampling.LANCZOS
            h, w = (round(length * side / own) for length in frames.shape[1:3])
            row = [np.asarray(Image.fromarray(f).resize((w, h), how)) for f in frames]
            white = [np.full_like(row[0], 255)] * ((columns or 0) - len(row))
            rows += (row + white)[:columns]
        return rows

    def _of(self, side: int | None) -> UInt8[np.ndarray, "_ _ 3"]:
        if side is None:
            return self.image
        if side not in self.images:
            raise OptionError("side", side, f"this picture has {self._sides} px")
        return self.images[side]

    @property
    def _sides(self) -> str:
        *most, last = map(str, sorted(self.images))
        return f"{', '.join(most)} and {last}" if most else last

    def _repr_png_(self) -> bytes | None:
        return self.pil()._repr_png_()

    def __repr__(self) -> str:
        return f"Picture({self.prompt!r}, seed={self.seed}, {self._sides} px)"


def _check_folder(path: str | os.PathLike[str]) -> None:
    """UserError for a file whose folder is not there."""
    file = paths.path(path)
    if not paths.is_remote(file) and not file.parent.is_dir():
        raise UserError(f"path {path}: there is no folder {file.parent}; make it first")
