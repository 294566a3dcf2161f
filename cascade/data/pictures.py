"""What all datasets of picture files have in common: filters, decoding, crop, flip, captions.

A source of this kind gives the encoded picture, its captions and what else the dataset says of it
(`found`); the rest is done here, so that every dataset treats its pictures alike.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cascade import images
from cascade.data.filters import Filters
from cascade.data.source import BadRecord, Data, Example, Source
from cascade.errors import UserError
from cascade.storage.paths import Path

MOST_CAPTION = 2**16
"""Bytes of the longest caption, or row of a list of captions, that is read."""
MOST_PICTURE = 2**28
"""Bytes of the largest picture that is read whole into memory."""
SIZES = ("width", "height")
"""The columns that filters take for a picture's sides in pixels."""
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureData(Data):
    """A dataset of picture files with captions; each subclass says where they are.

    A JPEG of more than twice the resolution is decoded at a half, a quarter or an eighth of its
    size, which keeps at least twice the resolution, and resized from there.
    """

    filters: Filters = dataclasses.field(default_factory=Filters)
    """Which of the pictures are taken."""
    crop: Literal["center", "random"] = "center"
    """Which square of a picture is trained on: its central one, or one anywhere along its longer
    side, drawn anew each time."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew each time, but none whose caption says left or
    right."""


class Found(NamedTuple):
    """An example as its dataset has it."""

    key: str
    """Names it in the dataset."""
    where: str
    """Names it in errors, with the dataset."""
    picture: bytes | Path
    """The encoded picture, or its file."""
    captions: Sequence[str]
    """What says what it shows, one or more."""
    values: Mapping[str, Any] = {}
    """What else the dataset says of it."""


