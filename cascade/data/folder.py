"""Picture files under a folder, with captions beside them or in one list."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import cast

from cascade.data.pictures import MOST_CAPTION, Found, PictureData, PictureSource, told
from cascade.data.source import BadRecord, Source, hashes_of
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderData(PictureData):
    """Picture files under a folder, with their captions.

    The folder holds captions.jsonl, whose lines are {"file": "a/1.png", "caption": "..."} with
    files relative to the folder, one example a line. Without that file it holds pictures (png, jpg,
    jpeg, webp, gif, bmp, tif, tiff; subfolders too), each beside a UTF-8 text file of the same
    stem: a/1.png, a/1.txt. Pictures are cropped to their central square. What has no caption, or
    cannot be read, is left out, with a warning that counts it by reason.
    """

    path: str
    """The folder. One in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME), where looking for
    files is slow, must have captions.jsonl."""
    needs_captions: bool = True
    """Whether a picture without a text file is left out; else its caption is empty."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the list, or of the pictures' paths; see `Data.open`."""
        return _FolderSource(self, resolution)


class _FolderSource(PictureSource):
    def __init__(self, config: FolderData, resolution: int):
        super().__init__(config, resolution)
        self._folder = paths.path(config.path)
        if not self._folder.is_dir():
            raise UserError(
                f"data folder {self._folder}: no such folder; give one that holds pictures and "
                "captions"
            )
        listing = self._folder / "captions.jsonl"
        _check_within(listing, self._folder, str(listing))
        if listing.is_dir():
            raise UserError(f"{listing}: is a folder; it must be a list of pictures and captions")
        alone = not config.needs_captions
        found = list(_listed(listing) if listing.exists() else _paired(self._folder, alone))
        self.left_out = [one for one in found if isinstance(one, BadRecord)]
        pairs = [cast(tuple[Path, str], one) for one in found if not isinstance(one, BadRecord)]
        self.filtered = collections.Counter[str]()
        kept = []
        for path, text in pairs:
            reason = config.filters.passing([text])[1] or config.filters.reason_of_values({})
            self.filtered[reason] += bool(reason)
            kept += [] if reason else [(path, text)]
        self.filtered = +self.filtered
        self.paths, self.captions = [str(path) for path, _ in kept], [text for _, text in kept]
        told(self, f"data folder {self._folder}")

    def __len__(self) -> int:
        return len(self.paths)

    def hashes(self):
        return hashes_of(_key(file, self._folder) for file in self.paths)

    def found(self, index: int) -> Found:
        file = self.paths[index]
        where, key, path = f"picture {file}", _key(file, self._folder), paths.path(file)
        try:
            _check_within(path, self._folder, where)  # now, too
        except UserError as e:
            raise BadRecord(str(e), key, "unreadable picture") from None
        return Found(key, where, path, (self.captions[index],))


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_UNREAD = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ppm", ".pgm"}
"""Suffixes of pictures that are not read; other files are no part of a dataset."""


def _key(path: Path | str, folder: Path) -> str:
    return str(path).removeprefix(f"{folder}/")


def _listed(listing: Path) -> Iterator[tuple[Path, str] | BadRecord]:
    """The pairs named by a captions.jsonl."""
    seen = False
    for number, line in enumerate(_lines(listing), 1):
        if not line.strip():
            continue
        seen = True
        key = f"captions.jsonl, line {number}"
        where = f"{listing}, line {number}"
        if len(line) > MOST_CAPTION:
            yield BadRecord(
                f"{where}: has more than the {MOST_CAPTION} bytes that a line may have",
                *(key, "line that is too long"),
            )
            continue
        try:
            entry = json.loads(line.decode())
            file, caption = entry["file"], entry["caption"]
            for text in (file, caption):
                if isinstance(text, str):
                    text.encode()  # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, RecursionError):
            yield BadRecord(
                f'{where}: must be JSON, as {{"file": "1.png", "caption": "a red circle"}}',
                *(key, "line that is no JSON of file and caption"),
            )
            continue
        if not isinstance(file, str) or not isinstance(caption, str) or "\0" in file:
            yield BadRecord(
                f"{where}: file and caption must be text, and file no NUL character",
                *(key, "line whose file or caption is no text"),
            )
            continue
        path = listing.parent / file
        _check_within(path, listing.parent, where)
        if not paths.is_remote(path) and not _is_file(path):
            yield BadRecord(
                f"{where}: no picture {path}; put it there or remove the line", file, "missing"
            )
            continue
        yield path, caption.strip()
    if not seen:
        raise UserError(f"{listing}: names no picture; write one line for each, or remove the file")


