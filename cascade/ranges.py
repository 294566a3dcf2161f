"""The ranges of a config's fields, checked where the config is made.

A number from a file may be of another type, NaN, zero, or so large that to build what it asks for
takes all memory; each config says of its fields what they may be.
"""

import math
import numbers
from typing import Any

MOST_LEVELS = 16
"""A network has at most so many resolutions."""
MOST_BLOCKS = 64
"""A level of a network has at most so many blocks."""
MOST_CHANNELS = 2**16
"""Features and embeddings have at most so many channels."""
MOST_PIXELS = 2**14
"""The side of a picture has at most so many pixels."""


def whole(config: Any, low: int, high: int, *fields: str, called: str = "") -> None:
    """Raise ValueError unless these fields are whole numbers, low to high.

    called: what the error calls the config; "" is the name of its class.
    """
    for field in fields:
        value: Any = getattr(config, field)
        name = f"{called or type(config).__name__}.{field}"
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, {low} to {high}, got {shown(value)}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {shown(value)}")
        if value > high:
            raise ValueError(f"{name} must be at most {high}, got {shown(value)}")


def real(config: Any, low: float | int, high: float | int, *fields: str) -> None:
    """Raise ValueError unless these fields are numbers, low to high; NaN is none."""
    for field in fields:
        value: Any = getattr(config, field)
        number = is_real(value)
        if not number or not low <= value <= high:
            raise ValueError(
                f"{type(config).__name__}.{field} must be a number, {low:g} to {high:g}, "
                f"got {shown(value)}"
            )


def levels(config: Any, width: int = 1) -> None:
    """Raise ValueError unless a network has levels, whose widths are multiples of a number.

    width: that number, which is also the least.
    """
    name = type(config).__name__
    if not config.levels:
        raise ValueError(f"{name}.levels must hold at least one level, got none")
    if len(config.levels) > MOST_LEVELS:
        raise ValueError(
            f"{name}.levels must hold at most {MOST_LEVELS} levels, got {len(config.levels)}"
        )
    for i, level in enumerate(config.levels):
        called = f"{name}.levels[{i}]"
        whole(level, 1, MOST_BLOCKS, "blocks", called=called)
        whole(level, width, MOST_CHANNELS, "width", called=called)
        if level.width % width:
            raise ValueError(f"{called}.width must be a multiple of {width}, got {level.width}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or of NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether it is a number, of Python or of NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """The value as an error prints it: Python refuses to print a number of very many digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return repr(value)[:80]
