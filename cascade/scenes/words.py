"""The datasets that words on the command line name, scenes among them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cascade.data import Data, Mixture, uri
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData


def dataset(source: str, split: str = "train", seed: int = 0) -> Data:
    """The dataset that a word on the command line names.

    split: of scenes, and of datasets that have splits. seed: which endless list of scenes. Raises
    UserError as `uri.parse` does, and for scenes of no such split.
    """
    if source == "scenes" and not Path(source).is_dir():
        source = "scenes:"
    return _of_split(
        uri.parse(source, {"scenes": lambda place: scenes(place or split, seed)}), split
    )


def _of_split(data: Any, split: str) -> Data:
    """The dataset, or each of a mixture, at a split where it has several and names none."""
    if isinstance(data, Mixture):
        sources = tuple(_of_split(source, split) for source in data.sources)
        return dataclasses.replace(data, sources=sources)
    if hasattr(data, "split") and not isinstance(data, ScenesData) and data.split == "train":
        return dataclasses.replace(data, split=split)
    return data


def scenes(split: Any, seed: int) -> ScenesData:
    """The scenes of a split. Raises UserError where there is none of that name."""
    try:
        return ScenesData(split=split, seed=seed)
    except ValueError as e:
        raise UserError(str(e)) from None
