"""Model folders: by path, or by the name of one that ships with the package."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from cascade.config import read_json
from cascade.errors import UserError
from cascade.storage import paths

HERE = pathlib.Path(__file__).parents[1] / "pretrained"


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


def described(folder: pathlib.Path) -> dict[str, Any]:
    """What a model folder's config.json says: `stages`, and perhaps `text_encoder`, `max_tokens`,
    `captions` and `known_words`.

    Raises UserError unless it is a cascade's, whose stages are names of folders in this one.
    """
    file = folder / "config.json"
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != "cascade":
        raise UserError(f"{file}: not a cascade's; give a folder of `cascade export`")
    names = about.get("stages")
    if not isinstance(names, list) or not names or not all(map(_is_plain_name, names)):
        raise UserError(f"{file}: stages must list folder names, got {names!r}")
    tokens = about.get("max_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise UserError(f"{file}: max_tokens must be 1 or more, got {tokens}")
    if not isinstance(about.get("known_words", []), list):
        raise UserError(f"{file}: known_words must be a list, got {about['known_words']!r}")
    return about


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
