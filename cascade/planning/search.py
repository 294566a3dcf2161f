"""The search for settings of a training run that fit a topology, and for the fastest of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from cascade.devices import sharding
from cascade.errors import UserError
from cascade.planning.figures import Figures
from cascade.planning.topology import Topology, run_mesh
from cascade.planning.training import from_shapes, plan_training, with_remat
from cascade.training.loop import TrainConfig

SUGGESTIONS = 6


def suggest(config: TrainConfig, topology: Topology, *, tokens: int) -> Figures:
    """Returns the figures of the fastest of some settings that fit, with all that were tried.

    It tries meshes with fsdp over 1, some or all chips and, for TPUs, tensor over 2 or 4 (what that
    sends only a compiler knows), without and with remat, in 1, 2, 4 ... microbatches. Compiling
    takes minutes, so memory estimated from shapes chooses whom to try: the settings that recompute
    and split least come first, and of those that seem to fit, at most six are tried, two of them
    with a tensor axis. tokens: length of each text. Raises UserError where none fits, and for a
    batch that the chips do not divide.
    """
    if config.batch_size % topology.count:
        raise UserError(
            f"--suggest: batch_size={config.batch_size} must be a multiple of the "
            f"{topology.count} chips of {topology.name}; change one of them"
        )
    tried: list[Figures] = []
    best: Figures | None = None
    for candidate in _suggestions(config, topology, tokens):
        network: Any = candidate.stage.network
        settings = {
            "mesh.fsdp": candidate.mesh.fsdp,
            "mesh.tensor": candidate.mesh.tensor,
            "remat": network.remat,
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


def _suggestions(config: TrainConfig, topology: Topology, tokens: int) -> list[TrainConfig]:
    """Returns the cheapest settings of each kind of mesh, those without a tensor axis first."""
    if topology.devices is None:
        return list(itertools.islice(_candidates(config, topology, tokens, (1,)), SUGGESTIONS))
    plain = itertools.islice(_candidates(config, topology, tokens, (1,)), SUGGESTIONS - 2)
    split = itertools.islice(_candidates(config, topology, tokens, (2, 4)), 2)
    return [*plain, *split]


def _candidates(
    config: TrainConfig, topology: Topology, tokens: int, tensors: Sequence[int]
) -> Iterator[TrainConfig]:
    """Yields settings that seem to fit, the cheapest first.

    Few microbatches, no remat and little sharding are cheap, in this order. A microbatch has at
    least a picture for each of the devices. tensors: sizes of the tensor axis.
    """
    hint = typing.get_type_hints(type(config.stage.network))["remat"]
    policies = typing.get_args(hint)
    count = topology.count
    splits = [2**i for i in range(10) if not config.batch_size % (2**i * count)]
    meshes = [
        sharding.MeshConfig(fsdp=fsdp, tensor=tensor)
        for tensor in tensors
        if count % tensor == 0
        for fsdp in dict.fromkeys([*(4**i for i in range(8)), count // tensor])
        if count // tensor % fsdp == 0
    ]
    for n, policy, mesh in itertools.product(splits, policies, meshes):
        candidate = dataclasses.replace(with_remat(config, policy), microbatches=n, mesh=mesh)
        absent = run_mesh(candidate, dataclasses.replace(topology, devices=None))
        if from_shapes(candidate, topology, absent, tokens)["fits"]:
            yield candidate
