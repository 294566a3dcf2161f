"""Datasets of Hugging Face on disk, with their pictures inside, read by pyarrow alone."""

from __future__ import annotations

import array
import collections
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from cascade.config import read_json
from cascade.data import parquet
from cascade.data.pictures import (
    MOST_PICTURE,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFData(PictureData):
    """What `datasets` writes by save_to_disk or to_parquet, read without it and without its code.

    Pictures are bytes in the files: a column of the feature Image, whose bytes are embedded, or of
    bytes. The other columns are what filters see. A row of Parquet is read with its row group, of
    which 256 MiB stay in memory: a large dataset is faster from save_to_disk, or after
    `cascade data convert`.
    """

    path: str
    """A folder of save_to_disk, a Parquet file, or a folder of those, here or in object storage
    (gs://BUCKET/NAME, s3://BUCKET/NAME), of which save_to_disk's is first copied here."""
    split: str = "train"
    """The split, where a folder of save_to_disk holds several, or names of Parquet files begin with
    theirs, as train-00000-of-00002.parquet; else it is without effect."""
    image_column: str = "image"
    """The column that holds pictures."""
    caption_column: str = "text"
    """The column that holds the caption, or a list of several, of which one is drawn each time."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the files; see `Data.open`."""
        return _HFSource(self, resolution)


class _HFSource(PictureSource):
    def __init__(self, config: HFData, resolution: int):
        super().__init__(config, resolution)
        files = _files(config)
        beside = config.caption_column, *config.filters.names, *SIZES
        self._rows = parquet.Rows(files, (config.image_column, *beside))
        for column in (config.image_column, config.caption_column, *config.filters.names):
            if column not in self._rows.columns:
                raise UserError(
                    f"dataset {config.path}: has no column {column!r}; its columns are "
                    f"{', '.join(self._rows.columns)}; name them with image_column and "
                    "caption_column"
                )
        self._kept: np.ndarray | None = None
        if config.filters.any:
            self._filter(beside)
        told(self, f"dataset {config.path}")

    def __len__(self) -> int:
        return len(self._rows if self._kept is None else self._kept)

    def read_all_columns(self):
        self._rows = self._rows.whole()

    def hashes(self):
        return super().hashes() if self._kept is None else hashes_of(map(str, self._kept))

    def found(self, index: int) -> Found:
        number = index if self._kept is None else int(self._kept[index])
        where, key = f"dataset {self.config.path}, row {number}", f"row {number}"
        row = self._rows[number]
        if isinstance(row, str):
            raise BadRecord(f"{where}: {row}", key, "unreadable row")
        captions = captions_in(row[self.config.caption_column], where, key)
        picture = row.pop(self.config.image_column)
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if content is None and isinstance(picture, dict) and picture.get("path"):
            raise BadRecord(
                f"{where}: its picture is not in the dataset but in the file {picture['path']}; "
                "save it with embed_external_files=True",
                *(key, "whose picture is elsewhere"),
            )
        if not isinstance(content, bytes) or not 1 <= len(content) <= MOST_PICTURE:
            raise BadRecord(
                f"{where}: its picture must be 1 to {MOST_PICTURE} bytes, got "
                f"{len(content) if isinstance(content, bytes) else type(content).__name__}",
                *(key, "without a picture"),
            )
        return Found(key, where, content, captions, row)

    def _filter(self, columns: Any) -> None:
        kept, filtered = array.array("q"), collections.Counter[str]()
        filters, rows = self.config.filters, self._rows.only(columns)
        for number, row in rows:
            reason = ""
            if isinstance(row, dict):  # others are told when they are read
                value = row[self.config.caption_column]
                try:
                    reason = filters.passing(captions_in(value, "", ""))[1]
                except BadRecord:
                    reason = ""
                reason = reason or filters.reason_of_values(row)
            filtered[reason] += bool(reason)
            if not reason:
                kept.append(number)
        self._kept, self.filtered = np.array(kept, np.int64), +filtered


def _files(config: HFData) -> list[str]:
    """The files of the dataset. Raises UserError where there are none."""
    path = paths.path(config.path)
    if not path.exists():
        raise UserError(f"dataset {path}: no such file or folder; give what `datasets` has written")
    if not path.is_dir():
        return [str(path)]
    if (path / "dataset_dict.json").exists():
        known = read_json(path / "dataset_dict.json")
        splits = known.get("splits") if isinstance(known, dict) else None
        if not isinstance(splits, list) or config.split not in splits:
            named = ", ".join(map(str, splits)) if isinstance(splits, list) else "none"
            raise UserError(
                f"dataset {path}: has no split {config.split!r}; its splits are {named}"
            )
        if not re.fullmatch(r"[\w.-]+", config.split) or set(config.split) == {"."}:
            raise UserError(f"dataset {path}: {config.split!r} is no name of a split")
        path = path / config.split
    if (path / "state.json").exists():
        return _saved(path)
    found = sorted(file for file in path.iterdir() if file.name.endswith(".parquet"))
    named = [file for file in found if re.match(rf"{re.escape(config.split)}[-.]", file.name)]
    if not found:
        raise UserError(
            f"dataset {path}: holds no *.parquet files, and no state.json of save_to_disk; give "
            "the folder that does"
        )
    return [str(file) for file in named or found]


def _saved(folder: paths.Path) -> list[str]:
    """The files of a folder that save_to_disk has written, in their order."""
    local: pathlib.Path = paths.local_copy(folder)
    state: Any = read_json(local / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"dataset {folder}: its state.json lists no files; save the dataset again")
    names = [str(one.get("filename") if isinstance(one, dict) else one) for one in listed]
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.arrow", name):
            raise UserError(
                f"dataset {folder}: its state.json lists {name!r}, which is no *.arrow file of "
                "that folder; save the dataset again"
            )
        file = local / name
        if file.is_symlink() and not file.resolve().is_relative_to(local.resolve()):
            raise UserError(f"dataset {folder}: {name} is a link that leads outside; copy it there")
    return [str(local / name) for name in names]
