"""What `cascade sample` leaves in its folder: pictures, what made them, a sheet of all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.errors import UserError
from cascade.storage import paths

if TYPE_CHECKING:
    from cascade.runner.picture import Picture

MOST_IN_GRID = 1024
"""grid.png shows at most so many pictures, the first ones."""


def folder_of(name: Path) -> paths.Path:
    """The folder that a person names to write into, which need not be there.

    Raises UserError for a file, and where nothing can be written.
    """
    out = paths.path(name)
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not isinstance(out, Path):
        return out
    parent = next(p for p in [out, *out.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out}: cannot be written there")
    try:  # some folders, such as /proc, say that they can and cannot
        os.rmdir(tempfile.mkdtemp(prefix=".cascade-", dir=parent))
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written there ({e.strerror})") from None
    return out


def next_number(folder: paths.Path) -> int:
    """One past the largest picture number in a folder; 0 in a new one."""
    if not folder.is_dir():
        return 0
    found = (re.match(r"(\d{4,})(_\w+\.png|\.json|\.gif)$", p.name) for p in folder.iterdir())
    return max((int(m[1]) for m in found if m), default=-1) + 1


def write(
    picture: Picture,
    folder: paths.Path,
    number: int,
    record: Mapping[str, Any],
    path: str | None = None,
) -> dict[str, Any]:
    """Write a picture under its number: NUMBER_SIDE.png of every side, and NUMBER.json.

    record: JSON values for that file beside the picture's own. path: "gif" writes NUMBER.gif of its
    frames, "strip" NUMBER_path.png. Returns what a line tells of it, as JSON values. Raises
    UserError where a picture of that number has come there.
    """
    name = f"{number:04d}"
    if (folder / f"{name}.json").exists():
        raise UserError(
            f"--out {folder}: picture {name} has come there since this command started; give every "
            "command that draws at the same time a folder of its own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for side in picture.images:
        files[str(side)] = str(folder / f"{name}_{side}.png")
        picture.save(files[str(side)], side)
    if path == "gif":
        files["path"] = str(folder / f"{name}.gif")
        picture.save_gif(files["path"])
    elif path == "strip":
        files["path"] = str(folder / f"{name}_path.png")
        picture.save_strip(files["path"])
    names = ("cascade-diffusion", "jax", "jaxlib", "flax")
    record = {**picture.metadata, **record, "versions": {n: version(n) for n in names}}
    with paths.writing(folder / f"{name}.json") as file:
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"picture": name, "prompt": picture.prompt, "seed": picture.seed, "files": files}


def write_grid(folder: paths.Path, first: int, prompts: Sequence[str], num: int, side: int) -> None:
    """Write grid.png of the pictures from number `first` on, `num` of each prompt in turn.

    The pictures of one prompt are together, with the prompt under them if there are several. side:
    of which files.
    """
    import numpy as np

    from cascade import images

    shown = prompts[: max(1, MOST_IN_GRID // num)]
    each = min(num, MOST_IN_GRID)

    def of(prompt: int) -> list[Any]:
        numbers = range(first + prompt * num, first + prompt * num + each)
        files = [folder / f"{number:04d}_{side}.png" for number in numbers]
        return [np.asarray(images.load_image(file)) for file in files]

    if len(prompts) == 1:
        images.save_png(folder / "grid.png", images.grid(of(0)))
        return
    blocks = [images.grid(of(i), columns=min(num, 8)) for i in range(len(shown))]
    blocks = images.captioned(blocks, shown)
    sheet = images.grid(blocks, columns=None if num == 1 else 1, gap=8)
    images.save_png(folder / "grid.png", sheet)
