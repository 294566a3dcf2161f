"""Weights by name: the small cascade that ships with the package."""

from __future__ import annotations

import os
import pathlib

from cascade import paths
from cascade.errors import UserError

HERE = pathlib.Path(__file__).parent


def find(name_or_dir: str | os.PathLike[str]) -> pathlib.Path:
    """The model folder meant by a shipped name (`scenes`) or a path. A path that exists wins.

    Of one in object storage, a local copy.
    """
    folder = paths.path(name_or_dir)
    shipped = sorted(p.parent.name for p in HERE.glob("*/config.json"))
    if not folder.exists() and str(name_or_dir) in shipped:
        return HERE / str(name_or_dir)
    if not folder.exists():
        raise UserError(
            f"model {name_or_dir}: no such folder, and not one that ships ({', '.join(shipped)})"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {folder}: holds no config.json; give a folder that `cascade export` wrote"
        )
    return paths.local_copy(folder)
