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
from jax.sharding import Mesh

from cascade.devices import flops, sharding
from cascade.planning.compiled import compiled
from cascade.planning.figures import Figures, bytes_each, figures, tree_bytes
from cascade.planning.text_encoder import plan_text_encoder
from cascade.planning.topology import Topology, run_mesh
from cascade.training.job import Job
from cascade.training.step import begin, make_train_step

PAPER_STEPS = 2_500_000
"""Steps that each of Imagen's models is trained for (Saharia et al. 2022, sec. 4.1)."""


def plan_training(job: Job, topology: Topology, *, tokens: int) -> Figures:
    """Returns the figures of one optimizer step, text embeddings given; `figures` names them.

    What embedding the text adds, where the run does that, is under `text_encoder`.

    tokens: length of each text. Besides, paper_days and paper_chip_hours are what PAPER_STEPS such
    steps take at the bound. Raises UserError unless the job's mesh fits the topology and the batch.
    """
    mesh = run_mesh(job, topology)
    state, batch = _state_of(job), job.batch_shapes(tokens)
    executed = _counted(_alone(job), tokens)
    model = _counted(_alone(job.with_remat(False)), tokens)
    if topology.devices is None:
        measured = from_shapes(job, topology, mesh, tokens)
    else:
        placement = sharding.shardings(state, mesh)
        jitted = jax.jit(
            make_train_step(job, job.transformation(), mesh),
            in_shardings=(placement, sharding.batch_sharding(mesh)),
            out_shardings=(placement, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        measured = compiled(jitted, (state, batch), topology)
    step = figures(
        job.name,
        topology,
        mesh,
        state["ema"],
        measured,
        model=model,
        executed=executed,
        images=job.batch_size,
    )
    seconds = PAPER_STEPS * step["bound_seconds"]
    step |= plan_text_encoder(job, topology, mesh, step, tokens)
    return step | {
        "paper_steps": PAPER_STEPS,
        "paper_days": seconds / 86400,
        "paper_chip_hours": seconds * topology.count / 3600,
    }


def from_shapes(job: Job, topology: Topology, mesh: Mesh, tokens: int) -> Figures:
    """Returns what shapes alone say of a step, by the names that `compiled` uses.

    Memory holds state and batch as sharded, gradients like parameters, and what one microbatch
    keeps for its backward pass. Traffic is the state read and written, and what is kept written and
    read. Collectives on the fsdp axis gather parameters forward and backward and scatter gradients,
    for every microbatch; on the data axis they sum gradients.
    """
    data, fsdp, parts = mesh.shape["data"], mesh.shape["fsdp"], sharding.batch_parts(mesh)
    state, batch, n = _state_of(job), job.batch_shapes(tokens), job.microbatches
    held = bytes_each(state, sharding.shardings(state, mesh))
    params = state["train"]["params"]
    gradients = bytes_each(params, sharding.shardings(params, mesh))
    kept = _kept_bytes(job, job.batch_size // n // parts, tokens)
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


def _kept_bytes(job: Job, b: int, tokens: int) -> float:
    """Returns the bytes that b examples keep for the backward pass, without parameters."""
    return _kept(_alone(job), b, tokens)


@functools.cache
def _kept(job: Job, b: int, tokens: int) -> float:
    def residuals(params, batch, key):
        return jax.vjp(lambda p: job.loss(p, batch, key)[0], params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(job.fresh, key)
    kept = jax.eval_shape(residuals, params, job.batch_shapes(tokens, b), key)
    return max(0.0, tree_bytes(kept) - tree_bytes(params))


@functools.cache
def _counted(job: Job, tokens: int) -> float:
    """Returns the FLOPs of a step, which neither the mesh nor microbatches change."""
    step = make_train_step(job, job.transformation())
    return flops.count(step, _state_of(job), job.batch_shapes(tokens))


def _alone(job: Job) -> Job:
    return dataclasses.replace(job, mesh=sharding.MeshConfig(), microbatches=1)


def _state_of(job: Job) -> Any:
    """Returns the shapes of a run's state."""
    optimizer = job.transformation()
    return jax.eval_shape(lambda key: begin(job, optimizer, job.fresh(key)), jax.random.key(0))
