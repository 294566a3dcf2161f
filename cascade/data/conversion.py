"""Writes any dataset as tar shards, or as ArrayRecord files that TensorFlow Datasets knows."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pathlib
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from PIL import Image

from cascade import images
from cascade.data.pictures import PictureSource, encoded
from cascade.data.source import FILTERED, BadRecord, Data, Source
from cascade.devices.terminal import bar
from cascade.errors import UserError
from cascade.storage import checksums, paths

Format = Literal["tar", "array_record"]
NAME = "pictures"
"""What the TFDS dataset is called that is written."""
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


def convert(
    data: Data,
    out: pathlib.Path,
    *,
    format: Format = "tar",
    resolution: int | None = None,
    per_shard: int = 10_000,
) -> dict[str, Any]:
    """Write what filters leave of a dataset under `out`, which appears whole or not at all.

    format: "tar" makes shards 00000.tar and on, which TarData(path=out) and WebDataset read;
        "array_record" a TFDS dataset that TFDSData(name="pictures", data_dir=out) reads.
    resolution: side in pixels that the central squares are resized to, as PNG; None keeps each
        picture as the dataset has it.
    per_shard: examples in a tar shard.

    The captions are the .txt, or the feature `caption`; where there are several that is the first,
    and all are in the column `captions`. Columns of the dataset are kept where JSON can hold them,
    which has no dates, bytes and NaN, and its own name in `key`. Each picture is decoded once, and
    what cannot be read is left out and listed in skipped.jsonl. A SHA256SUMS lies beside the files.
    Returns what was written, as JSON values. Raises UserError for an `out` that holds something,
    for numbers that are not positive, for a dataset without files where there is no resolution, and
    as `Data.open` does.
    """
    if (resolution is not None and resolution < 1) or per_shard < 1:
        raise UserError(
            f"resolution and per-shard must be positive, got {resolution} and {per_shard}"
        )
    source = data.open(resolution or 8)
    if resolution is None and not isinstance(source, PictureSource):
        raise UserError(
            f"a {type(data).__name__} has no picture files to keep as they are; give --resolution"
        )
    if isinstance(source, PictureSource):
        source.read_all_columns()
    bad: list[BadRecord] = []
    records = _records(source, resolution, bad)
    shown = bar(iterable=records, total=len(source), desc="convert", unit="img")
    with paths.WholeFolder(out) as folder, paths.telling_of_full_disks(out):
        write = _write_tar if format == "tar" else _write_array_records
        count = write(shown, folder, per_shard)
        if not count:
            raise UserError(
                f"{out}: there is nothing to write: of {len(source)} examples none can be read"
                + (f", the first: {bad[0]}" if bad else "")
            )
        if bad:
            lines = [json.dumps({"key": one.key, "reason": one.reason}) + "\n" for one in bad]
            (folder / "skipped.jsonl").write_text("".join(lines), encoding="utf-8")
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        checksums.write(folder, files)
    left_out = collections.Counter(one.reason for one in [*source.left_out, *bad])
    filtered = {**source.filtered}
    for reason in [reason for reason in left_out if reason.startswith(FILTERED)]:
        filtered[reason] = filtered.get(reason, 0) + left_out.pop(reason)
    read = f"tar:{out}" if format == "tar" else f"tfds:{NAME}@{out}"
    return {
        "written": str(paths.path(out)),
        "read_with": read,
        "examples": count,
        "bad_records": dict(left_out),
        "filtered": filtered,
        "bytes": size,
        "files": len(files),
    }


class _Record(NamedTuple):
    picture: bytes
    suffix: str
    caption: str
    columns: dict[str, Any]


def _records(source: Source, resolution: int | None, bad: list[BadRecord]) -> Iterator[_Record]:
    for index in range(len(source)):
        try:
            yield _record(source, index, resolution)
        except BadRecord as e:
            bad.append(e)


def _record(source: Source, index: int, resolution: int | None) -> _Record:
    columns: dict[str, Any] = {}
    if isinstance(source, PictureSource):
        found, picture = source.whole(index)
        columns, captions = _kept({**found.values, "key": found.key}), found.captions
        if resolution is None:
            content = encoded(found)
            with Image.open(io.BytesIO(content), formats=images.FORMATS) as opened:
                suffix = _SUFFIXES.get(opened.format or "", (opened.format or "").lower())
                columns |= {"width": opened.width, "height": opened.height}
        else:
            content, suffix = _png(images.square(picture, resolution)), "png"
    else:
        example = source[index]
        captions = example.get("captions", (example["caption"],))
        content, suffix = _png(example["image"]), "png"
    if resolution is not None:
        columns |= {"width": resolution, "height": resolution}
    if len(captions) > 1:
        columns["captions"] = list(captions)
    return _Record(content, suffix, captions[0], columns)


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold."""
    found = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            json.dumps(value, allow_nan=False)
            found[name] = value
    return found


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def _write_tar(records: Any, folder: pathlib.Path, per_shard: int) -> int:
    count, archive = 0, None
    try:
        for record in records:
            if count % per_shard == 0:
                if archive is not None:
                    archive.close()
                file = folder / f"{count // per_shard:05d}.tar"
                archive = tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)
            parts = {
                record.suffix: record.picture,
                "txt": record.caption.encode(),
                "json": json.dumps(record.columns).encode(),
            }
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{count:09d}.{suffix}")
                member.size = len(content)
                if archive is not None:
                    archive.addfile(member, io.BytesIO(content))
            count += 1
    finally:
        if archive is not None:
            archive.close()
    return count


def _write_array_records(records: Any, folder: pathlib.Path, per_shard: int) -> int:
    """TFDS chooses its own number of shards."""
    first = next(iter(records), None)
    if first is None:
        return 0
    import tensorflow_datasets as tfds

    from cascade.data.tfds_builder import Pictures

    builder = Pictures([first], records, data_dir=str(folder), file_format="array_record")
    tfds.disable_progress_bar()  # there is one already
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return builder.written
