"""Repositories of the Hugging Face hub: their names, what is downloaded of them, and its digests.

A name is OWNER/NAME, and at the end @REVISION where it is not to be the newest: a branch, a tag or
a commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError

REVISION = r"(@\w(?!\S*\.\.)[\w./-]*)?"
"""A regular expression of what a name may end with."""


def download(name: str, wanted: Sequence[str]) -> Path:
    """Give the folder with those files of a repository, downloaded where the cache lacks them.

    wanted: patterns of the files' names; pickles (.bin) are left out. Raises what the client does.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    folder = huggingface_hub.snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=list(wanted),
        ignore_patterns=["*.bin"],
    )
    return Path(folder)


def cached(name: str, wanted: Sequence[str]) -> Path | None:
    """Give the folder that `download` gave before; None if the cache has none. The hub is not
    asked."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(wanted),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(folder)


def commit(folder: Path) -> str | None:
    """Tell which commit a folder that `download` gave is of: the cache calls it so."""
    known = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if known else None


POINTER = b"version https://git-lfs.github.com/spec/"
"""What a clone has in place of a large file begins with, where git-lfs did not fetch the file."""


def check(file: Path) -> None:
    """Check that a file is none of git-lfs's pointers, and one in the hub's cache against its
    digest, by which the cache calls large files.

    Every other file passes. Raises UserError for one that is not what was published.
    """
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{file}: is git-lfs's pointer to the file, not the file; run `git lfs pull` "
                    "in its repository, or download it again"
                )
    if not file.is_symlink():
        return
    blob = file.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    try:
        with blob.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        found = "no file"
    if found != blob.name:
        raise UserError(
            f"{file}: is not what the Hugging Face hub published (its SHA-256 must be {blob.name}, "
            f"got {found}); remove {blob} and start again, which downloads it anew"
        )
