"""Where arrays live: the device mesh and the rules that place parameters and batches on it.

The only file that names mesh axes. `data` replicates parameters and splits the batch; `fsdp`
splits both. Networks know nothing of this: placement is a value outside of them, a list of
(regular expression on the parameter's path, PartitionSpec), and where no rule speaks, the largest
axis that the fsdp axis divides is split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cascade.errors import UserError

Rule = tuple[str, PartitionSpec]
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which means all that are left."""

    data: int = -1
    fsdp: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes. Raises UserError when the numbers do not fit."""
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise UserError(
            f"mesh data={config.data} x fsdp={config.fsdp}: each must be positive, one may be -1"
        )
    known = int(np.prod([n for n in shape if n != -1]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"mesh data={config.data} x fsdp={config.fsdp} needs a multiple of {known} devices, "
            f"found {len(devices)}; change mesh.data or mesh.fsdp"
        )
    # jax.make_mesh defaults to Explicit axes, under which nnx.Conv refuses a sharded kernel.
    return jax.make_mesh(tuple(shape), BATCH_AXES, (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of every array of a batch is split over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Each process's own rows (NumPy) -> global arrays of all rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """The placement of each leaf of `tree` (arrays or ShapeDtypeStructs), as NamedShardings.

    rules: (regex searched in the leaf's path, such as `levels/0/blocks/conv1/kernel`, spec); the
    first that matches wins. Optimizer state and EMA have paths that end like their parameter's and
    shapes equal to it, so the same call places them alike.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map_with_path(place, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as text: `levels/0/blocks/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fsdp_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    # Ties go to the last axis (output channels), which XLA splits with the cheapest collectives.
    candidates = [(size, axis) for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not candidates or int(np.prod(shape)) < 2**10:
        return PartitionSpec()
    _, axis = max(candidates)
    return PartitionSpec(*(None,) * axis, "fsdp")
