"""Parquet and Arrow files, row by row, by pyarrow, which is imported when one is opened."""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cascade.errors import UserError
from cascade.storage import paths

MOST_GROUP = 2**31
"""Bytes that a row group may have, for it is read whole."""
_TOLD = f"its row group has more than {MOST_GROUP} bytes in memory"
_ROWS = 256
"""Rows of a group that are read at once."""
MOST_KEPT = 2**28
"""Bytes of row groups that each process keeps from one example to the next."""
MOST_VALUES = 10**4
"""Values that a row may have in a column: a list of nulls takes no bytes, however long it is."""


class TooLarge(ValueError):
    """A row group that is larger in memory than MOST_GROUP."""


class Rows:
    """Random access to the rows of Parquet or Arrow files, of some columns, as dicts.

    A row of a Parquet file is read with its whole row group, so many small groups are better than
    few large ones. Arrow files are mapped into memory, and a row costs what it holds.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str]):
        """columns: those that are wanted; what no file has is left out.

        Raises UserError where a file is damaged, pyarrow is missing, or files differ in columns.
        """
        self._more: list[str] = []
        self._files, self.columns = list(files), ()
        """All columns that the files have."""
        counts: list[int] = []
        self._groups: list[tuple[int, int]] = []
        for number, file in enumerate(self._files):
            opened = _open(file)
            names = tuple(opened.names)
            if number and names != self.columns:
                raise UserError(
                    f"{file}: has the columns {', '.join(names)}, and {self._files[0]} "
                    f"{', '.join(self.columns)}; give files that are alike"
                )
            self.columns = names
            self._wanted = [name for name in dict.fromkeys(columns) if name in names]
            for group, (rows, size) in enumerate(opened.groups()):
                if not 0 <= rows <= opened.most:
                    raise UserError(
                        f"{file}: says that it has {rows} rows in {opened.most} bytes; it is "
                        "damaged, write it again"
                    )
                if size > MOST_GROUP:
                    raise UserError(
                        f"{file}: row group {group} has {size} bytes, and at most {MOST_GROUP} "
                        "are read at once; write it with smaller row groups"
                    )
                counts.append(rows)
                self._groups.append((number, group))
        self._ends = list(itertools.accumulate(counts))
        self._begin()

    def _begin(self) -> None:
        self._lock, self._size = threading.Lock(), 0
        self._opened: dict[int, Any] = {}
        self._too_large: set[int] = set()
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_size", "_opened", "_kept", "_too_large")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> dict[str, Any] | str:
        """The row as a dict, or why it cannot be had."""
        group = bisect.bisect_right(self._ends, number)
        start = self._ends[group - 1] if group else 0
        try:
            table = self._table(group)
            row = {name: _bounded(table[name][number - start]).as_py() for name in self._wanted}
            for name in self._more:
                with contextlib.suppress(ValueError):
                    row[name] = _bounded(table[name][number - start]).as_py()
            return row
        except Exception as e:  # pyarrow's own, for each way to be damaged
            return f"unreadable row ({_line(e)})"

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        return ((number, self[number]) for number in range(len(self)))

    def only(self, columns: Sequence[str]) -> Rows:
        """The same rows with fewer columns."""
        other = object.__new__(Rows)
        other.__setstate__(self.__getstate__())
        other._wanted = [name for name in self._wanted if name in columns]
        return other

    def whole(self) -> Rows:
        """The same rows with all columns; of those that were not wanted, without what is long."""
        other = object.__new__(Rows)
        other.__setstate__(self.__getstate__())
        other._more = [name for name in self.columns if name not in self._wanted]
        return other

    def _table(self, group: int) -> Any:
        """The columns that are wanted of a group of rows."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            if group in self._too_large:  # to find that out again takes as long
                raise TooLarge(_TOLD)
            file, inside = self._groups[group]
            if file not in self._opened:
                self._opened[file] = _open(self._files[file])
            try:
                table = self._opened[file].read(inside, [*self._wanted, *self._more])
            except TooLarge:
                self._too_large.add(group)
                raise
            self._kept[group] = table
            self._size += table.nbytes
            while self._size > MOST_KEPT and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].nbytes
            return table


