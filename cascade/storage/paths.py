"""Folders on this machine and in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME) alike.

A local path is a pathlib.Path; one in object storage is an etils.epath.Path, which has the same
methods as far as storage can do them (no appending, no renaming that is whole). Orbax and
TensorStore write arrays to both. Libraries that only know local files are given one here, which is
copied: `writing`, `reading`, `local_copy`, `copy_folder`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from cascade.errors import UserError

Path = pathlib.Path | epath.Path
CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}


def path(name: str | os.PathLike[str]) -> Path:
    """What a person calls a file or folder. UserError for storage that is not understood, or whose
    client is not installed.

    A pathlib.Path of gs://b/x, which has folded the slashes into one, is understood too.
    """
    found = re.fullmatch(r"(gs|s3):/+(.+)", os.fspath(name))
    if found is None:
        if other := re.match(r"(\w\w+):/", os.fspath(name)):
            raise UserError(f"{name}: {other[1]}: is not understood; only gs:// and s3:// are")
        return pathlib.Path(name)
    scheme, rest = found.groups()
    _check_bucket(scheme, rest.partition("/")[0])
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: Path) -> bool:
    return not isinstance(path, pathlib.Path)


def make_folder(folder: Path) -> None:
    """With its parents, unless it is there. UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made a folder ({e.strerror}); name another") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[pathlib.Path]:
    """A local file to write, which becomes `path`, whole, if all goes well."""
    if isinstance(path, pathlib.Path):
        partial = path.with_name(f".{path.name}.partial")
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
    """The file, or a local copy of it. FileNotFoundError if there is none."""
    if isinstance(path, pathlib.Path):
        yield path
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / path.name
            path.copy(file)
            yield file


def local_copy(folder: Path) -> pathlib.Path:
    """The folder, or a local copy of all in it, which is removed when the process ends."""
    if isinstance(folder, pathlib.Path):
        return folder
    copy = pathlib.Path(tempfile.mkdtemp(prefix="cascade-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    _copy_down(folder, copy)
    return copy


def copy_folder(source: pathlib.Path, target: Path) -> None:
    """All files under a local folder into `target`; of each folder those that describe it (.json)
    after the rest, config.json last of all.

    So a folder whose description (config.json, dataset_info.json) is there is whole.
    """

    def order(file: pathlib.Path) -> tuple[Any, ...]:
        return -len(file.parts), file.name == "config.json", file.suffix == ".json", file

    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=order):
        _copy(source / file, target / file.as_posix())


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
