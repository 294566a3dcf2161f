"""How far pictures have come while they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Array, UInt8

from cascade import images


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One stage of one batch, before its first step and after each.

    `Cascade.draw(progress=f)` calls f with it; what f raises ends the drawing.
    """

    stage: str
    """The stage's name."""
    resolution: int
    """The side of its pictures in pixels."""
    step: int
    """How many of its steps are taken. At 0 its program may have to be compiled yet."""
    steps: int
    """How many there are."""
    pictures: int
    """How many are drawn together."""
    thought: Callable[[], Array] | None = field(repr=False)
    """Gives what the pictures are thought to be, [b, s, s, 3] in [-1, 1]; None at step 0."""

    @property
    def images(self) -> UInt8[np.ndarray, "b s s 3"] | None:
        """What the pictures are thought to be by now, computed when it is asked for; after the last
        step what they are. None at step 0."""
        return None if self.thought is None else images.to_uint8(self.thought()[: self.pictures])