def _paired(folder: Path, alone: bool) -> Iterator[tuple[Path, str] | BadRecord]:
    """The pictures under a folder, with the text files beside them, in the order of their paths.

    alone: whether those without a text file are taken too.
    """
    if not isinstance(folder, pathlib.Path):
        raise UserError(f"data folder {folder}: in object storage it must hold captions.jsonl")
    some = seen = False
    try:
        found = sorted(folder.rglob("*"))
    except RecursionError:
        raise UserError(f"data folder {folder}: its folders are nested too deeply") from None
    for path in found:
        key = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            if path.is_symlink():
                yield BadRecord(
                    f"{path}: links to folders are not followed; put the pictures here",
                    *(key, "link to a folder, which is not followed"),
                )
        elif path.suffix.lower() in _UNREAD:
            yield BadRecord(
                f"picture {path}: pictures of this kind are not read; save it as PNG or JPEG",
                *(key, "of a format that is not read"),
            )
        elif path.suffix.lower() in _SUFFIXES:
            some = True
            yield _pair(path, folder, key, alone)
        seen = seen or some or path.suffix.lower() in _UNREAD
    if not seen:
        raise UserError(
            f"data folder {folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))}); "
            "put them there, each with a .txt file of the same name"
        )


def _pair(
    path: pathlib.Path, folder: pathlib.Path, key: str, alone: bool
) -> tuple[Path, str] | BadRecord:
    """The picture and the caption beside it."""
    beside = path.with_suffix(".txt")
    for file in (path, beside):
        _check_within(file, folder, f"picture {path}")
    if not _is_file(path):
        return BadRecord(f"picture {path}: a link to nothing, or no file", key, "no file")
    if not _is_file(beside):
        if alone:
            return path, ""
        return BadRecord(
            f"picture {path}: has no caption; write it to {beside.name} beside it, "
            f"or list all pictures in {folder / 'captions.jsonl'}",
            *(key, "without a caption"),
        )
    try:
        with beside.open("rb") as file:
            content = file.read(MOST_CAPTION + 1)
        if len(content) > MOST_CAPTION:
            return BadRecord(
                f"{beside}: has more than the {MOST_CAPTION} bytes that a caption may have",
                *(key, "whose caption is too long"),
            )
        return path, content.removeprefix(b"\xef\xbb\xbf").decode().strip()
    except UnicodeDecodeError:
        return BadRecord(
            f"{beside}: is not UTF-8 text; save it as UTF-8", key, "whose caption is not UTF-8"
        )
    except OSError as e:
        return BadRecord(f"{beside}: {e.strerror}", key, "whose caption cannot be read")


def _lines(listing: Path) -> Iterator[bytes]:
    """The lines of a list; of one that is too long the beginning, which is too long as well."""
    paths.check_regular(listing)
    with listing.open("rb") as file:
        line = file.readline(MOST_CAPTION + 2).removeprefix(b"\xef\xbb\xbf")
        while line:
            yield line
            while len(line) > MOST_CAPTION and not line.endswith(b"\n"):
                line = file.readline(MOST_CAPTION + 2)
            line = file.readline(MOST_CAPTION + 2)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a link to itself
        return False


def _check_within(file: Path, folder: Path, where: str) -> None:
    """UserError where a file is not in the folder, be it by its name or as a link."""
    if isinstance(file, pathlib.Path) and isinstance(folder, pathlib.Path):
        try:
            outside = not file.resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError):  # a link to itself leads nowhere
            outside = False
    else:
        outside = ".." in str(file).split("/")
    if outside:
        raise UserError(f"{where}: {file} is outside the folder {folder}; put it there")
