"""What `cascade sample` and `Cascade.draw` refuse before anything is loaded. It needs no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cascade import ranges
from cascade.errors import OptionError, UserError

MOST_TOGETHER = 4096
"""At most so many pictures are drawn in one batch."""


def check(
    *, seed: Any = 0, num: Any = 1, batch_size: Any = None, split_rows: Any = 1, frames: Any = 0
) -> None:
    """Raise OptionError for a count that is out of range, as `Cascade.draw` has them."""
    least = {"seed": (seed, 0), "num": (num, 1), "split_rows": (split_rows, 1)}
    least |= {"frames": (frames, 0), "batch_size": (1 if batch_size is None else batch_size, 1)}
    for option, (value, low) in least.items():
        if not ranges.is_whole(value):
            raise OptionError(option, value, f"must be a whole number, {low} or more")
        if value < low:
            raise OptionError(option, value, f"must be {low} or more")
    if batch_size is not None and batch_size > MOST_TOGETHER:
        raise OptionError("batch_size", batch_size, f"must be at most {MOST_TOGETHER}")
    if num > 2**32:
        raise OptionError("num", num, "must be at most 2^32, the number of seeds")
    if seed + num > 2**32:
        raise OptionError(
            "seed",
            seed,
            f"the last of {num} pictures would have seed {ranges.shown(seed + num - 1)}, and seeds "
            "are below 2^32; give a smaller one",
        )


def check_prompts(prompts: Sequence[str], places: Sequence[str] | None = None) -> None:
    """Raise UserError for no prompt, or one without a word.

    places: what the error calls each; None is prompt 1, prompt 2 and so on.
    """
    if not prompts:
        raise UserError('nothing to draw: give a prompt, such as "a red circle"')
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            if len(prompts) == 1:
                raise UserError("the prompt is empty; write what to draw")
            where = f"prompt {i + 1}" if places is None else places[i]
            raise UserError(f"{where} is empty; write what to draw, or remove it")
