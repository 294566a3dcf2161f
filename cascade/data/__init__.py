"""Captioned pictures -> batches for training. Importing this room loads neither JAX nor Grain."""

from cascade.data.degradation import BSR, Blur, Degradation
from cascade.data.pipeline import Batches, batches
from cascade.data.sources import (
    DataConfig,
    FolderData,
    ScenesData,
    Source,
    TFDSData,
    known_words,
    open_source,
)

__all__ = [
    "BSR",
    "Batches",
    "Blur",
    "DataConfig",
    "Degradation",
    "FolderData",
    "ScenesData",
    "Source",
    "TFDSData",
    "batches",
    "known_words",
    "open_source",
]
