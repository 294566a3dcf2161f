"""Foreign weights: safetensors files, read tensor by tensor onto the devices that want them.

A folder in Hugging Face's layout holds `STEM.safetensors`, or shards and an index that lists them,
plain or as a variant (fp16) in one of two spellings. Pickles (.bin, .pt) are never read.

    with opened(folder, "model", ...) as weights:
        fit(weights.name, weights.shapes, origins, target)  # total, or an error listing what is not
        params = read(weights, origins, target)

A tensor is in host memory once, and only while it is on its way; of a sharded parameter a host
reads the part that its own devices hold.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from cascade.errors import UserError

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from.

    names: the tensor's; several, if our parameter holds the same one of each layer along a new
        leading axis. axes: which axis of the tensor is the first of ours (after that of the
        layers), the second, ...; None is the same order, and an axis left out must be 1 long.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    stacked: bool = False

    def shape_on_disk(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Of each tensor of that rank, for a parameter of this shape."""
        shape = shape[1:] if self.stacked else shape
        if self.axes is None:
            return shape
        on_disk = [1] * max(rank, 1 + max(self.axes))
        for ours, theirs in enumerate(self.axes):
            on_disk[theirs] = shape[ours]
        return tuple(on_disk)


class Weights:
    """The tensors of some open files. name: of the folder in errors. shapes: by tensor."""

    def __init__(self, name: str, files: Mapping[str, Any]):
        """files: name of a file -> what safetensors opened."""
        self.name = name
        self._file: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file_name, file in files.items():
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in self._file:
                    raise UserError(
                        f"{name}: {tensor} is in two files, one of them {file_name}; remove the "
                        "files that do not belong"
                    )
                self._file[tensor] = file
                self.shapes[tensor] = tuple(file.get_slice(tensor).get_shape())

    def __getitem__(self, key: tuple[str, Index]) -> np.ndarray:
        """weights[name, (slice, ...)]: that part of the tensor, in its own dtype."""
        tensor, index = key
        return self._file[tensor].get_slice(tensor)[index]

    def whole(self, origin: Origin, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter of that shape, in the dtype of its first tensor."""
        dtype = DTYPES[self.dtype(origin.names[0])]
        return _part(self, origin, dtype, (slice(None),) * len(shape))

    def dtype(self, tensor: str) -> str:
        """In safetensors' spelling: one of DTYPES, or UserError."""
        dtype = self._file[tensor].get_slice(tensor).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{self.name}: {tensor} is stored as {dtype}; weights must be {', '.join(DTYPES)}"
            )
        return dtype


@contextlib.contextmanager
def opened(folder: Path, stem: str, *, what: str, convert: str) -> Iterator[Weights]:
    """The weights of a folder: the plain file, else the plain index, else a variant of either.

    what: how errors call the folder ("text encoder"). convert: Python that writes what is pickled
    as safetensors, for the error that refuses pickles. Raises UserError for what is missing,
    damaged or pickled.
    """
    name = f"{what} {folder}"
    with contextlib.ExitStack() as stack:
        files = {}
        for file in _files(folder, stem, name, convert):
            try:
                opened_file = safetensors.safe_open(os.fspath(file), framework="np")
                files[file.name] = stack.enter_context(opened_file)
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(
                    f"{what} {file}: damaged or cut short ({e}); copy or download it again"
                ) from None
        yield Weights(name, files)


def fit(
    name: str,
    shapes: Mapping[str, Sequence[int]],
    origins: Mapping[str, Origin],
    target: Any,
    *,
    ignored: str | None = None,
) -> None:
    """Check that tensors of these shapes fill every parameter, each used once and none left over.

    origins: by path of the parameter, "a/0/b". target: nested dicts of ShapeDtypeStructs.
    ignored: a regular expression; what it matches from the start may be left over. Needs no
    weights, so that it can be asked of any size. Raises UserError listing what is missing, of
    another shape, or left over.
    """
    missing, misshapen, used = [], [], set()
    for path, leaf in leaves(target):
        origin = origins[path]
        for tensor in origin.names:
            used.add(tensor)
            if tensor not in shapes:
                missing.append(f"{tensor} is missing")
                continue
            found = tuple(shapes[tensor])
            if found != (wanted := origin.shape_on_disk(leaf.shape, len(found))):
                misshapen.append(f"{tensor} is {list(found)}, config.json asks for {list(wanted)}")
    extra = [
        f"{tensor} is left over"
        for tensor in shapes
        if tensor not in used and not (ignored and re.match(ignored, tensor))
    ]
    problems = [_listed(p) for p in (missing, misshapen, extra) if p]
    if problems:
        raise UserError(
            f"{name}: not the network of its config.json: {'; '.join(problems)}; the weights "
            "and config.json must be of one model"
        )


