"""Picture files under a folder, with captions beside them or in one list."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from cascade import images
from cascade.data.source import Data, Example, Source
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderData(Data):
    """Picture files under a folder, with their captions.

    The folder holds captions.jsonl, whose lines are {"file": "a/1.png", "caption": "..."} with
    files relative to the folder, one example a line. Without that file it holds pictures (png, jpg,
    jpeg, webp; subfolders too), each beside a UTF-8 text file of the same stem: a/1.png, a/1.txt.
    Pictures are cropped to their central square.
    """

    path: str
    """The folder. One in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME), where looking for
    files is slow, must have captions.jsonl."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the list, or of the pictures' paths; see `Data.open`."""
        return _FolderSource(self, resolution)


class _FolderSource(Source):
    def __init__(self, config: FolderData, resolution: int):
        self.resolution = resolution
        folder = paths.path(config.path)
        if not folder.is_dir():
            raise UserError(
                f"data folder {folder}: no such folder; give one that holds pictures and captions"
            )
        listing = folder / "captions.jsonl"
        pairs = _listed(listing) if listing.exists() else _paired(folder)
        self.paths, self.captions = [str(path) for path, _ in pairs], [text for _, text in pairs]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        picture = images.load_image(self.paths[index])
        return {"image": images.square(picture, self.resolution), "caption": self.captions[index]}


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def _listed(listing: Path) -> list[tuple[Path, str]]:
    """The pairs named by a captions.jsonl."""
    pairs = []
    for number, line in enumerate(_read_text(listing).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
            caption.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f'{where}: must be JSON, as {{"file": "1.png", "caption": "a red circle"}}'
            ) from None
        if not isinstance(file, str) or not isinstance(caption, str):
            raise UserError(f"{where}: file and caption must be text")
        if "\0" in file:
            raise UserError(f"{where}: file {file!r} has a NUL character; remove it")
        path = listing.parent / file
        _check_within(path, listing.parent, where)
        if not paths.is_remote(path) and not path.is_file():
            raise UserError(f"{where}: no picture {path}; put it there or remove the line")
        pairs.append((path, caption.strip()))
    if not pairs:
        raise UserError(f"{listing}: names no picture; write one line for each, or remove the file")
    return pairs


def _paired(folder: Path) -> list[tuple[Path, str]]:
    """The pictures under a folder, with the text files beside them, in the order of their paths."""
    if not isinstance(folder, pathlib.Path):
        raise UserError(f"data folder {folder}: in object storage it must hold captions.jsonl")
    seen = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    pictures = sorted(p for p in seen if p.suffix.lower() in _SUFFIXES and p.is_file())
    if linked := sorted(path for path in seen if path.is_symlink() and path.is_dir()):
        print(
            f"warning: data folder {folder}: left out {linked[0].relative_to(folder)}"
            f"{f' and {len(linked) - 1} more' if len(linked) > 1 else ''}: links to folders are "
            "not followed; put the pictures here",
            file=sys.stderr,
        )
    if not pictures:
        raise UserError(
            f"data folder {folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))}); "
            "put them there, each with a .txt file of the same name"
        )
    pairs = []
    for path in pictures:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            raise UserError(
                f"picture {path}: has no caption; write it to {beside.name} beside it, "
                f"or list all pictures in {folder / 'captions.jsonl'}"
            )
        for file in (path, beside):
            _check_within(file, folder, f"picture {path}")
        pairs.append((path, _read_text(beside).strip()))
    return pairs


def _check_within(file: Path, folder: Path, where: str) -> None:
    """UserError where a file is not in the folder, be it by its name or as a link."""
    if isinstance(file, pathlib.Path) and isinstance(folder, pathlib.Path):
        outside = not file.resolve().is_relative_to(folder.resolve())
    else:
        outside = ".." in str(file).split("/")
    if outside:
        raise UserError(f"{where}: {file} is outside the folder {folder}; put it there")


def _read_text(path: Path) -> str:
    paths.check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
