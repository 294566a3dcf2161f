"""Checksums beside files, in the file `SHA256SUMS` that `sha256sum -c` reads too.

They are written with every checkpoint and every model folder, and a file that no longer matches its
line is refused before its content is used: one flipped bit in weights draws a picture as well, only
a worse one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path

NAME = "SHA256SUMS"
"""The file: a line of 64 hexadecimal digits, two spaces and a file's name for each."""


def write(folder: Path, files: Sequence[Path]) -> None:
    """Write the checksums of these files, which are under the folder, into its SHA256SUMS."""
    files = sorted(files)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(digest, files))
    write_known(folder, {_relative(f, folder): d for d, f in zip(digests, files, strict=True)})


def write_known(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of files whose `digest` is known, by their names, whole or not at all."""
    lines = [f"{known}  {name}\n" for name, known in digests.items()]
    with paths.writing(folder / NAME) as file:
        file.write_text("".join(lines), encoding="utf-8")


def write_each(folder: Path) -> None:
    """Write a SHA256SUMS of its own into the folder and each below, so that each can be moved."""
    for inside in {file.parent for file in files_under(folder)}:
        write(inside, [p for p in inside.iterdir() if p.name != NAME and not p.is_dir()])


def files_under(folder: Path) -> list[Path]:
    """List the files in the folder and below, here or in object storage."""
    inside = sorted(folder.iterdir())
    below = (files_under(p) for p in inside if p.is_dir())
    return [*(p for p in inside if not p.is_dir()), *(file for part in below for file in part)]


def check(file: Path) -> None:
    """Refuse, with UserError, a file that differs from its line in the SHA256SUMS beside it.

    One that has no such line passes. It is read once, whole, for this.
    """
    sums = _listed(file.parent)
    if sums is None or file.name not in sums:
        return
    if digest(file) != sums[file.name]:
        raise UserError(
            f"{file}: damaged: it is not the file that was written, by its checksum; copy or "
            f"download it again (if you have changed it yourself, remove its line in {NAME})"
        )


def damage(folder: Path, inside: Sequence[str], *, part: int = 0, parts: int = 1) -> str | None:
    """Say which file of these folders in it is missing or differs from its line; None if none is.

    part, parts: only every parts-th file of those listed is looked at, from number `part`, so that
    several processes share the work. A folder without a SHA256SUMS has no damage that is known of.
    """
    try:
        sums = _listed(folder)
    except UserError as e:
        return str(e)
    names = [n for n in sums or () if n.partition("/")[0] in inside][part::parts]
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(lambda n: _found(folder / n), names), strict=True):
            if found is None:
                return f"{name} is missing"
            if sums and found != sums[name]:
                return f"{name} is not what was written, by its checksum"
    return None


def _listed(folder: Path) -> dict[str, str] | None:
    """The folder's checksums by name; None if it has none. UserError where they are damaged."""
    file = folder / NAME
    try:
        lines = file.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    sums = {}
    for line in lines:
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            raise UserError(f"{file}: damaged; copy the folder again, or remove it to go without")
        sums[found[2]] = found[1]
    return sums


def _found(file: Path) -> str | None:
    try:
        return digest(file)
    except FileNotFoundError:
        return None


def digest(file: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    opened: Any
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
