"""How far pictures have come while they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, UInt8

from cascade import images
from cascade.devices.terminal import bar


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
    def images(self) -> UInt8[np.ndarray, "b _ _ 3"] | None:
        """What the pictures are thought to be by now, computed when it is asked for; after the last
        step what they are. None at step 0."""
        return None if self.thought is None else images.to_uint8(self.thought()[: self.pictures])


class Bar:
    """While entered, a bar on stderr tells how many steps of all stages of all batches are done."""

    def __init__(
        self,
        batches: int,
        steps: Mapping[str, int],
        shown: bool,
        times: Mapping[str, int] = {},
    ):
        """steps: stage's name -> how many it is to take, as far as one can tell. times: how often
        it draws each batch, where that is not once."""
        self._batches, self._planned, self._shown = batches, dict(steps), shown
        self._times = {name: times.get(name, 1) for name in steps}
        self._met: set[str] = set()

    def __enter__(self) -> Bar:
        self._bar = bar(
            total=self._batches * sum(n * self._times[s] for s, n in self._planned.items()),
            unit="step",
            desc="drawing",
            disable=not self._shown,
        )
        return self

    def told(self, progress: Progress) -> None:
        """What `Cascade.draw` calls with its progress."""
        if progress.step:
            self._bar.update(1)
        new = progress.stage not in self._met
        if new:  # a picture that is redrawn leaves steps out
            more = progress.steps - self._planned[progress.stage]
            self._bar.total += self._batches * more * self._times[progress.stage]
            self._met.add(progress.stage)
        if progress.step <= 1:
            self._bar.set_postfix_str(f"{progress.stage}, compiling" if new else progress.stage)

    def __exit__(self, *error: Any) -> Literal[False]:
        self._bar.close()
        return False
