"""Weights by name: the small cascade that ships with the package."""

from __future__ import annotations

from pathlib import Path

from cascade.errors import UserError

HERE = Path(__file__).parent


def find(name_or_dir: str | Path) -> Path:
    """The model folder meant by a shipped name (`scenes`) or a path. A path that exists wins."""
    folder = Path(name_or_dir)
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
    return folder
