"""A folder of results whose making may be stopped and gone on with."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from cascade.devices import distributed
from cascade.errors import UserError
from cascade.storage import lock, paths

NAME = "unfinished"
"""The folder inside, which holds what is done so far and is gone at the end."""


@contextlib.contextmanager
def folder(out: Any, held_by: str) -> Iterator[tuple[paths.Path, paths.Path]]:
    """While entered, this program alone works in a folder: (the folder, what is unfinished in it).

    What lies in the latter stays when the block raises or the process is killed, and is removed
    when the block ends. All processes of the program call it. held_by: what works there, for
    people. Raises UserError for a folder that holds anything else, or where another works.
    """
    where = paths.path(out)
    inside = where / NAME
    with contextlib.ExitStack() as stack:
        distributed.all_or_none(lambda: _begin(where, inside, held_by, stack))
        yield where, inside
        if jax.process_index() == 0:
            if isinstance(inside, paths.pathlib.Path):
                shutil.rmtree(inside)
            else:
                inside.rmtree()


def _begin(
    where: paths.Path, inside: paths.Path, held_by: str, stack: contextlib.ExitStack
) -> None:
    if where.exists() and not where.is_dir():
        raise UserError(f"--out {where}: is a file; name a folder")
    there = sorted(p.name for p in where.iterdir()) if where.exists() else []
    others = [n for n in there if n not in (NAME, lock.NAME) and not n.startswith(paths.PARTIAL)]
    if others:
        raise UserError(
            f"--out {where}: holds {others[0]}; name a new or empty folder, or one where this "
            "command was stopped"
        )
    paths.make_folder(inside)
    way_out = "name another --out"
    stack.enter_context(lock.Lock(where, held_by=held_by, way_out=way_out))
