"""Weights in safetensors files, ours and foreign ones; no other module reads or writes them.

Our own are one file, whose tensors are called as the parameters are, here or in object storage:

    save_safetensors(path, params, dtype="bfloat16")
    params = load_safetensors(path, abstract)  # total, or an error that lists what does not fit

Foreign weights are a folder in Hugging Face's layout. It holds `STEM.safetensors`, or shards and an
index that lists them, plain or as a variant (fp16) in one of two spellings. Pickles (.bin, .pt) are
never read.

    with opened(folder, "model", ...) as weights:
        fit(weights.name, weights.shapes, origins, target)  # total, or an error listing what is not
        params = read(weights, origins, target)

`opened`, `read` and `write` go tensor by tensor: each is in host memory once, and only while it is
on its way; of a sharded parameter a host reads the part that its own devices hold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from cascade.config import read_json
from cascade.errors import UserError
from cascade.storage import checksums, hub, paths

Index = tuple[slice, ...]
"""A part of a tensor or parameter: one slice for each axis."""

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jax.numpy.bfloat16),
}
"""The dtypes that weights may be stored as, by safetensors' spelling of them."""
STORED = DTYPES | {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
}
"""The dtypes that `write` and `mapped` know; those besides DTYPES are of no weights."""


def spelling(dtype: Any) -> str:
    """Spell a dtype (or its NumPy name) as safetensors does; ValueError unless DTYPES has it."""
    for spelled, known in DTYPES.items():
        if known == np.dtype(dtype):
            return spelled
    raise ValueError(f"weights cannot be stored as {dtype}, only as {', '.join(DTYPES)}")


def save_safetensors(
    path: paths.Path,
    params: Mapping[str, Any],
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] = {},
) -> None:
    """Write nested dicts of arrays to one file, with keys such as `levels.0.conv.kernel`.

    dtype: the name of the dtype that all arrays are stored as: float32, float16 or bfloat16.
    metadata: what the file's header says beside the tensors.
    The file appears whole or not at all; one of this name is replaced.
    """
    arrays = {name.replace("/", "."): leaf for name, leaf in leaves(dict(params))}
    spelled = spelling(dtype)
    tensors = [(name, np.shape(arrays[name]), spelled) for name in sorted(arrays)]
    write(path, tensors, lambda name: np.asarray(arrays[name]), metadata=metadata)


def load_safetensors(
    path: paths.Path, abstract: Mapping[str, Any], renamed: Callable[[str], str] = str
) -> dict[str, Any]:
    """Read what `save_safetensors` wrote, as nested dicts of float32 NumPy arrays.

    abstract: nested dicts of ShapeDtypeStructs, whose shapes the arrays must have. renamed: a
    parameter's path -> its path in a file of an earlier version, which has none of today's names.
    Raises UserError when the file is missing, damaged or stored in a dtype that DTYPES lacks, and
    when tensors are missing, left over or of another shape, which it then lists.
    """
    target = as_target(dict(abstract), lambda _: np.float32)
    try:
        with paths.reading(path) as file, _open(file) as tensors:
            weights = Weights(str(path), {file.name: tensors})
            origins = own_origins(target)
            if not any(origin.names[0] in weights.shapes for origin in origins.values()):
                origins = own_origins(target, renamed)
            found = _misfits(weights.shapes, origins, target)
            problems = [f"missing {tensor}" for tensor in found.missing]
            problems += [f"left over {tensor}" for tensor in found.extra]
            problems += [
                f"{tensor} has shape {shape}, expected {wanted}"
                for tensor, shape, wanted in found.misshapen
            ]
            if problems:
                more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
                raise UserError(
                    f"{path} does not fit the network's config: {'; '.join(problems[:3])}{more}"
                )
            return jax.tree.map_with_path(
                lambda at, leaf: weights.whole(origins[_name(at)], leaf.shape, leaf.dtype), target
            )
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is this a folder that `cascade export` wrote?"
        ) from None
    except _DAMAGE as e:
        raise UserError(f"{path}: damaged or not a safetensors file ({e}); copy it again") from None