def read(weights: Weights, origins: Mapping[str, Origin], target: Any) -> Any:
    """target, nested dicts of ShapeDtypeStructs -> the same of arrays, of its dtypes.

    Where a struct has a sharding the array has it, otherwise it is on the default device. Call
    `fit` first. Raises UserError for tensors that are not floats.
    """
    for name in itertools.chain.from_iterable(origin.names for origin in origins.values()):
        weights.dtype(name)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        part: Any = functools.partial(_part, weights, origins[_name(path)], leaf.dtype)
        if leaf.sharding is None:
            return jax.device_put(part((slice(None),) * len(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    try:
        return jax.tree.map_with_path(place, target)
    except safetensors.SafetensorError as e:
        raise UserError(f"{weights.name}: damaged or cut short ({e}); copy it again") from None


def write(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write one safetensors file, tensor by tensor.

    tensors: (name, shape, dtype in safetensors' spelling). read: name -> the array of that shape,
    cast here. The file appears whole or not at all.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.items():
                if name != "__metadata__":
                    value = np.ascontiguousarray(read(name), DTYPES[entry["dtype"]])
                    value.reshape(-1).view(np.uint8).tofile(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def as_target(
    abstract: Any,
    dtype: Callable[[jax.ShapeDtypeStruct], Any],
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """The shapes of a network, to be filled: what `read` takes.

    dtype: of each leaf. shardings: abstract -> the placement of each leaf, as a tree like it;
    None is the default device.
    """
    made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype(a)), abstract)
    if shardings is None:
        return made
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), made, shardings(made)
    )


def own_origins(target: Any, renamed: Callable[[str], str] = str) -> dict[str, Origin]:
    """Where parameters are in the files that we write: `a/0/b` is called `a.0.b`.

    renamed: a parameter's path -> its path there, in files of earlier versions.
    """
    return {path: Origin((renamed(path).replace("/", "."),)) for path, _ in leaves(target)}


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of nested dicts by their paths, as "a/0/b"."""
    return [(_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jax.numpy.bfloat16),
}


def _files(folder: Path, stem: str, name: str, convert: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder")
    if (single := folder / f"{stem}.safetensors").is_file():
        return [single]
    incomplete = []
    for index in [
        *folder.glob(f"{stem}.safetensors.index.json"),
        *sorted(folder.glob(f"{stem}*safetensors*index*.json")),
    ]:
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{name}: {index.name} is not an index of safetensors shards") from None
        missing = [s for s in shards if not (folder / s).is_file()]
        if not missing:
            return [folder / s for s in shards]
        incomplete.append(f"{missing[0]}, which {index.name} lists, is missing")
    if incomplete:
        raise UserError(f"{name}: {'; '.join(incomplete)}; download it again")
    variants = sorted(folder.glob(f"{stem}*.safetensors"))
    if shards := [v.name for v in variants if re.search(r"-\d+-of-\d+", v.name)]:
        raise UserError(
            f"{name}: {shards[0]} is a shard, and {stem}.safetensors.index.json is missing; "
            "download it again"
        )
    if variants:
        return variants[:1]
    pickled = [f.name for end in ("bin", "pt", "pth", "ckpt") for f in folder.glob(f"*.{end}")]
    found = (
        f"only pickled weights ({sorted(pickled)[0]}), which are never read"
        if pickled
        else f"no {stem}.safetensors"
    )
    raise UserError(f"{name}: {found}; convert once where torch is installed: {convert}")


def _part(weights: Weights, origin: Origin, dtype: Any, index: Index) -> np.ndarray:
    """That part of a parameter, from the tensors that hold it."""
    if not origin.stacked:
        return _oriented(weights, origin.names[0], origin.axes, index).astype(dtype, copy=False)
    names = origin.names[index[0]]
    first = _oriented(weights, names[0], origin.axes, index[1:])
    whole = np.empty((len(names), *first.shape), dtype)
    whole[0] = first
    for i, name in enumerate(names[1:], 1):
        whole[i] = _oriented(weights, name, origin.axes, index[1:])
    return whole


def _oriented(
    weights: Weights, name: str, axes: tuple[int, ...] | None, index: Index
) -> np.ndarray:
    if axes is None:
        return weights[name, index]
    rank = len(weights.shapes[name])
    on_disk, left_out = [slice(None)] * rank, tuple(a for a in range(rank) if a not in axes)
    for ours, theirs in enumerate(axes):
        on_disk[theirs] = index[ours]
    found = weights[name, tuple(on_disk)].transpose((*axes, *left_out))
    return found.reshape(found.shape[: len(axes)])


def _listed(problems: list[str]) -> str:
    more = len(problems) - 3
    return "; ".join(problems[:3]) + (f"; {more} more like this" if more > 0 else "")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
