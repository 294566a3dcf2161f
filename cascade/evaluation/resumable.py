"""A folder of results whose making may be stopped and gone on with."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from cascade.devices import distributed
from cascade.errors import UserError
from cascade.storage import lock, paths

NAME = "unfinished-eval"
"""The folder inside, which holds what is done so far and is gone at the end."""
WRITTEN = ("results.json", "sheet.png", "clip.png", "drawn")
"""What commands write at the end, and again if they were stopped before the folder was gone."""
_BEGUN = rf"\.({'|'.join(map(re.escape, (*WRITTEN, lock.NAME)))})\.[0-9a-f]{{16}}\.partial"


@contextlib.contextmanager
def folder(out: Any, held_by: str) -> Iterator[tuple[paths.Path, paths.Path]]:
    """While entered, this program alone works in a folder: (the folder, what is unfinished in it).

    What lies in the latter stays when the block raises or the process is killed, and is removed
    when the block ends. All processes of the program call it. held_by: what works there, for
    people. Raises UserError for a folder that holds anything else, or where another works, and when
    its disk is full.
    """
    where = paths.path(out)
    inside = where / NAME
    with contextlib.ExitStack() as stack:
        distributed.all_or_none(lambda: _begin(where, inside, held_by, stack))
        stack.enter_context(paths.telling_of_full_disks(where))
        yield where, inside
        if jax.process_index() == 0:
            if isinstance(inside, paths.pathlib.Path):
                shutil.rmtree(inside)
            else:
                inside.rmtree()


def _begin(
    where: paths.Path, inside: paths.Path, held_by: str, stack: contextlib.ExitStack
) -> None:
    _check(where, inside)  # before anything is written there
    if not where.exists():
        stack.callback(_leave_no_empty, where)
    paths.make_folder(where)
    way_out = "name another --out"
    stack.enter_context(lock.Lock(where, held_by=held_by, way_out=way_out))
    _check(where, inside)  # another may have come to its end since
    for left in where.iterdir():
        if re.fullmatch(_BEGUN, left.name):
            left.unlink()
    paths.make_folder(inside)
    stack.callback(_leave_no_empty, inside)


def _check(where: paths.Path, inside: paths.Path) -> None:
    """UserError for a folder in which this command cannot begin, nor go on."""
    if where.exists() and not where.is_dir():
        raise UserError(f"--out {where}: is a file; name a folder")
    linked = isinstance(inside, paths.pathlib.Path) and inside.is_symlink()
    own = {lock.NAME, *((NAME, *WRITTEN) if inside.is_dir() and not linked else ())}
    there = sorted(p.name for p in where.iterdir()) if where.exists() else []
    others = [n for n in there if n not in own and not re.fullmatch(_BEGUN, n)]
    if others:
        raise UserError(
            f"--out {where}: holds {others[0]}; name a new or empty folder, or one where this "
            "command was stopped"
        )


def _leave_no_empty(folder: paths.Path) -> None:
    """Where a mistake ended the command before anything was made, nothing is left to go on with."""
    if isinstance(folder, paths.pathlib.Path):
        with contextlib.suppress(OSError):  # it holds something, or is gone
            folder.rmdir()