def load_tensors(path: paths.Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file as they are. UserError when it is damaged."""
    try:
        with paths.reading(path) as file, _open(file) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except _DAMAGE as e:
        raise UserError(f"{path}: damaged or not a safetensors file ({e}); copy it again") from None


def mapped(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Map all tensors of a local file into memory, read-only, and give its metadata.

    Nothing but the header is read until somebody looks at an array. Raises UserError when the file
    is missing, damaged, or has a dtype that STORED lacks.
    """
    try:
        with _open(file) as tensors:  # the library checks all of the header against the file
            metadata = tensors.metadata() or {}
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        whole = np.memmap(file, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; copy the folder that held it again") from None
    except _DAMAGE as e:
        raise UserError(f"{file}: damaged or not a safetensors file ({e}); copy it again") from None
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in STORED:
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}; it must be {', '.join(STORED)}"
            )
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(whole[start:end], STORED[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays, metadata


@dataclass(frozen=True)
class Origin:
    """Where a parameter is in the files: in which tensors, and in which order of their axes."""

    names: tuple[str, ...]
    """The name of the tensor; or of several, one for each layer, if `stacked`."""
    axes: tuple[int, ...] | None = None
    """Which axis of the tensor is the parameter's first (after that of the layers), second, ...;
    None is the same order, and an axis that is left out must be 1 long."""
    stacked: bool = False
    """Whether the parameter holds one tensor of each layer along a leading axis."""

    def shape_on_disk(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Give the shape that each tensor of that rank must have for a parameter of this shape."""
        shape = shape[1:] if self.stacked else shape
        if self.axes is None:
            return shape
        on_disk = [1] * max(rank, 1 + max(self.axes))
        for ours, theirs in enumerate(self.axes):
            on_disk[theirs] = shape[ours]
        return tuple(on_disk)


class Weights:
    """The tensors of some open files. name: what errors call them. shapes: by tensor.

    Raises UserError for a tensor that is in two of the files.
    """

    def __init__(self, name: str, files: Mapping[str, Any]):
        """files: what safetensors opened, by the file's name."""
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
        """weights[name, (slice, ...)] is that part of the tensor, in its own dtype."""
        tensor, index = key
        if all(part == slice(None) for part in index):
            return self._file[tensor].get_tensor(tensor)  # slices may not be of axes 0 long
        return self._file[tensor].get_slice(tensor)[index]

    def whole(self, origin: Origin, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        """Read the parameter of that shape; dtype None is the dtype of its first tensor."""
        stored = [DTYPES[self.dtype(name)] for name in origin.names]
        return _part(self, origin, dtype or stored[0], (slice(None),) * len(shape))

    def dtype(self, tensor: str) -> str:
        """Give the dtype in safetensors' spelling; UserError unless it is one of DTYPES."""
        dtype = self._file[tensor].get_slice(tensor).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{self.name}: {tensor} is stored as {dtype}; weights must be {', '.join(DTYPES)}"
            )
        return dtype


@contextlib.contextmanager
def opened(folder: Path, stem: str, *, what: str, convert: str) -> Iterator[Weights]:
    """Open the weights of a folder: the plain file, else the plain index, else a variant of either.

    stem: what the names of the files begin with. what: how errors call the folder ("text encoder").
    convert: Python that writes what is pickled as safetensors, for the error that refuses pickles.
    Raises UserError for what is missing, damaged (by its checksum too, where there is one), pickled
    or not what the hub published.
    """
    name = f"{what} {folder}"
    with contextlib.ExitStack() as stack:
        found = {}
        for file in files(folder, stem, name, convert):
            hub.check(file)
            try:
                checksums.check(file)
                found[file.name] = stack.enter_context(_open(file))
            except _DAMAGE as e:
                raise UserError(
                    f"{what} {file}: damaged or cut short ({e}); copy or download it again"
                ) from None
        yield Weights(name, found)


@contextlib.contextmanager
def opened_file(file: paths.Path, *, what: str) -> Iterator[Weights]:
    """Open the weights of one file, here or in object storage.

    what: how errors call the file. Raises UserError for one that is damaged or a pointer to it.
    """
    with paths.reading(file) as local, contextlib.ExitStack() as stack:
        hub.check(local)
        try:
            found = stack.enter_context(_open(local))
        except _DAMAGE as e:
            raise UserError(
                f"{what} {file}: damaged or not a safetensors file ({e}); copy it again"
            ) from None
        yield Weights(f"{what} {file}", {local.name: found})


def files(folder: Path, stem: str, name: str, convert: str) -> list[Path]:
    """Find the files that `opened` opens; UserError as there. name: what errors call the folder."""
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder")
    if (single := folder / f"{stem}.safetensors").is_file():
        return [single]
    incomplete = []
    for index in [
        *folder.glob(f"{stem}.safetensors.index.json"),
        *sorted(folder.glob(f"{stem}*safetensors*index*.json")),
    ]:
        paths.check_regular(index)
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
            if not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
                raise ValueError  # a name of a file elsewhere
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
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


def fit(
    name: str,
    shapes: Mapping[str, Sequence[int]],
    origins: Mapping[str, Origin],
    target: Any,
    *,
    ignored: str | None = None,
) -> None:
    """Check that tensors of these shapes fill every parameter, each used once and none left over.

    name: what the error calls the weights. shapes: of the tensors, by name. origins: by path of the
    parameter, "a/0/b". target: nested dicts of ShapeDtypeStructs. ignored: a regular expression;
    what it matches from the start may be left over. No weights are needed, so it can be asked of
    any size. Raises UserError that lists what is missing, of another shape, or left over.
    """
    if problems := misfit(shapes, origins, target, ignored):
        raise UserError(
            f"{name}: not the network of its config.json: {problems}; the weights "
            "and config.json must be of one model"
        )


def misfit(
    shapes: Mapping[str, Sequence[int]],
    origins: Mapping[str, Origin],
    target: Any,
    ignored: str | None = None,
) -> str:
    """Tell in words what `fit` finds missing, of another shape, or left over; "" for nothing."""
    found = _misfits(shapes, origins, target, ignored)
    misshapen = [
        f"{tensor} is {list(shape)}, expected {list(wanted)}"
        for tensor, shape, wanted in found.misshapen
    ]
    missing = [f"{tensor} is missing" for tensor in found.missing]
    extra = [f"{tensor} is left over" for tensor in found.extra]
    return "; ".join(_listed(p) for p in (missing, misshapen, extra) if p)


def read(weights: Weights, origins: Mapping[str, Origin], target: Any) -> Any:
    """Read the parameters: target, nested dicts of ShapeDtypeStructs -> the same of jax arrays.

    Arrays have the structs' shapes, dtypes and, where a struct has one, sharding; the others are on
    the default device. Call `fit` first. Raises UserError for tensors that are not floats or not
    finite, and for files that turn out to be damaged.
    """
    for name in itertools.chain.from_iterable(origin.names for origin in origins.values()):
        weights.dtype(name)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        origin = origins[_name(path)]

        def part(index: Any) -> np.ndarray:
            value = _part(weights, origin, leaf.dtype, index)
            if not np.isfinite(value).all():
                raise UserError(
                    f"{weights.name}: {origin.names[0]} holds a value that is not a finite number; "
                    "the file is damaged, or its training diverged: use another"
                )
            return value

        if leaf.sharding is None:
            return jax.device_put(part((slice(None),) * len(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    try:
        return jax.tree.map_with_path(place, target)
    except _DAMAGE as e:
        raise UserError(f"{weights.name}: damaged or cut short ({e}); copy it again") from None


def write(
    path: paths.Path,
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Write one safetensors file, here or in object storage, tensor by tensor.

    tensors: (name, shape, dtype in safetensors' spelling), in the order of the file. read: name ->
    the array of that shape, which is cast to that dtype here. metadata: of the header; transformers
    wants its default. The file appears whole or not at all.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    # As the library spells it, so that a file does not depend on who has written it.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with paths.writing(path) as partial:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.items():
                if name != "__metadata__":
                    value = np.ascontiguousarray(read(name), STORED[entry["dtype"]])
                    file.write(value.reshape(-1).view(np.uint8).data)


def copy(
    weights: Weights, names: Iterable[str], path: paths.Path, dtype: str | None = None
) -> None:
    """Write these tensors, with their names, as one safetensors file, tensor by tensor.

    dtype: what they are stored as there, in safetensors' spelling; None keeps that of each.
    """
    write(
        path,
        [(name, weights.shapes[name], dtype or weights.dtype(name)) for name in names],
        lambda name: weights[name, (slice(None),) * len(weights.shapes[name])],
    )


def as_target(
    abstract: Any,
    dtype: Callable[[jax.ShapeDtypeStruct], Any],
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """Give the shapes of a network dtypes and places: the target that `read` fills.

    abstract: nested dicts of ShapeDtypeStructs. dtype: leaf -> the dtype that it is to have.
    shardings: such a tree -> the placement of each leaf, as a tree like it; None is the default
    device.
    """
    made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype(a)), abstract)
    if shardings is None:
        return made
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), made, shardings(made)
    )


def own_origins(target: Any, renamed: Callable[[str], str] = str) -> dict[str, Origin]:
    """Say where each parameter is in the files that we write: `a/0/b` is the tensor `a.0.b`.

    renamed: a parameter's path -> its path there, in files of earlier versions.
    """
    return {path: Origin((renamed(path).replace("/", "."),)) for path, _ in leaves(target)}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `leaves`: the nested dicts whose leaves have these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """List the leaves of nested dicts as (path, leaf), with paths such as "a/0/b"."""
    return [(_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


_DAMAGE = (safetensors.SafetensorError, OSError)
"""What safetensors raises for a file that is not whole, or that the system cannot read."""


def _open(file: Path) -> contextlib.AbstractContextManager[Any]:
    """Open one safetensors file; raises _DAMAGE, of which FileNotFoundError is one."""
    paths.check_regular(file)
    return safetensors.safe_open(os.fspath(file), framework="np")


class _Misfits(NamedTuple):
    """How tensors fail to be the parameters of a network."""

    missing: list[str]
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """Each is (its name, its shape, the shape that the network asks for)."""
    extra: list[str]


def _misfits(
    shapes: Mapping[str, Sequence[int]],
    origins: Mapping[str, Origin],
    target: Any,
    ignored: str | None = None,
) -> _Misfits:
    missing, misshapen, used = [], [], set()
    for path, leaf in leaves(target):
        origin = origins[path]
        for tensor in origin.names:
            used.add(tensor)
            if tensor not in shapes:
                missing.append(tensor)
                continue
            found = tuple(shapes[tensor])
            if found != (wanted := origin.shape_on_disk(leaf.shape, len(found))):
                misshapen.append((tensor, found, wanted))
    extra = [
        tensor
        for tensor in shapes
        if tensor not in used and not (ignored and re.match(ignored, tensor))
    ]
    return _Misfits(missing, misshapen, extra)


def _part(weights: Weights, origin: Origin, dtype: Any, index: Index) -> np.ndarray:
    """Read that part of a parameter from the tensors that hold it."""
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
