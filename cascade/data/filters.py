"""Which of the pictures of a dataset are trained on."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cascade.data.source import FILTERED

_COMPARED = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COLUMN = re.compile(r"\s*(\S+?)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """What a picture and its caption must be; what is not is left out, and counted by reason.

    What a dataset says beside its pictures is looked at when it is opened, the sizes in columns
    `width` and `height` among it, and the rest when a picture is read. All is looked at when one is
    read in a TFDS dataset, and in shards in object storage, where it would take a request for each.
    Of several captions those that fail are left out.
    """

    least_side: int = 0
    """Least length of a picture's shorter side in pixels; 0 takes any."""
    most_aspect: float | None = None
    """Largest ratio of a picture's longer side to its shorter one, at least 1; None takes any."""
    caption_length: tuple[int, int] | None = None
    """Fewest and most characters of a caption; None takes any."""
    caption_regex: str | None = None
    """A regular expression of Python that is found in a caption; None takes any."""
    columns: tuple[str, ...] = ()
    """Comparisons of columns with numbers, as "aesthetic >= 5" and "watermark < 0.3"; a picture
    without a number there is left out."""

    def __post_init__(self):
        if self.least_side < 0:
            raise ValueError(f"Filters.least_side must be 0 or more, got {self.least_side}")
        if self.most_aspect is not None and not 1 <= self.most_aspect < math.inf:
            raise ValueError(f"Filters.most_aspect must be at least 1, got {self.most_aspect}")
        length = self.caption_length
        if length is not None and not 0 <= length[0] <= length[1]:
            raise ValueError(
                f"Filters.caption_length must be two numbers in rising order, as (5, 300), "
                f"got {length}"
            )
        if self.caption_regex is not None:
            try:
                re.compile(self.caption_regex)
            except (re.error, RecursionError, OverflowError) as e:
                raise ValueError(
                    f"Filters.caption_regex must be a regular expression of Python, got "
                    f"{self.caption_regex!r} ({e})"
                ) from None
        for text in self.columns:
            _comparison(text)

    @property
    def names(self) -> Sequence[str]:
        """The columns that comparisons name."""
        return tuple(dict.fromkeys(_comparison(text)[0] for text in self.columns))

    @property
    def of_sizes(self) -> bool:
        """Whether sizes of pictures matter."""
        return self.least_side > 0 or self.most_aspect is not None

    @property
    def of_texts(self) -> bool:
        """Whether captions matter."""
        return self.caption_length is not None or self.caption_regex is not None

    @property
    def any(self) -> bool:
        """Whether anything is left out at all."""
        return self.of_sizes or self.of_texts or bool(self.columns)

    def passing(self, captions: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """The captions that may be had, and if there is none, the reason."""
        low, high = self.caption_length or (0, math.inf)
        kept = tuple(text for text in captions if low <= len(text) <= high)
        if captions and not kept:
            return (), f"{FILTERED}caption not of {low} to {high} characters"
        found = [text for text in kept if re.search(self.caption_regex or "", text)]
        if kept and not found:
            return (), f"{FILTERED}caption without {self.caption_regex}"
        return tuple(found), ""

    def reason_of_values(self, values: Mapping[str, Any]) -> str:
        """Why a picture with these columns is left out; empty if it is not."""
        for text in self.columns:
            name, compare, limit = _comparison(text)
            value = _number(values.get(name))
            if value is None:
                return f"{FILTERED}no number in column {name}"
            if not compare(value, limit):
                return f"{FILTERED}not {text}"
        width, height = _number(values.get("width")), _number(values.get("height"))
        if self.of_sizes and width is not None and height is not None:
            return self.reason_of_size(width, height)
        return ""

    def reason_of_size(self, width: float, height: float) -> str:
        """Why a picture of so many pixels is left out; empty if it is not."""
        short, long = sorted((width, height))
        if short < self.least_side:
            return f"{FILTERED}side below {self.least_side}"
        if self.most_aspect is not None and long > self.most_aspect * short:
            return f"{FILTERED}aspect above {self.most_aspect:g}"
        return ""


def _comparison(text: str) -> tuple[str, Any, float]:
    found = _COLUMN.fullmatch(text)
    limit = None if found is None else _number(found[3])
    if found is None or limit is None:
        raise ValueError(
            f'Filters.columns must be comparisons with numbers, as "aesthetic >= 5", got {text!r}'
        )
    return found[1], _COMPARED[found[2]], limit


def _number(value: Any) -> float | None:
    """The value as a finite number; text that is one counts, as columns of CSV are text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
