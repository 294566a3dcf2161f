"""Frozen networks whose activations stand for pictures, and features of many pictures on disk.

Features lie in parts, a file each, of pictures that follow each other. Several processes make a
part each at a time, what was made stays when they are stopped, and no more than a part is in
memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from cascade.data.source import BadRecord, Data, Example, Source
from cascade.devices import distributed, sharding
from cascade.errors import UserError
from cascade.evaluation import quality
from cascade.evaluation.distances import Statistics, statistics
from cascade.models import InceptionConfig, Network
from cascade.published import inception
from cascade.published.clip import CLIP
from cascade.storage import checksums, paths

PART = 512
"""The features of so many pictures are in one file."""

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """A frozen network: pictures in, features out, on all devices of this process."""

    name: str
    """What the features are called, such as "inception (torch-fidelity)"."""
    suffix: str
    """What stands behind the names of distances by it: "" for Inception's, which are FID and KID;
    others begin with an underscore."""
    params: Any
    """The network's parameters, as nested dicts of arrays."""
    apply: Callable[[Any, Any], Any]
    """A pure function: (params, uint8 [b, h, w, 3]) -> float32 [b, d]."""
    prepare: Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "h2 w2 3"]]
    """What is done to a picture on the host, before."""
    digest: str | None = None
    """The SHA-256 of its weights; None for a network that has none of its own."""
    settings: str = ""
    """What its features depend on besides, such as how pictures are normalised."""

    def of_side(self, side: int) -> str:
        """What features of pictures of `side` pixels are called: those of one name compare."""
        weights = f", weights {self.digest[:16]}" if self.digest else ""
        return f"{self.name}{weights}, pictures of {side} px"

    def __call__(self, pictures: Pictures, batch: int) -> Float[np.ndarray, "n d"]:
        """The features of n pictures, `batch` or fewer, all of one size after `prepare`.

        One program is compiled for a batch and a size. Raises UserError where weights give values
        that are not finite.
        """
        mesh, program, params = self._compiled
        devices = sharding.batch_parts(mesh)
        rows = np.stack([self.prepare(picture) for picture in pictures])
        missing = -(-batch // devices) * devices - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
        placed = jax.device_put(filled, sharding.batch_sharding(mesh))
        found = np.asarray(program(params, placed))[: len(rows)]
        if not np.isfinite(found).all():
            raise UserError(
                f"{self.name}: gives features that are not finite numbers; its weights are "
                "damaged: use others"
            )
        return found

    @functools.cached_property
    def width(self) -> int:
        """How many features there are."""
        seen = self.prepare(np.zeros((64, 64, 3), np.uint8))
        pictures = jax.ShapeDtypeStruct((1, *seen.shape), seen.dtype)
        return jax.eval_shape(self.apply, self.params, pictures).shape[1]

    @functools.cached_property
    def _compiled(self) -> Any:
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
        params = jax.device_put(self.params, sharding.replicated(mesh))
        return mesh, jax.jit(self.apply), params


def of_inception(
    weights: str | Path, like: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity"
) -> Features:
    """Inception's 2048 features, by weights in a safetensors file. Raises as `inception.read`."""
    network = Network(InceptionConfig(like=like))
    return Features(
        name=f"inception ({like})",
        suffix="",
        params=inception.read(weights),
        apply=network,
        prepare=np.asarray,
        digest=checksums.digest(paths.local_file(paths.path(weights))),
    )


def of_clip(model: CLIP) -> Features:
    """CLIP's embeddings of pictures, of length 1."""
    return Features(
        name=f"clip ({model.name})",
        suffix="_clip",
        params=model.params,
        apply=model.images,
        prepare=model.prepare,
        digest=model.digest,
        settings=f"{model.config} {model.mean} {model.std}",
    )


def of_random() -> Features:
    """The features of FD-proxy, which need no weights (see `quality`)."""
    return Features(
        name="random",
        suffix="_proxy",
        params={},
        apply=lambda _, pictures: jax.lax.map(quality.features_of, pictures),
        prepare=np.asarray,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Features of pictures on disk, in the order of the pictures."""

    files: Sequence[paths.Path]
    """A file for each PART pictures, float [pictures, d], NaN for those that could not be read;
    [pictures, 1] where none of them could."""
    indices: Int[np.ndarray, " n"]
    """Which pictures have been read, in rising order."""

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Float[np.ndarray, "_ d"]]:
        for rows in map(_open, self.files):
            yield rows[~np.isnan(rows[:, 0])]

    def take(self, which: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """The rows of pictures `indices[which]`, one or more."""
        parts, rows = np.divmod(self.indices[which], PART)
        found = np.empty((len(rows), _open(self.files[parts[0]]).shape[1]), np.float32)
        for part in np.unique(parts):
            found[parts == part] = _open(self.files[part])[rows[parts == part]]
        return found

    def statistics(self, network: str) -> Statistics:
        """The Gaussian fitted to them. Raises ValueError for fewer than two."""
        return statistics(self, network)


def _open(file: paths.Path) -> Float[np.ndarray, "_ d"]:
    return np.load(paths.local_file(file), mmap_mode="r", allow_pickle=False)


def own(count: int) -> int:
    """How many of so many pictures this process sees in `store`."""
    parts = range(jax.process_index() * PART, count, jax.process_count() * PART)
    return sum(min(PART, count - start) for start in parts)


def place(
    folder: paths.Path, network: Features, data: Data, source: Source, count: int
) -> paths.Path:
    """The folder inside for features of the first `count` examples: another one wherever anything
    differs that features are made of, for `store` believes what it finds."""
    made_of = [network.of_side(source.resolution), network.digest, network.settings, repr(data)]
    text = json.dumps([*made_of, count, len(source)])
    return folder / hashlib.sha256(text.encode()).hexdigest()[:16]


def store(
    source: Source,
    count: int,
    folder: paths.Path,
    rows: Callable[[Sequence[Example]], Float[np.ndarray, "_ d"]],
    *,
    batch: int,
    advance: Callable[[int], Any] = lambda pictures: None,
) -> Stored:
    """Make what `rows` says of the first `count` examples, or the rest of it, in a folder.

    rows: examples, one to `batch` -> a row for each. advance: called with how many pictures have
    been done, those too that were there or cannot be read. All processes of the program call it,
    with a folder that all see, and wait for each other. Examples are read in several threads, a
    batch at a time.
    """
    paths.make_folder(folder)
    files = [folder / f"part-{i:05d}.npy" for i in range(-(-count // PART))]
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        for i in range(jax.process_index(), len(files), jax.process_count()):
            indices = range(i * PART, min((i + 1) * PART, count))
            if files[i].exists():
                advance(len(indices))
                continue
            made = np.full((len(indices), 1), np.nan, np.float32)
            for start in range(0, len(indices), batch):
                some = indices[start : start + batch]
                examples = list(readers.map(functools.partial(_read, source), some))
                good = {j: e for j, e in enumerate(examples) if not isinstance(e, BadRecord)}
                if good:
                    found = rows(list(good.values()))
                    if made.shape[1] != found.shape[1]:
                        made = np.full((len(indices), found.shape[1]), np.nan, np.float32)
                    made[start + np.array(list(good))] = found
                advance(len(some))
            content = io.BytesIO()  # NumPy's own writing to a file hides why a disk refuses it
            np.save(content, made)
            with paths.writing(files[i]) as part:
                part.write_bytes(content.getvalue())
    distributed.wait(f"features {folder}")
    read = [np.flatnonzero(~np.isnan(_open(f)[:, 0])) + i * PART for i, f in enumerate(files)]
    return Stored(files=files, indices=np.concatenate(read))


def _read(source: Source, index: int) -> Example | BadRecord:
    try:
        return source[index]
    except BadRecord as e:
        return e
