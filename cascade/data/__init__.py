"""Captioned pictures -> batches for training. Importing this room loads neither JAX nor Grain."""

from cascade.data.degradation import BSR, Blur, Degradation
from cascade.data.folder import FolderData
from cascade.data.pipeline import Batches, batches
from cascade.data.source import Data, Example, Source, known_words
from cascade.data.tfds import TFDSData

__all__ = [
    "BSR",
    "Batches",
    "Blur",
    "Data",
    "Degradation",
    "Example",
    "FolderData",
    "Source",
    "TFDSData",
    "batches",
    "known_words",
]
