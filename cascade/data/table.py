"""Lists of captions, whose rows name picture files: JSON lines, CSV, TSV, Parquet."""

from __future__ import annotations

import array
import collections
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cascade.data import parquet
from cascade.data.pictures import (
    MOST_CAPTION,
    SIZES,
    Found,
    PictureData,
    PictureSource,
    captions_in,
    told,
)
from cascade.data.source import BadRecord, Source, hashes_of
from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableData(PictureData):
    """A list of captions whose rows name picture files, relative to the list's folder.

    It is JSON lines (.jsonl), CSV or TSV with the names of columns in the first row (.csv, .tsv),
    or Parquet (.parquet), in UTF-8. Pictures lie in the list's folder or below. The other columns
    are what filters see.
    """

    path: str
    """The list, or a folder that holds one, here or in object storage (gs://BUCKET/NAME,
    s3://BUCKET/NAME)."""
    file_column: str = "file"
    """The column that names the picture."""
    caption_column: str = "caption"
    """The column that holds the caption; in JSON lines and Parquet it may be a list of several, of
    which one is drawn each time."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the rows; see `Data.open`."""
        return _TableSource(self, resolution)


_KINDS = (".jsonl", ".csv", ".tsv", ".parquet")


class _TableSource(PictureSource):
    """The place of each row in its file is kept, and a row is read again with its picture."""

    def __init__(self, config: TableData, resolution: int):
        super().__init__(config, resolution)
        file = _table_in(paths.path(config.path))
        self._folder, self._name = file.parent, file.name
        local = paths.local_file(file)
        columns = config.file_column, config.caption_column, *config.filters.names
        kind = file.suffix.lower()
        if kind == ".parquet":
            self._rows: Any = parquet.Rows([str(local)], (*columns, *SIZES))
            _check_columns(columns, self._rows.columns, file)
        elif kind == ".jsonl":
            self._rows = _Lines(local)
        else:
            separator = "\t" if kind == ".tsv" else ","
            self._rows = _Lines(local, separator)
            _check_columns(columns, self._rows.columns, file)
        self.left_out, kept, hashes = [], array.array("q"), array.array("I")
        filtered = collections.Counter[str]()
        names: set[str] = set()
        for number, row in self._rows:
            try:
                found = self._found(number, row)
            except BadRecord as e:
                self.left_out.append(e)
                names.update(row if isinstance(row, dict) and len(names) < 100 else ())
                continue
            filters = config.filters
            reason = filters.passing(found.captions)[1] or filters.reason_of_values(found.values)
            filtered[reason] += bool(reason)
            if not reason:
                kept.append(number)
                hashes.append(int(hashes_of([row[config.file_column]])[0]))
        self._kept, self.filtered = np.array(kept, np.int64), +filtered
        self._hashes = np.array(hashes, np.uint32)
        if not kept and not filtered and self.left_out and names:
            _check_columns(columns[:2], sorted(names), file)
        told(self, f"table {file}")

    def __len__(self) -> int:
        return len(self._kept)

    def read_all_columns(self):
        if isinstance(self._rows, parquet.Rows):  # others have all of them
            self._rows = self._rows.whole()

    def hashes(self):
        return self._hashes

    def found(self, index: int) -> Found:
        number = int(self._kept[index])
        try:
            return self._found(number, self._rows[number], reading=True)
        except OSError as e:
            raise BadRecord(
                f"{self._folder / self._name}: cannot be read ({e.strerror or e})",
                *(self._key(number), "unreadable table"),
            ) from None

    def _key(self, number: int) -> str:
        return f"{self._name}, row {number + 1}"

    def _found(self, number: int, row: Any, reading: bool = False) -> Found:
        key = self._key(number)
        where = f"{self._folder / self._name}, row {number + 1}"
        if isinstance(row, str):
            raise BadRecord(f"{where}: {row}", key, row)
        for column in (self.config.file_column, self.config.caption_column):
            if column not in row:
                raise BadRecord(
                    f"{where}: has no {column!r}, only {', '.join(row) or 'nothing'}",
                    *(key, f"row without {column}"),
                )
        name = row[self.config.file_column]
        if not isinstance(name, str) or not name or "\0" in name:
            raise BadRecord(f"{where}: names no file", key, "row that names no file")
        if name.startswith("/") or ".." in name.split("/") or "://" in name:
            outside = f"{where}: {name} is outside the folder {self._folder}; put the picture there"
            if reading:  # the list has changed since
                raise BadRecord(outside, key, "row that names a file outside")
            raise UserError(outside)
        captions = captions_in(row[self.config.caption_column], where, key)
        path = self._folder / name
        if reading:
            key = name
            if not _is_within(path, self._folder):
                raise BadRecord(
                    f"{where}: {name} is a link that leads outside the folder; copy it there",
                    *(key, "link that leads outside"),
                )
        return Found(key, where, path, captions, row)