class PictureSource(Source):
    """The examples of a PictureData; a subclass defines `found` and `__len__`."""

    def __init__(self, config: PictureData, resolution: int):
        self.config: Any = config
        self.resolution = resolution

    def found(self, index: int) -> Found:
        """Example `index`, undecoded. Raises BadRecord if it cannot be read."""
        raise NotImplementedError

    def read_all_columns(self) -> None:
        """From now on `found` has all columns of the dataset, and not those alone that are used."""

    def __getitem__(self, index: int) -> Example:
        return self._example(index, None)

    def captions_of(self, index: int) -> Sequence[str]:
        found = self.found(index)
        captions, reason = self.config.filters.passing(found.captions)
        if not captions:
            raise _without(found, reason)
        return captions

    def drawn(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`, with the caption, the square and the flip drawn from `rng`."""
        return self._example(index, rng)

    def whole(self, index: int) -> tuple[Found, Any]:
        """Example `index` with the captions that filters leave, and its picture, decoded.

        Raises BadRecord if it cannot be read, or filters take it out.
        """
        found, filters = self.found(index), self.config.filters
        captions, reason = filters.passing(found.captions)
        if not captions or (reason := filters.reason_of_values(found.values)):
            raise _without(found, reason)
        return found._replace(captions=captions), self._decoded(found)

    def _example(self, index: int, rng: np.random.Generator | None) -> Example:
        found, picture = self.whole(index)
        captions = found.captions
        caption, at, flipped = captions[0], 0.5, False
        if rng is not None:
            if len(captions) > 1:
                caption = captions[int(rng.integers(len(captions)))]
            if self.config.crop == "random":
                at = rng.random()
            if self.config.flip:
                flipped = rng.random() < 0.5 and not _SIDES.search(caption)
        square = images.square(picture, self.resolution, at=at)
        square = np.ascontiguousarray(square[:, ::-1]) if flipped else square
        if len(captions) > 1 and rng is None:
            return {"image": square, "caption": caption, "captions": captions}
        return {"image": square, "caption": caption}

    def _decoded(self, found: Found) -> Any:
        filters = self.config.filters
        try:
            with _opened(found.picture) as file:
                if filters.of_sizes:
                    if reason := filters.reason_of_size(*map(float, images.size_of(file))):
                        raise _without(found, reason)
                    file.seek(0)
                return images.decoded(file, least=2 * self.resolution)
        except BadRecord:
            raise
        except images.Unreadable as e:
            raise BadRecord(
                f"{found.where}: cannot be read as an image ({e})", found.key, "unreadable picture"
            ) from None
        except UserError as e:
            raise BadRecord(str(e), found.key, "unreadable picture") from None


def encoded(found: Found) -> bytes:
    """The picture of an example as its file has it. Raises BadRecord if that cannot be read."""
    if isinstance(found.picture, bytes):
        return found.picture
    try:
        with images.opened(found.picture) as file:
            content = file.read(MOST_PICTURE + 1)
    except UserError as e:
        raise BadRecord(str(e), found.key, "unreadable picture") from None
    if len(content) > MOST_PICTURE:
        raise BadRecord(
            f"{found.where}: has more than {MOST_PICTURE} bytes", found.key, "picture too large"
        )
    return content


def summary(records: Sequence[BadRecord]) -> str:
    """The records counted by reason, each with the first two keys, for people."""
    keys = collections.defaultdict(list)
    for record in records:
        keys[record.reason].append(record.key if record.key.isprintable() else repr(record.key))
    return "; ".join(
        f"{len(of)} {reason} ({', '.join(of[:2])}{', ...' if len(of) > 2 else ''})"
        for reason, of in keys.items()
    )


def told(source: Source, called: str) -> None:
    """Print, in a line, what is left out and what filters took out, if anything.

    Raises UserError where that leaves no example.
    """
    filtered = [f"{count} {reason}" for reason, count in source.filtered.items()]
    parts = [summary(source.left_out)] if source.left_out else []
    if not len(source):
        if source.left_out:
            raise source.left_out[0]
        raise UserError(
            f"{called}: {'the filters leave no picture' if filtered else 'holds no pictures'}"
            f"{': ' + '; '.join(filtered) if filtered else ''}; give another, or other filters"
        )
    if parts or filtered:
        said = f"{len(source)} pictures with captions; left out {'; '.join(parts + filtered)}"
        print(f"warning: {called}: {said}", file=sys.stderr)


def caption_of(content: bytes, where: str, key: str) -> str:
    """The text of a caption's bytes. Raises BadRecord where it is too long or no UTF-8."""
    if len(content) > MOST_CAPTION:
        raise BadRecord(
            f"{where}: has more than the {MOST_CAPTION} bytes that a caption may have",
            *(key, "whose caption is too long"),
        )
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode().strip()
    except UnicodeDecodeError:
        raise BadRecord(
            f"{where}: its caption is not UTF-8 text; save it as UTF-8",
            *(key, "whose caption is not UTF-8"),
        ) from None


def captions_in(value: Any, where: str, key: str) -> tuple[str, ...]:
    """The captions that a column holds: text, or a list of some. Raises BadRecord for others."""
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not texts or value is None:
        raise BadRecord(f"{where}: has no caption; write one", key, "without a caption")
    for text in texts:
        if not isinstance(text, str) or not _is_unicode(text):
            raise BadRecord(
                f"{where}: its caption must be text or a list of texts, got {text!r:.80}",
                *(key, "whose caption is no text"),
            )
        if len(text) > MOST_CAPTION:
            raise BadRecord(
                f"{where}: has more than the {MOST_CAPTION} characters that a caption may have",
                *(key, "whose caption is too long"),
            )
    return tuple(text.strip() for text in texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _opened(picture: bytes | Path) -> Any:
    if isinstance(picture, bytes):
        return contextlib.nullcontext(io.BytesIO(picture))
    return images.opened(picture)


def _without(found: Found, reason: str) -> BadRecord:
    """What is said of an example that filters take out when it is read."""
    if not found.captions:
        return BadRecord(f"{found.where}: has no caption", found.key, "without a caption")
    return BadRecord(f"{found.where}: {reason}", found.key, reason)
