"""Where arrays live: the device mesh and the rules that place parameters and batches on it.

The mesh axes:

    data    replicates parameters and splits the batch
    fsdp    splits both: a parameter is gathered where it is used, its gradient scattered again
    tensor  splits the channels between two layers and leaves the batch whole
    rows    splits pictures by their rows of pixels, in sampling alone (a mesh of its own)

Networks know nothing of this. Placement is a value outside of them: a list of (regular expression
on the parameter's path, axes of its last dimensions), and where no rule speaks, the largest
dimension that the fsdp axis divides is split. What networks say of an activation is its role;
`activations` turns roles into constraints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cascade.errors import OptionError, UserError

Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...]]
"""(regex searched in a path such as `levels/0/blocks/conv1/kernel`, mesh axes of the array's last
dimensions): aligned at the end, since equal blocks are stacked along a leading one."""

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Pairs of layers (Shoeybi et al. 2019, Megatron-LM, sec. 3): the first makes a share of the
# channels on each device of the tensor axis, which stay there through norms, activations and
# attention heads; the second sums its share of the products over the axis.
RULES: tuple[Rule, ...] = (
    (r"residual/conv1/kernel$", ("fsdp", "tensor")),
    (r"residual/conv2/kernel$", ("tensor", "fsdp")),
    (r"attention/query/kernel$", ("fsdp", "tensor")),
    # Keys beside values: halves of one matrix, of which every device needs a share of each.
    (r"attention/(image|text)/kernel$", (("fsdp", "tensor"), None)),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    # T5
    (r"attention/[qkv]/kernel$", ("fsdp", "tensor")),
    (r"attention/o/kernel$", ("tensor", "fsdp")),
    (r"feed_forward/wi_[01]/kernel$", ("fsdp", "tensor")),
    (r"feed_forward/wo/kernel$", ("tensor", "fsdp")),
)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis, 1 or more; one of them may be -1, which means all that are left."""

    data: int = -1
    """Devices that hold copies of the parameters and share the batch."""
    fsdp: int = 1
    """Devices that share the parameters and the batch."""
    tensor: int = 1
    """Devices that share the channels between two layers, and have the batch whole."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh over all devices of all processes, or over those given.

    Neighbours along tensor are the closest, then those along fsdp. TPU slices, which only the
    data-centre network connects, are laid along data. Raises UserError for numbers that do not fit
    the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    described = f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor}"
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise UserError(f"{described}: each must be positive, one may be -1")
    known = int(np.prod([n for n in shape if n != -1]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"{described} needs a multiple of {known} devices, found {len(devices)}; change "
            "mesh.data, mesh.fsdp or mesh.tensor"
        )
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise UserError(
                f"{described}: mesh.data must be a multiple of the {len(slices)} TPU slices, "
                f"got {shape[0]}"
            )
        within = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (len(slices), 1, 1), devices, allow_split_physical_axes=True
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    # jax.make_mesh defaults to Explicit axes, under which nnx.Conv refuses a sharded kernel.
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of an array that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: the first axis of every array is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending: int [rows].

    They are not always in one piece (a TPU host's chips are a square of the pod), and processes
    along the tensor axis hold the same ones.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[i] for i in held.values()]))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's own rows (NumPy, those of `process_rows`) -> global arrays of all rows."""
    sharding, parts = batch_sharding(mesh), batch_parts(mesh)
    own = process_rows(mesh, parts)

    def place(x: Any) -> jax.Array:
        size = len(x) // len(own)

        def part(index: Any) -> Any:
            first = int(np.searchsorted(own, (index[0].start or 0) // size)) * size
            return x[first : first + size]

        return jax.make_array_from_callback((size * parts, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """The placement of each leaf of `tree` (arrays or ShapeDtypeStructs), as NamedShardings.

    The first rule that matches wins; an axis that does not divide its dimension is left out.
    Optimizer state and EMA have paths that end like their parameter's and shapes equal to it, so
    the same call places them alike.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name) and len(axes) <= len(leaf.shape):
                return NamedSharding(mesh, _spec(leaf.shape, axes, mesh))
        return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map_with_path(place, tree)


def place(tree: Any, placement: Any) -> Any:
    """Arrays that every process has whole -> global arrays; a device is given only its part."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        jax.tree.map(np.asarray, tree),
        placement,
    )


def fetch(tree: Any) -> Any:
    """Global arrays -> whole NumPy arrays in every process; all must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def activations(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """A function (activation [b, ...], role) -> the same, constrained to the mesh.

    Roles (see models.layers.placed): `stream` has all its channels on every device of its part of
    the batch. Without saying so, XLA may split it like the weights, and gather activations where
    weights are smaller. The channels of `inner` are split over tensor.
    """
    last = {"stream": None, "inner": "tensor"}

    def constrain(x: jax.Array, role: str) -> jax.Array:
        spec = PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 2), last[role])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def rows_mesh(count: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first `count` devices, which share every picture by its rows.

    devices: None takes this process's. Raises UserError unless there are so many.
    """
    devices = jax.local_devices() if devices is None else devices
    if not 1 <= count <= len(devices):
        raise OptionError(
            "split_rows", count, f"must be 1, or up to the number of devices here, {len(devices)}"
        )
    return Mesh(np.array(devices[:count]), ("rows",), axis_types=(AxisType.Auto,))


@dataclass(frozen=True)
class ByRows:
    """A function (activation, role) -> the same, its rows of pixels split over a `rows_mesh`.

    Convolutions are then sent the edges of their neighbours, norms are sent sums alone, and
    attention to pixels is sent all keys. Where the rows do not divide, and in attention's lists of
    pixels, the compiler decides; but what a sampling run carries from step to step (role "run") has
    a place in any case, on all devices, so that each step is the same program.
    """

    mesh: Mesh
    """The devices that share each picture, along one axis `rows`."""

    def __call__(self, x: jax.Array, role: str) -> jax.Array:
        if x.ndim != 4 or x.shape[1] % self.mesh.size:
            spec = PartitionSpec() if role == "run" else None
        else:
            spec = PartitionSpec(None, "rows")
        if spec is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as text, such as `levels/0/blocks/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(shape: tuple[int, ...], axes: Sequence[Any], mesh: Mesh) -> PartitionSpec:
    def fitting(size: int, names: Any) -> Any:
        kept = ()
        for name in (names,) if isinstance(names, str) else names or ():
            ways = mesh.shape[name]
            if ways > 1 and size % ways == 0:
                kept, size = (*kept, name), size // ways
        return kept if len(kept) > 1 else kept[0] if kept else None

    lead = len(shape) - len(axes)
    last = [fitting(size, names) for size, names in zip(shape[lead:], axes, strict=True)]
    return PartitionSpec(*(None,) * lead, *last)


def _fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    # Ties go to the last axis (output channels), which XLA splits with the cheapest collectives.
    candidates = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not candidates or int(np.prod(shape)) < 2**10:
        return PartitionSpec()
    _, axis = max(candidates)
    return PartitionSpec(*(None,) * axis, "fsdp")
