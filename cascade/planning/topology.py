"""The machines of a plan: chips that are not here, and the mesh that a run makes of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from cascade.devices import sharding, xla_flags
from cascade.devices.chips import CHIPS, Chip, chip_named
from cascade.errors import UserError
from cascade.training.job import Job
from cascade.training.loop import check_batch

LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so that several may plan at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that are not here."""

    name: str
    """What `open_topology` was asked for, such as `v5e:16x16`."""
    chip: Chip
    """What one of them can do."""
    count: int
    """How many there are."""
    devices: Sequence[Any] | None
    """TPUs that can be compiled for; None for GPUs."""


def open_topology(name: str) -> Topology:
    """Returns the topology of a name such as `v5e:16x16` or `h100:8`.

    For TPUs it sets what libtpu reads of the environment, and loads libtpu. Raises UserError for a
    name that is unknown or cannot be compiled for.
    """
    kind, _, shape = name.partition(":")
    chip = chip_named(kind)
    known = ", ".join(c.name for c in CHIPS)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"--topology {name}: must be CHIP:SHAPE with a CHIP of {known}, such as v5e:16x16 or "
            "h100:8"
        )
    count = math.prod(map(int, shape.split("x")))
    if not chip.kinds[0].startswith("TPU"):
        return Topology(name, chip, count, None)
    # Else libtpu asks Google's metadata server which machine this is, waits, and says so at length.
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    xla_flags.apply("tpu", os.environ)  # which libtpu reads once: the program is that of training
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "planning for TPUs needs libtpu: pip install 'cascade-diffusion[plan]'"
        ) from None
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as e:  # jax raises several kinds
        raise UserError(f"--topology {name}: {str(e).splitlines()[0]}") from None
    return Topology(name, chip, len(devices), devices)


def run_mesh(job: Job, topology: Topology) -> Mesh:
    """Returns the mesh that a run of the job makes of all chips of the topology.

    Raises UserError unless the mesh takes them all and divides the batch.
    """
    devices = topology.devices or [_AbsentGPU(i) for i in range(topology.count)]
    mesh = sharding.make_mesh(job.mesh, devices)
    check_batch(job, mesh)
    return mesh


@dataclasses.dataclass(frozen=True)
class _AbsentGPU:
    """As much of a device as a mesh asks for, on which nothing is ever placed."""

    id: int
    platform: str = "gpu"
    device_kind: str = "GPU"
    process_index: int = 0
