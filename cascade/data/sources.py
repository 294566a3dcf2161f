"""Where captioned pictures come from: rendered scenes, a TFDS dataset, a folder of files.

A configuration says which pictures; `open_source` gives random access to them at one resolution.
Sources are small, pickle, and hold no open file, so that data workers can have their own.
"""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cascade import images
from cascade.errors import UserError
from cascade.scenes.captions import VOCABULARY, caption_at
from cascade.scenes.render import render
from cascade.scenes.spec import Object, Split, check_counts, generator
from cascade.storage import paths
from cascade.storage.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesData:
    """Scenes rendered on the fly (cascade.scenes); nothing on disk.

    split: "train" and "seen" have no held-out combination of shape and colour, "unseen" has one in
    every scene, "long" has three or four objects always. (seed, split) names an endless list of
    scenes, of which the first `size` are the dataset.
    min_objects, max_objects: leave out scenes of fewer or more, for a curriculum.
    closeup: 2 shows only a square of half the scene's side that holds all its objects, somewhere,
    and leaves out scenes where none does; at the same size in pixels a closeup is a smaller
    picture, which trains as much on shapes for less.
    """

    split: Split = "train"
    seed: int = 0
    size: int = 1_000_000_000
    min_objects: int = 1
    max_objects: int = 4
    closeup: int = 1

    def __post_init__(self):
        check_counts(self.split, self.min_objects, self.max_objects, prefix="ScenesData.")
        if self.seed < 0:
            raise ValueError(f"ScenesData.seed must not be negative, got {self.seed}")
        if not 1 <= self.size <= _MOST:
            raise ValueError(f"ScenesData.size must lie in 1..{_MOST}, got {self.size}")
        if self.closeup not in (1, 2) or self.closeup > 1 and self.split == "long":
            raise ValueError(
                "ScenesData.closeup must be 1 (none) or, but for split 'long', 2, "
                f"got {self.closeup} for {self.split!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSData:
    """A prepared TensorFlow Datasets dataset in ArrayRecord files, read without TensorFlow.

    name: as in tfds.builder, e.g. "scenes". data_dir: the folder that holds NAME/VERSION; from
    object storage (gs://BUCKET/NAME, s3://BUCKET/NAME) all of it is first copied here, since
    ArrayRecord reads local files. split: may be a part, as "train[:90%]". image, caption: names of
    its features.
    """

    name: str
    data_dir: str
    split: str = "train"
    image: str = "image"
    caption: str = "caption"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderData:
    """Picture files under a folder, with their captions.

    path: holds captions.jsonl, whose lines are {"file": "a/1.png", "caption": "..."} with files
    relative to the folder, one example a line; or, without that, pictures (png, jpg, jpeg, webp;
    subfolders too), each beside a UTF-8 text file of the same stem: a/1.png, a/1.txt. Pictures are
    cropped to their central square. In object storage (gs://BUCKET/NAME, s3://BUCKET/NAME), where
    looking for files is slow, the folder must have captions.jsonl.
    """

    path: str


DataConfig = ScenesData | TFDSData | FolderData


class Example(TypedDict):
    image: UInt8[np.ndarray, "s s 3"]
    caption: str


class Source:
    """Random access to the examples of a dataset, all at one resolution."""

    resolution: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def window(self, index: int, y: int, x: int, size: int) -> Example:
        """The example with only the part [y : y + size, x : x + size] of its picture."""
        example = self[index]
        return {**example, "image": example["image"][y : y + size, x : x + size]}


def open_source(config: DataConfig, resolution: int) -> Source:
    """The dataset at `resolution`. UserError where its files are missing or make no sense."""
    if isinstance(config, ScenesData):
        return _ScenesSource(config, resolution)
    if isinstance(config, TFDSData):
        return _TFDSSource(config, resolution)
    return _FolderSource(config, resolution)


def known_words(configs: Sequence[DataConfig]) -> list[str]:
    """The words that captions can hold, sorted, if that is a closed list; else empty."""
    closed = configs and all(isinstance(config, ScenesData) for config in configs)
    return sorted(VOCABULARY) if closed else []


_MOST = 2**31  # Grain shuffles 32-bit indices
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class _ScenesSource(Source):
    def __init__(self, config: ScenesData, resolution: int):
        self.config, self.resolution = config, resolution

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Example:
        return self.window(index, 0, 0, self.resolution)

    def window(self, index: int, y: int, x: int, size: int) -> Example:
        config = self.config
        # A window of whole pixels holds what is narrower than it by two at 64 pixels.
        within = 1.0 if config.closeup == 1 else 1 / config.closeup - 1 / 32
        scene, caption = caption_at(
            config.seed,
            index,
            config.split,
            min_objects=config.min_objects,
            max_objects=config.max_objects,
            within=within,
        )
        side = self.resolution * config.closeup
        if config.closeup > 1:
            rng = generator(config.seed, index, config.split, purpose=2)
            corner_y, corner_x = _around(scene.objects, side, self.resolution, rng)
            y, x = y + corner_y, x + corner_x
        return {"image": render(scene, side, (y, x, size)), "caption": caption.text}


def _around(
    objects: Sequence[Object], side: int, size: int, rng: np.random.Generator
) -> tuple[int, int]:
    """The corner (y, x) of a random window of `size` pixels, in a picture of `side`, that holds
    all of the objects."""
    corner = []
    for axis in ("y", "x"):
        start = min(getattr(item, axis) - item.radius for item in objects)
        end = max(getattr(item, axis) + item.radius for item in objects)
        low = max(0, math.ceil(end * side) - size)
        high = min(side - size, math.floor(start * side))
        corner.append(low + int(rng.random() * (high - low + 1)))
    return corner[0], corner[1]


class _FolderSource(Source):
    def __init__(self, config: FolderData, resolution: int):
        self.resolution = resolution
        folder = paths.path(config.path)
        if not folder.is_dir():
            raise UserError(
                f"data folder {folder}: no such folder; give one that holds pictures and captions"
            )
        listing = folder / "captions.jsonl"
        pairs = _listed(listing) if listing.exists() else _paired(folder)
        self.paths, self.captions = [str(path) for path, _ in pairs], [text for _, text in pairs]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        picture = images.load_image(self.paths[index])
        return {"image": images.square(picture, self.resolution), "caption": self.captions[index]}


class _TFDSSource(Source):
    def __init__(self, config: TFDSData, resolution: int):
        self.config, self.resolution = config, resolution
        self.records = _tfds_records(config)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        try:
            picture = images.decoded(io.BytesIO(record[self.config.image]))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as e:
            raise UserError(f"{_where(self.config)}: record {index} has no picture ({e})") from None
        caption = record[self.config.caption].decode()
        return {"image": images.square(picture, self.resolution), "caption": caption}


def _listed(listing: Path) -> list[tuple[Path, str]]:
    """The pairs named by a captions.jsonl."""
    pairs = []
    for number, line in enumerate(_read_text(listing).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f'{where}: must be JSON, as {{"file": "1.png", "caption": "a red circle"}}'
            ) from None
        if not isinstance(file, str) or not isinstance(caption, str):
            raise UserError(f"{where}: file and caption must be text")
        path = listing.parent / file
        if not paths.is_remote(path) and not path.is_file():
            raise UserError(f"{where}: no picture {path}; put it there or remove the line")
        pairs.append((path, caption.strip()))
    if not pairs:
        raise UserError(f"{listing}: names no picture; write one line for each, or remove the file")
    return pairs


def _paired(folder: Path) -> list[tuple[Path, str]]:
    """The pictures under a folder, with the text files beside them, in the order of their paths."""
    if not isinstance(folder, pathlib.Path):
        raise UserError(f"data folder {folder}: in object storage it must hold captions.jsonl")
    pictures = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not pictures:
        raise UserError(
            f"data folder {folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))}); "
            "put them there, each with a .txt file of the same name"
        )
    pairs = []
    for path in pictures:
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            raise UserError(
                f"picture {path}: has no caption; write it to {beside.name} beside it, "
                f"or list all pictures in {folder / 'captions.jsonl'}"
            )
        pairs.append((path, _read_text(beside).strip()))
    return pairs


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _where(config: TFDSData) -> str:
    return f"TFDS dataset {config.name} in {config.data_dir}"


def _tfds_records(config: TFDSData) -> Any:
    """TFDS's random-access source of undecoded records."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    where = _where(config)
    folder = paths.path(config.data_dir)
    try:
        if not folder.is_dir():
            raise tfds.core.DatasetNotFoundError
        local = paths.local_copy(folder)
        builder: Any = builder_from_files(config.name, data_dir=str(local))
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"{where}: not found; give the folder above NAME/VERSION, or prepare it first "
            "(`cascade data make` makes scenes)"
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
        return builder.as_data_source(config.split, decoders=undecoded)
    except (ValueError, NotImplementedError) as e:
        splits = ", ".join(builder.info.splits)
        raise UserError(
            f"{where}: split {config.split!r} cannot be read ({e}); its splits are {splits}, and "
            "its files must be array_record"
        ) from None
