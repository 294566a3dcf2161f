"""How a dataset is named in a word on the command line.

KIND:PLACE?FIELD=VALUE&FIELD=VALUE
WEIGHT*KIND:PLACE + WEIGHT*KIND:PLACE      a mixture; without weights, by numbers of examples
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from cascade.data.folder import FolderData
from cascade.data.hf import HFData
from cascade.data.inspection import dataset_in
from cascade.data.mixture import Mixture
from cascade.data.samples import SamplesData
from cascade.data.source import Data
from cascade.data.table import TableData
from cascade.data.tar import TarData
from cascade.data.tfds import TFDSData
from cascade.errors import UserError


def parse(uri: str, more: Mapping[str, Callable[[str], Data]] = {}) -> Data:
    """The configuration that KIND:PLACE means, or a folder without a kind.

    After a question mark there may be fields of the configuration that are text, as in
    "table:list.csv?file_column=file_name&caption_column=text". Several with " + " between them are
    a Mixture, each with its weight and a star before it, or none of them.
    more: kinds beside KINDS, each with what makes a configuration of a place. Raises UserError for
    an unknown kind or field, and for a place that makes no sense.
    """
    known = {**KINDS, **more}
    parts = _BETWEEN.split(uri)
    weights = [weight for weight, _ in map(_weighed, parts)]
    if len(parts) > 1 or weights[0]:
        if any(weights) and not all(weights):
            raise UserError(
                f"{uri}: give a weight to each dataset, as '3*folder:a + 1*tar:b', or to none"
            )
        sources = tuple(parse(part, more) for _, part in map(_weighed, parts))
        try:
            return Mixture(sources=sources, weights=tuple(float(w) for w in weights if w))
        except ValueError as e:
            raise UserError(f"{uri}: {e}") from None
    found = re.match(r"([A-Za-z_]\w*):(.*)", uri, re.DOTALL)
    if found is None or found[1] in ("gs", "s3"):
        return dataset_in(uri)
    kind, place = found[1], found[2]
    if kind not in known:
        raise UserError(
            f"{uri}: {kind!r} is no kind of dataset; write one of "
            f"{', '.join(f'{name}:' for name in known)} before the path"
        )
    fields = _FIELDS.search(place)
    if fields is None:
        return known[kind](place)
    pairs = [pair.split("=", 1) for pair in fields[1].split("&")]
    given = {name: value for name, value in pairs}
    return _with(known[kind](place[: fields.start()]), given, uri)


def _with(data: Any, fields: dict[str, str], uri: str) -> Data:
    """The configuration with those of its fields that are text."""
    hints = typing.get_type_hints(type(data))
    texts = [f.name for f in dataclasses.fields(data) if hints[f.name] in (str, str | None)]
    for name in fields:
        if name not in texts:
            raise UserError(
                f"{uri}: {type(data).__name__} has no field {name!r} of text; it has "
                f"{', '.join(texts)}"
            )
    return dataclasses.replace(data, **fields)


_WEIGHT = r"\d+(?:\.\d+)?\*"
_BETWEEN = re.compile(rf" +\+ +(?=[A-Za-z_]\w*:)| *\+ *(?={_WEIGHT}[A-Za-z_]\w*:)")
"""Between the datasets of a mixture; a plus in a name is followed by no kind, nor a weight."""


def _weighed(part: str) -> tuple[str, str]:
    """The weight of a dataset, empty if it has none, and the dataset."""
    found = re.match(_WEIGHT, part)
    return ("", part) if found is None else (found[0][:-1], part[found.end() :])


_FIELDS = re.compile(r"\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)$")


def _tfds(place: str) -> Data:
    name, at, folder = place.partition("@")
    if not name or not at or not folder:
        raise UserError(f"tfds:{place}: write tfds:NAME@DIR, where DIR holds NAME/VERSION")
    return TFDSData(name=name, data_dir=folder)


KINDS: Mapping[str, Callable[[str], Data]] = {
    "folder": lambda place: FolderData(path=place),
    "table": lambda place: TableData(path=place),
    "tar": lambda place: TarData(path=place),
    "parquet": lambda place: HFData(path=place),
    "hf": lambda place: HFData(path=place),
    "samples": lambda place: SamplesData(path=place),
    "tfds": _tfds,
}
"""The kinds of datasets by the word that names them."""
