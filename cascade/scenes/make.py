"""Writes scenes as a TFDS dataset."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData
from cascade.storage import paths


def make(data: ScenesData, out: Path, *, count: int, resolution: int) -> dict[str, Any]:
    """Write scenes 0..count-1 of `data` under `out`, as the TFDS dataset "scenes".

    Its only split is data.split: TFDSData(name="scenes", data_dir=out, split=data.split) reads it.
    `out` must be new or empty, and appears whole or not at all; it may be in object storage
    (gs://BUCKET/NAME, s3://BUCKET/NAME). resolution: side of the pictures in pixels. Returns what
    was written, as JSON values. Raises UserError for a folder that holds something and for a number
    that is not positive. Raises ValueError for a `data` that leaves out scenes or shows closeups,
    for the dataset does neither.
    """
    if data != ScenesData(split=data.split, seed=data.seed, size=data.size):
        raise ValueError(f"data may choose split and seed alone, got {data}")
    if count < 1 or resolution < 1:
        raise UserError(f"count and resolution must be positive, got {count} and {resolution}")
    # TFDS prints where the data lie before they are moved to `out`.
    with paths.WholeFolder(out) as folder, contextlib.redirect_stdout(io.StringIO()):
        import tensorflow_datasets as tfds

        from cascade.scenes.tfds_builder import Scenes

        builder = Scenes(
            data_dir=str(folder),
            file_format="array_record",
            resolution=resolution,
            seed=data.seed,
            counts={data.split: count},
        )
        tfds.disable_progress_bar()  # the scenes have one of their own
        with tempfile.TemporaryDirectory() as downloads, paths.telling_of_full_disks(out):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        size = sum(path.stat().st_size for path in files)
    return {
        "dataset": "scenes",
        "data_dir": str(paths.path(out)),
        "split": data.split,
        "examples": count,
        "resolution": resolution,
        "bytes": size,
        "files": names,
    }
