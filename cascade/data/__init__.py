"""Captioned pictures -> batches for training. Importing this room loads neither JAX nor Grain."""

from cascade.data.degradation import BSR, Blur, Degradation
from cascade.data.filters import Filters
from cascade.data.folder import FolderData
from cascade.data.hf import HFData
from cascade.data.mixture import Mixture
from cascade.data.pipeline import Batches, batches
from cascade.data.samples import SamplesData
from cascade.data.source import Data, Example, Source, known_words
from cascade.data.table import TableData
from cascade.data.tar import TarData
from cascade.data.tfds import TFDSData

__all__ = [
    "BSR",
    "Batches",
    "Blur",
    "Data",
    "Degradation",
    "Example",
    "Filters",
    "FolderData",
    "HFData",
    "Mixture",
    "SamplesData",
    "Source",
    "TFDSData",
    "TableData",
    "TarData",
    "batches",
    "known_words",
]
