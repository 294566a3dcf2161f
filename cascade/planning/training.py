"""What one training step needs: from a compiler for TPUs, from shapes alone for GPUs.

For TPUs the real step is compiled ahead of time for the topology, on any host: XLA then says how
much memory a chip needs, and its optimized program what a chip reads, writes and sends (`hlo`).
GPUs have no compiler for absent machines; for them, memory and traffic are estimated from shapes
(`from_shapes`), and the plan says what that leaves out. Work is counted from the traced program
(`flops`) for both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cascade.devices import flops, sharding
from cascade.planning.compiled import compiled
from cascade.planning.figures import Figures, bytes_each, figures, tree_bytes
from cascade.planning.topology import Topology, run_mesh
from cascade.stage import Stage, StageConfig
from cascade.training import loop as train
from cascade.training.loop import TrainConfig

PAPER_STEPS = 2_500_000


def plan_training(config: TrainConfig, topology: Topology, *, tokens: int) -> Figures:
    """Returns the figures of one optimizer step, text embeddings given; `figures` names them.

    tokens: length of each text. paper_days and paper_chip_hours are those of PAPER_STEPS such steps
    at the bound. Raises UserError unless the config's mesh fits the topology and the batch.
    """
    mesh = run_mesh(config, topology)
    state, batch = _state_of(config), batch_of(config, tokens)
    executed, model = _step_flops(config, tokens), _step_flops(with_remat(config, False), tokens)
    if topology.devices is None:
        measured = from_shapes(config, topology, mesh, tokens)
    else:
        placement = sharding.shardings(state, mesh)
        jitted = jax.jit(
            train.make_train_step(config, Stage(config.stage), train.make_optimizer(config), mesh),
            in_shardings=(placement, sharding.batch_sharding(mesh)),
            out_shardings=(placement, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        measured = compiled(jitted, (state, batch), topology)
    step = figures(
        config.stage.name,
        topology,
        mesh,
        state["ema"],
        measured,
        model=model,
        executed=executed,
        images=config.batch_size,
    )
    seconds = PAPER_STEPS * step["bound_seconds"]
    return step | {
        "paper_steps": PAPER_STEPS,
        "paper_days": seconds / 86400,
        "paper_chip_hours": seconds * topology.count / 3600,
    }


def from_shapes(config: TrainConfig, topology: Topology, mesh: Mesh, tokens: int) -> Figures:
    """Returns what shapes alone say of a step, by the names that `compiled` uses.

    Memory: state and batch as sharded, gradients like parameters, and what the backward pass of
    one microbatch keeps. Traffic: state read and written, the kept written and read. Collectives:
    for the fsdp axis, parameters gathered forward and backward and gradients scattered, for every
    microbatch; for the data axis, gradients summed.
    """
    data, fsdp, parts = mesh.shape["data"], mesh.shape["fsdp"], sharding.batch_parts(mesh)
    state, batch, n = _state_of(config), batch_of(config, tokens), config.microbatches
    held = bytes_each(state, sharding.shardings(state, mesh))
    params = state["train"]["params"]
    gradients = bytes_each(params, sharding.shardings(params, mesh))
    kept = _kept_bytes(config.stage, batch_of(config, tokens, config.batch_size // n // parts))
    arguments = held + tree_bytes(batch) / parts
    whole = tree_bytes(params)
    collectives = {}
    if fsdp > 1:
        gathered = whole * (fsdp - 1) / fsdp
        collectives["all-gather"] = {"count": None, "sent_bytes": 2 * n * gathered}
        collectives["reduce-scatter"] = {"count": None, "sent_bytes": n * gathered}
    if data > 1:
        summed = 2 * gradients * (data - 1) / data
        collectives["all-reduce"] = {"count": None, "sent_bytes": summed}
    peak = arguments + gradients + kept
    return {
        "argument_bytes": arguments,
        "temporary_bytes": gradients + kept,
        "peak_bytes": peak,
        "fits": peak <= topology.chip.hbm,
        "hbm_traffic_bytes": 2 * held + 2 * gradients + 2 * n * kept,
        "collectives": collectives,
        "compile_seconds": None,
        "unknown": [
            "memory of the compiler's temporaries and of the allocator, so leave a tenth free",
            "traffic inside the forward and backward pass: the time of memory is a lower bound",
            "the network between servers: the time of interconnect takes all links for NVLink",
        ],
    }


def batch_of(config: TrainConfig, tokens: int, batch_size: int | None = None) -> dict[str, Any]:
    """Returns the shapes of a batch, as `Stage.loss` takes it. batch_size: None is the config's.

    image [b, side, side, 3] uint8, text [b, tokens, width] float32, text_mask [b, tokens] bool, and
    for super-resolution lowres [b, low, low, 3] uint8.
    """
    stage, b = config.stage, batch_size or config.batch_size
    side = config.crop or stage.resolution
    width = stage.network.text_width or 1
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((b, tokens, width), jnp.float32),
        "text_mask": jax.ShapeDtypeStruct((b, tokens), jnp.bool_),
    }
    if stage.lowres_resolution is not None:
        low = side * stage.lowres_resolution // stage.resolution
        batch["lowres"] = jax.ShapeDtypeStruct((b, low, low, 3), jnp.uint8)
    return batch


def with_remat(config: TrainConfig, policy: Any) -> TrainConfig:
    """Returns the config with another `remat` of its network: False, or what to keep."""
    network = dataclasses.replace(config.stage.network, remat=policy)
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, network=network))


def _kept_bytes(config: StageConfig, batch: Any) -> float:
    """Returns what the forward pass on a batch keeps for the backward pass, parameters left out."""
    shapes = tuple((name, x.shape, x.dtype) for name, x in batch.items())
    return _kept_by_shapes(config, shapes)


@functools.cache
def _kept_by_shapes(config: StageConfig, shapes: tuple[Any, ...]) -> float:
    stage = Stage(config)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}

    def residuals(params, batch, key):
        return jax.vjp(lambda p: stage.loss(p, batch, key)[0], params)[1]

    params, key = stage.abstract(), jax.eval_shape(lambda: jax.random.key(0))
    return max(0.0, tree_bytes(jax.eval_shape(residuals, params, batch, key)) - tree_bytes(params))


def _step_flops(config: TrainConfig, tokens: int) -> float:
    # Neither the mesh nor microbatches change them.
    return _counted(dataclasses.replace(config, mesh=sharding.MeshConfig(), microbatches=1), tokens)


@functools.cache
def _counted(config: TrainConfig, tokens: int) -> float:
    step = train.make_train_step(config, Stage(config.stage), train.make_optimizer(config))
    return flops.count(step, _state_of(config), batch_of(config, tokens))


def _state_of(config: TrainConfig) -> Any:
    """Returns the shapes of a run's state."""
    stage, optimizer = Stage(config.stage), train.make_optimizer(config)

    def init(key):
        return train.begin(config, optimizer, stage.init(key))

    return jax.eval_shape(init, jax.random.key(0))
