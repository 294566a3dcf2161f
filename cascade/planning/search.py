"""The search for settings of a training run that fit a topology, and for the fastest of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import typing
from collections.abc import Iterator, Sequence

from cascade.devices import sharding
from cascade.errors import UserError
from cascade.models.layers import Remat
from cascade.planning.figures import Figures
from cascade.planning.topology import Topology, run_mesh
from cascade.planning.training import from_shapes, plan_training
from cascade.training.job import Job

SUGGESTIONS = 6
"""The most settings that are tried."""


def suggest(job: Job, topology: Topology, *, tokens: int) -> Figures:
    """Returns the figures of the fastest of some settings that fit, with all that were tried.

    There are meshes with fsdp over 1, some or all chips and, for TPUs, tensor over 2 or 4 (what
    that sends only a compiler knows), without and with remat, in 1, 2, 4 ... microbatches.
    Compiling takes minutes, so memory estimated from shapes chooses what to try. The settings that
    recompute and split least come first. Of those that seem to fit at most SUGGESTIONS are tried,
    two of them with a tensor axis. tokens: length of each text. Raises UserError if none fits, and
    for a batch that the chips do not divide.
    """
    if job.batch_size % topology.count:
        raise UserError(
            f"--suggest: batch_size={job.batch_size} must be a multiple of the "
            f"{topology.count} chips of {topology.name}; change one of them"
        )
    tried: list[Figures] = []
    best: Figures | None = None
    for candidate, policy in _suggestions(job, topology, tokens):
        settings = {
            "mesh.fsdp": candidate.mesh.fsdp,
            "mesh.tensor": candidate.mesh.tensor,
            "remat": policy,
            "microbatches": candidate.microbatches,
        }
        print(f"trying {settings} ...", file=sys.stderr)
        figures = plan_training(candidate, topology, tokens=tokens)
        figures["settings"] = settings
        tried.append({k: figures[k] for k in ("settings", "fits", "peak_bytes", "bound_seconds")})
        faster = best is None or figures["bound_seconds"] < best["bound_seconds"]
        if figures["fits"] is not False and faster:
            best = figures
    if best is None:
        raise UserError(
            f"nothing that was tried fits {topology.name} "
            f"({json.dumps(tried) if tried else 'no setting does, by its shapes alone'}); "
            "take more chips, a smaller batch_size, or a smaller network"
        )
    return best | {"tried": tried}


def _suggestions(job: Job, topology: Topology, tokens: int) -> list[tuple[Job, Remat]]:
    """Returns the cheapest settings of each kind of mesh, those without a tensor axis first."""
    if topology.devices is None:
        return list(itertools.islice(_candidates(job, topology, tokens, (1,)), SUGGESTIONS))
    plain = itertools.islice(_candidates(job, topology, tokens, (1,)), SUGGESTIONS - 2)
    split = itertools.islice(_candidates(job, topology, tokens, (2, 4)), 2)
    return [*plain, *split]


def _candidates(
    job: Job, topology: Topology, tokens: int, tensors: Sequence[int]
) -> Iterator[tuple[Job, Remat]]:
    """Yields settings that seem to fit, the cheapest first.

    Few microbatches, no remat and little sharding are cheap, in this order. A microbatch has at
    least one picture for each of the devices. tensors: sizes of the tensor axis.
    """
    # A job without a choice is itself with any policy.
    remats = {job.with_remat(policy): policy for policy in reversed(typing.get_args(Remat))}
    policies = list(remats.values())[::-1]
    count = topology.count
    splits = [2**i for i in range(10) if not job.batch_size % (2**i * count)]
    meshes = [
        sharding.MeshConfig(fsdp=fsdp, tensor=tensor)
        for tensor in tensors
        if count % tensor == 0
        for fsdp in dict.fromkeys([*(4**i for i in range(8)), count // tensor])
        if count // tensor % fsdp == 0
    ]
    for n, policy, mesh in itertools.product(splits, policies, meshes):
        candidate = dataclasses.replace(job.with_remat(policy), microbatches=n, mesh=mesh)
        absent = run_mesh(candidate, dataclasses.replace(topology, devices=None))
        if from_shapes(candidate, topology, absent, tokens)["fits"]:
            yield candidate, policy
