"""Folders on this machine and in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME) alike.

A local path is a pathlib.Path; one in object storage is an etils.epath.Path, which has the same
methods as far as storage can do them (no appending, no renaming that is whole). Orbax and
TensorStore write arrays to both. Libraries that only know local files are given one here, which is
copied: `writing`, `reading`, `local_copy`, `copy_folder`, `WholeFolder`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from cascade.errors import UserError

Path = pathlib.Path | epath.Path
"""A file or folder here, or one in object storage."""
CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
"""The package that fsspec needs for each scheme."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers of a disk that takes no more, or fails."""
PARTIAL = ".partial-"
"""How the names of folders begin that a `WholeFolder` inside an existing folder fills."""


def path(name: str | os.PathLike[str]) -> Path:
    """Parse what a person calls a file or folder; nothing need be there.

    A pathlib.Path of gs://b/x, which has folded the slashes into one, is understood too.
    Raises UserError for a scheme other than gs:// and s3://, a missing client, a bucket that cannot
    be reached, an empty name, or a NUL character, which no system takes.
    """
    if not os.fspath(name):
        raise UserError("the name of a file or folder is empty; write . for this folder")
    if "\0" in os.fspath(name):
        raise UserError(f"{os.fspath(name)!r}: a path may have no NUL character; remove it")
    found = re.fullmatch(r"(gs|s3):/+(.+)", os.fspath(name))
    if found is None:
        if other := re.match(r"(\w\w+):/", os.fspath(name)):
            raise UserError(f"{name}: {other[1]}: is not understood; only gs:// and s3:// are")
        return pathlib.Path(name)
    scheme, rest = found.groups()
    _check_bucket(scheme, rest.partition("/")[0])
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: Path) -> bool:
    """Whether the path is in object storage."""
    return not isinstance(path, pathlib.Path)


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe, socket or device, which might be read without end.

    Links are followed. What is not there, or cannot be asked, is told by whoever opens it.
    """
    if not isinstance(path, pathlib.Path):
        return
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a pipe, socket or device; give a regular file")


def make_folder(folder: Path) -> None:
    """Make the folder and its parents, unless they are there; UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made a folder ({e.strerror}); name another") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[pathlib.Path]:
    """Give an empty local file to write, which becomes `path`, whole, if the block raises nothing.

    Its name cannot be foreseen and it is new, so that no link that was planted there is followed;
    it has the permissions that the umask gives.
    """
    if isinstance(path, pathlib.Path):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            partial.touch(exist_ok=False)
        except OSError as e:  # of the folder: people do not know the other name
            raise OSError(e.errno, e.strerror, str(path)) from None
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / path.name
            yield file
            _copy(file, path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[pathlib.Path]:
    """Give the file, or a local copy of it while the block runs.

    Raises FileNotFoundError for a remote file that is missing; a local path is not looked at.
    """
    if isinstance(path, pathlib.Path):
        yield path
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / path.name
            path.copy(file)
            yield file


def local_copy(folder: Path) -> pathlib.Path:
    """Give the folder, or a local copy of all in it, which is removed when the process ends."""
    if isinstance(folder, pathlib.Path):
        return folder
    copy = pathlib.Path(tempfile.mkdtemp(prefix="cascade-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    _copy_down(folder, copy)
    return copy


def local_file(file: Path) -> pathlib.Path:
    """Give the file, or a local copy of it, which is removed when the process ends."""
    if isinstance(file, pathlib.Path):
        return file
    copy = pathlib.Path(tempfile.mkdtemp(prefix="cascade-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    file.copy(copy / file.name)
    return copy / file.name


def read_part(file: Path, start: int, size: int) -> bytes:
    """Read `size` bytes from byte `start`, here or by one ranged request; fewer at the end."""
    opened: Any
    with file.open("rb") as opened:
        if is_remote(file) and hasattr(opened, "fs"):  # whose read() fetches megabytes ahead
            return opened.fs.cat_file(opened.path, start, start + size)
        opened.seek(start)
        return opened.read(size)


def copy_folder(source: pathlib.Path, target: Path) -> None:
    """Copy all files under a local folder into `target`, over files of the same names.

    In each folder the files that describe it (.json) come after the rest, and config.json comes
    last, so a folder whose description (config.json, dataset_info.json) is there is whole.
    """

    def order(file: pathlib.Path) -> tuple[Any, ...]:
        return -len(file.parts), file.name == "config.json", file.suffix == ".json", file

    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=order):
        _copy(source / file, target / file.as_posix())


@contextlib.contextmanager
def telling_of_full_disks(out: str | os.PathLike[str]) -> Iterator[None]:
    """UserError for a disk that is full, of which writers of records tell in words alone."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        said = [os.strerror(code) for code in FULL if os.strerror(code) in str(e)]
        if not said:
            raise
        raise UserError(
            f"{os.fspath(out)}: cannot be written to ({said[0]}); make room, then run the same "
            "command again"
        ) from None


class WholeFolder:
    """A context manager: its block fills a hidden folder, which becomes `path` if nothing raises.

    The hidden folder is a neighbour of `path`. Where `path` is an empty folder already, which may
    be a mount, a link or `.`, it is a folder inside, whose content moves up at the end, config.json
    last. Where `path` is in object storage, it is a temporary folder here, which is copied there,
    config.json last. The permissions of `path` are those that the umask gives.
    Raises UserError where `path` holds files, cannot be written, or (naming the hidden folder,
    which is then kept) when what was made cannot be moved there.
    """

    def __init__(self, name: str | os.PathLike[str]):
        self.path = path(name)

    def __enter__(self) -> pathlib.Path:
        if self.path.exists() and not self._is_empty():
            raise UserError(f"{self.path} exists already; name a new or empty folder")
        if not isinstance(self.path, pathlib.Path):
            self._partial = pathlib.Path(tempfile.mkdtemp(prefix="cascade-"))
            return self._partial
        try:
            self._inside = self.path.is_dir()
            if self._inside:
                where, prefix = self.path.absolute(), PARTIAL
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                where, prefix = self.path.parent, f".{self.path.name}."
            # Not mkdtemp, whose folders are their owner's alone: this one becomes the final one.
            partial = where / f"{prefix}{secrets.token_hex(8)}"
            partial.mkdir()
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written there ({e.strerror})") from None
        self._partial = partial
        return partial

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            try:
                self._publish()
            except Exception as e:  # clients of object storage raise many kinds
                raise UserError(
                    f"{self.path}: what was made could not be moved there ({_reason(e)}); it is "
                    f"left in {self._partial}: move it from there"
                ) from e
        shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        if not isinstance(self.path, pathlib.Path):
            copy_folder(self._partial, self.path)
        elif self._inside:
            if not self._is_empty():
                raise FileExistsError(errno.ENOTEMPTY, "it is not empty any more")
            made = sorted(self._partial.iterdir(), key=lambda p: p.name == "config.json")
            for entry in made:
                os.replace(entry, self._partial.parent / entry.name)
        else:
            os.replace(self._partial, self.path)

    def _is_empty(self) -> bool:
        """Whether nothing is in it but what other writers, or killed ones, have begun."""
        return self.path.is_dir() and all(p.name.startswith(PARTIAL) for p in self.path.iterdir())


def write_json(path: Path, value: Any) -> None:
    """Write JSON values as an indented text file, whole or not at all, replacing what is there."""
    with writing(path) as file:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@functools.cache  # once a process
def _check_bucket(scheme: str, name: str) -> None:
    bucket = f"{scheme}://{name}"
    try:
        epath.Path(bucket).exists()
    except ImportError:
        raise UserError(
            f"{bucket}: needs {CLIENTS[scheme]}; pip install 'cascade-diffusion[storage]'"
        ) from None
    except Exception as e:  # clients let several libraries' errors through
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{bucket}: cannot be reached ({type(e).__name__}: {reason})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def _copy(source: pathlib.Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    epath.Path(source).copy(target, overwrite=True)


def _copy_down(source: epath.Path, target: pathlib.Path) -> None:
    for found in source.iterdir():
        if found.is_dir():
            (target / found.name).mkdir()
            _copy_down(found, target / found.name)
        else:
            found.copy(target / found.name)