class _Lines:
    """The rows of a text file by number: a dict, or why there is none."""

    columns: Sequence[str] = ()

    def __init__(self, file: pathlib.Path, separator: str = ""):
        """separator: between the columns of a CSV; empty is for JSON lines."""
        paths.check_regular(file)
        self._file, self._separator = str(file), separator
        if separator:
            with file.open("rb") as opened:
                _, first = next(_records(opened, separator), (0, []))
            if isinstance(first, str) or not first or len(set(first)) < len(first):
                raise UserError(
                    f"table {file}: its first row must be the names of its columns, each once"
                )
            self.columns = first
        self._at = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """All rows, in order; from then on each can be had by its number."""
        at = array.array("q")
        with open(self._file, "rb") as file:
            records = _records(file, self._separator) if self._separator else _json_lines(file)
            if self._separator:
                next(records, None)
            for start, row in records:
                at.append(start)
                yield len(at) - 1, self._dict(row)
            at.append(file.tell())
        self._at = np.array(at, np.int64)

    def __getitem__(self, number: int) -> Any:
        start, end = int(self._at[number]), int(self._at[number + 1])
        content = io.BytesIO(paths.read_part(pathlib.Path(self._file), start, end - start))
        records = _records(content, self._separator) if self._separator else _json_lines(content)
        return self._dict(next(records, (0, "row that is gone"))[1])

    def _dict(self, row: Any) -> Any:
        if isinstance(row, str):
            return row
        if not self._separator:
            return _json_row(row)
        if len(row) != len(self.columns):
            return "row of more or fewer columns than the first"
        return dict(zip(self.columns, row, strict=True))


def _json_row(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return "line that is no JSON"
    return row if isinstance(row, dict) else "line that is no JSON object"


def _json_lines(file: Any) -> Iterator[tuple[int, bytes | str]]:
    """(first byte, line) of each line that is not empty; a str if it is too long."""
    start = 0
    while line := file.readline(MOST_CAPTION + 2):
        whole = len(line)
        long = len(line) > MOST_CAPTION
        while len(line) > MOST_CAPTION and not line.endswith(b"\n"):
            line = file.readline(MOST_CAPTION + 2)
            whole += len(line)
        content = line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line
        if long:
            yield start, "row that is too long"
        elif content.strip():
            yield start, content
        start += whole


def _records(file: Any, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first byte, fields) of each row of a CSV that is not empty; a str if it is damaged."""
    start = at = 0
    long = False

    def lines() -> Iterator[str]:
        nonlocal at, long
        while line := file.readline(MOST_CAPTION + 2):
            content = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            at += len(line)
            while len(line) > MOST_CAPTION and not line.endswith(b"\n"):
                long, line = True, file.readline(MOST_CAPTION + 2)
                at += len(line)
            yield content.decode(errors="surrogateescape")

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield start, "row that is no CSV, or too long"
            start, long = at, False
            continue
        if any(not _is_utf8(field) for field in row):
            yield start, "row that is not UTF-8"
        elif long or sum(map(len, row)) > MOST_CAPTION:
            yield start, "row that is too long"
        elif row:
            yield start, row
        start, long = at, False


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _table_in(path: Path) -> Path:
    """The list that a path means. Raises UserError unless it is one."""
    if path.is_dir():
        found = sorted(f for f in path.iterdir() if f.suffix.lower() in _KINDS)
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(
                f"table {path}: must be a list ({', '.join(_KINDS)}) or hold just one, found "
                f"{names}; name the file"
            )
        return found[0]
    if path.suffix.lower() not in _KINDS:
        raise UserError(
            f"table {path}: must be a list ({', '.join(_KINDS)}) or a folder that holds one"
        )
    if not path.exists():
        raise UserError(f"table {path}: no such file; give a list of pictures and captions")
    return path


def _check_columns(wanted: Sequence[str], known: Sequence[str], file: Path) -> None:
    for column in wanted:
        if column not in known:
            raise UserError(
                f"table {file}: has no column {column!r}; its columns are {', '.join(known)}; "
                "name them with file_column and caption_column"
            )


def _is_within(file: Path, folder: Path) -> bool:
    if not isinstance(file, pathlib.Path) or not isinstance(folder, pathlib.Path):
        return True  # by its name, as there are no links
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself, a name that is too long: told on opening
        return True