class _Parquet:
    def __init__(self, file: str):
        import pyarrow.parquet

        path = paths.path(file)
        found: Any = path.stat()
        self.most = found.length if paths.is_remote(path) else found.st_size
        """How many rows it can have: each has a picture, or the name of one."""
        source: Any = path.open("rb") if paths.is_remote(path) else file
        self._file = pyarrow.parquet.ParquetFile(source)
        self.names = self._file.schema_arrow.names

    def groups(self) -> Iterator[tuple[int, int]]:
        """The rows and bytes of each group."""
        # Not of each column: pyarrow ends the process where a column's statistics are damaged.
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            yield group.num_rows, group.total_byte_size

    def read(self, group: int, columns: Sequence[str]) -> Any:
        import pyarrow

        # A value that is said once may stand in every row: what a group says of its size is less.
        found: dict[str, Any] = {"row_groups": [group], "columns": list(columns)}
        parts, size = [], 0
        for part in self._file.iter_batches(_ROWS, use_threads=False, **found):
            size += part.nbytes
            if size > MOST_GROUP:
                raise TooLarge(_TOLD)
            parts.append(part)
        table = pyarrow.Table.from_batches(parts)
        table.validate(full=True)
        return table


class _Arrow:
    def __init__(self, file: str):
        import pyarrow.ipc

        mapped = pyarrow.memory_map(file)
        # The random access file is the stream after its name, and a footer that is not needed.
        start = 8 if mapped.read(6) == b"ARROW1" else 0
        mapped.seek(start)
        if any(map(_is_compressed, pyarrow.ipc.MessageReader.open_stream(mapped))):
            raise UserError(
                f"{file}: its columns are compressed, and Arrow unpacks all of them at once; save "
                "it without compression, as `datasets` does, or as Parquet"
            )
        mapped.seek(start)
        self._table = pyarrow.ipc.open_stream(mapped).read_all()
        self.names, self.most = self._table.column_names, mapped.size()

    def groups(self) -> Iterator[tuple[int, int]]:
        yield self._table.num_rows, 0

    def read(self, group: int, columns: Sequence[str]) -> Any:
        table = self._table.select(list(columns))
        table.validate(full=True)  # offsets of a stranger may lead anywhere
        return _Mapped(table)


class _Mapped(dict):
    """Columns of a mapped file, which take no memory of their own."""

    nbytes = 0

    def __init__(self, table: Any):
        super().__init__(zip(table.column_names, table.columns, strict=True))


_DAMAGED = OSError, ValueError, OverflowError, MemoryError, struct.error


def _is_compressed(message: Any) -> bool:
    """Whether a message of an Arrow stream has columns that are to be unpacked."""
    if message.type not in ("record batch", "dictionary"):
        return False
    content = message.metadata.to_pybytes()
    header = _of_table(content, struct.unpack_from("<I", content)[0], 2)
    if message.type == "dictionary":
        header = _of_table(content, header, 1)
    return _of_table(content, header, 3) > 0


def _of_table(content: bytes, table: int, field: int) -> int:
    """Where a flatbuffer has a field, itself a table, of a table; 0 if it has none.

    pyarrow has verified the message, and gives no access to it. The numbers of fields are those of
    Arrow's format/Message.fbs.
    """
    fields = table - struct.unpack_from("<i", content, table)[0]
    place = 4 + 2 * field
    if place >= struct.unpack_from("<H", content, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", content, fields + place)[0]
    return table + offset + struct.unpack_from("<I", content, table + offset)[0] if offset else 0


def _bounded(scalar: Any) -> Any:
    """The value of a row. Raises ValueError where it has more than MOST_VALUES parts."""
    import pyarrow

    rest, count = [scalar], 0
    while rest:
        one = rest.pop()
        if isinstance(one, pyarrow.ListScalar) and one.is_valid:
            count += len(one.values)
            if count > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values in a column")
            rest += one.values
        elif isinstance(one, pyarrow.StructScalar) and one.is_valid:
            rest += one.values()
    return scalar


def _open(file: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file}: needs pyarrow; pip install 'cascade-diffusion[data]'") from None
    path = paths.path(file)
    paths.check_regular(path)
    try:
        return _Arrow(file) if file.endswith(".arrow") else _Parquet(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UserError:  # which is a ValueError too
        raise
    except (pyarrow.ArrowException, *_DAMAGED) as e:
        raise UserError(
            f"{file}: cannot be read ({_line(e)}); it is damaged or of another format"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
