"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from cascade.config import read_json
from cascade.data.pictures import Found, PictureData, PictureSource
from cascade.data.source import BadRecord, Source
from cascade.errors import UserError
from cascade.storage import paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSData(PictureData):
    """A prepared TensorFlow Datasets dataset in ArrayRecord files, read without TensorFlow.

    Pictures are cropped to their central square.
    """

    name: str
    """The dataset as in tfds.builder, e.g. "scenes"."""
    data_dir: str
    """The folder that holds NAME/VERSION. From object storage (gs://BUCKET/NAME, s3://BUCKET/NAME)
    all of it is first copied here, since ArrayRecord reads local files."""
    split: str = "train"
    """The split, or a part of one, as "train[:90%]"."""
    image: str = "image"
    """The name of the feature that holds pictures."""
    caption: str = "caption"
    """The name of the feature that holds captions."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of the files; see `Data.open`."""
        return _TFDSSource(self, resolution)


class _TFDSSource(PictureSource):
    def __init__(self, config: TFDSData, resolution: int):
        super().__init__(config, resolution)
        self.records = _records(config)

    def __len__(self) -> int:
        return len(self.records)

    def found(self, index: int) -> Found:
        where, key = f"{_where(self.config)}: record {index}", f"record {index}"
        try:
            record = self.records[index]
        except Exception as e:  # ArrayRecord's and TFDS's own, for each way to be damaged
            why = f"{where} cannot be read ({_line(e)})"
            raise BadRecord(why, key, "unreadable record") from None
        try:
            caption = record[self.config.caption].decode()
        except UnicodeDecodeError:
            raise BadRecord(f"{where}: caption is not UTF-8", key, "unreadable caption") from None
        return Found(key, where, record[self.config.image], (caption,), _columns(record))


def _columns(record: Any) -> dict[str, Any]:
    """What else a record says of its picture: numbers, and what `cascade data convert` has kept."""
    found = {k: v.item() for k, v in record.items() if isinstance(v, np.generic)}
    try:
        kept = json.loads(record.get("columns", b"{}"))
    except (ValueError, TypeError, RecursionError):
        kept = {}
    return found | (kept if isinstance(kept, dict) else {})


def _where(config: TFDSData) -> str:
    return f"TFDS dataset {config.name} in {config.data_dir}"


def _check_features(folder: pathlib.Path, where: str) -> None:
    """UserError where a features.json names a class that is not of TFDS, which would import it, or
    a file is a link that leads out of the folder."""
    for file in folder.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where}: {file.name} is a link that leads outside; copy it there")
    for file in folder.rglob("features.json"):
        values = [read_json(file)]
        while values:
            value = values.pop()
            values += value.values() if isinstance(value, dict) else []
            values += value if isinstance(value, list) else []
            named = [value.get(key) for key in _CLASS] if isinstance(value, dict) else []
            for name in named:
                if isinstance(name, str) and not name.startswith("tensorflow_datasets."):
                    raise UserError(
                        f"{where}: {file.name} names the class {name}; a dataset's own code is "
                        "never run: only classes of tensorflow_datasets are read"
                    )


def _check_counts(instructions: Any, where: str) -> None:
    """UserError where dataset_info.json does not say how many records the files hold."""
    from array_record.python.array_record_module import ArrayRecordReader

    for part in instructions:
        reader = ArrayRecordReader(part.filename)
        held = reader.num_records()
        reader.close()
        if held != part.examples_in_shard:
            raise UserError(
                f"{where}: {pathlib.Path(part.filename).name} holds {held} records, and "
                f"dataset_info.json says {part.examples_in_shard}; prepare the dataset again"
            )


_CLASS = ("pythonClassName", "python_class_name", "type", "proto_cls", "protoCls")
"""Under what keys a features.json names classes."""


def _records(config: TFDSData) -> Any:
    """TFDS's random-access source of undecoded records."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    where = _where(config)
    folder = paths.path(config.data_dir)
    try:
        if not folder.is_dir():
            raise tfds.core.DatasetNotFoundError
        local = paths.local_copy(folder)
        _check_features(pathlib.Path(local) / config.name, where)
        builder: Any = builder_from_files(config.name, data_dir=str(local))
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"{where}: not found; give the folder above NAME/VERSION, or prepare it first "
            "(`cascade data make` makes scenes)"
        ) from None
    except UserError:
        raise
    except Exception as e:  # protobuf's and TFDS's own, for each way to be damaged
        raise UserError(
            f"{where}: its dataset_info.json or features.json cannot be read ({_line(e)}); restore "
            "the folder from a copy, or prepare the dataset again"
        ) from None
    features = dict(builder.info.features.items())
    wanted = ((config.image, tfds.features.Image), (config.caption, tfds.features.Text))
    for name, kind in wanted:
        if not isinstance(features.get(name), kind):
            raise UserError(
                f"{where}: has no {kind.__name__} feature {name!r}; its features are "
                f"{', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())}"
            )
    undecoded = {config.image: tfds.decode.SkipDecoding()}
    try:
        records = builder.as_data_source(config.split, decoders=undecoded)
        _check_counts(builder.info.splits[config.split].file_instructions, where)
        return records
    except UserError:
        raise
    except Exception as e:  # for no such split, other files than these, none, or damaged ones
        splits = ", ".join(builder.info.splits)
        raise UserError(
            f"{where}: split {config.split!r} cannot be read ({_line(e)}); its splits are "
            f"{splits}, and its files must be array_record"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
