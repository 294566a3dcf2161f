"""What sampling needs: one stage as it draws a batch, and every part of a whole model.

Both take settings from configs alone; no weights are read. The program that is compiled and counted
is the one that `Stage.sample` runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cascade.devices import flops, sharding
from cascade.errors import UserError
from cascade.models import Network
from cascade.planning.compiled import compiled
from cascade.planning.figures import Figures, figures, gib, tree_bytes
from cascade.planning.topology import Topology, run_mesh
from cascade.runner.cascade import by_rows
from cascade.runner.model_folder import open_model
from cascade.stage import Stage
from cascade.storage.network import Published
from cascade.text.t5 import T5Encoder, locate, read_config, target
from cascade.text.tokenizer import Tokenizer
from cascade.training.stage_training import StageTraining


def plan_sampling(
    job: StageTraining,
    topology: Topology,
    *,
    tokens: int,
    batch_size: int | None = None,
    split_rows: int = 1,
) -> Figures:
    """Returns the figures of one batch that the job's stage draws, with all its sampling steps.

    tokens: length of each text. batch_size: pictures; None is one for each part of the batch.
    split_rows: with 1 the job's mesh splits pictures and weights. With more, so many chips share
    each picture of a super-resolution stage and have its weights whole, as in `Cascade.draw`; the
    others are left out. Raises UserError for GPUs, which have no compiler here, and where the mesh
    or split_rows does not fit.
    """
    if topology.devices is None:
        raise UserError("--sample needs a compiler, and GPUs have none for absent machines")
    stage, params = Stage(job.stage), Stage(job.stage).abstract()
    place = by_rows(job.stage, split_rows, topology.devices)
    if place is not None:
        mesh = place.mesh
        topology = dataclasses.replace(topology, count=split_rows)
        weights = pictures = sharding.replicated(mesh)
        drawn, b = None, batch_size or 1
    elif split_rows == 1:
        mesh = run_mesh(job, topology)
        weights, pictures = sharding.shardings(params, mesh), sharding.batch_sharding(mesh)
        drawn, b = pictures, batch_size or sharding.batch_parts(mesh)
    else:
        raise UserError(f"--split-rows {split_rows}: {job.stage.name} draws from text alone")
    draw, inputs = sampling_program(stage, tokens, b, place)
    work = flops.count(draw, params, inputs)
    jitted = jax.jit(draw, in_shardings=(weights, pictures), out_shardings=drawn)
    measured = compiled(jitted, (params, inputs), topology)
    return figures(
        job.stage.name,
        topology,
        mesh,
        params,
        measured,
        model=work,
        executed=work,
        images=b,
    )


def sampling_program(
    stage: Stage, tokens: int, b: int, place: sharding.ByRows | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns a program that samples a stage by its own settings, and the shapes of its inputs.

    The program takes (params, inputs), and returns pictures [b, side, side, 3]. tokens: length of
    each text. b: pictures drawn together. place: as in `Stage.sample`.
    """
    config = stage.config
    told: dict[str, Any] = {}
    for condition in config.conditions:
        told |= condition.shapes(config.space, b, tokens, None)
    given = jax.eval_shape(
        lambda batch: {c.name: c.of_examples(batch) for c in config.conditions}, told
    )
    for name, said in given.items():
        if said is None:
            raise UserError(
                f"stage {config.name}: examples say nothing of its condition {name} (its "
                "of_examples): what it draws from is not known"
            )
    text = config.text
    inputs: dict[str, Any] = {
        "given": given,
        "negative": {} if text is None or text.null_prompt is None else {"text": given["text"]},
        "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b)),
    }

    def draw(params, inputs):
        return stage.sample(params, **inputs, settings=config.sampling, place=place)

    return draw, inputs


def plan_model(
    model: str,
    topology: Topology,
    *,
    tokens: int | None = None,
    batch_size: int,
    dtype: Any,
    int8: bool,
    split_rows: int = 1,
) -> Figures:
    """Returns the memory of one chip while a model draws a batch on it, part by part, in bytes.

    The parts are the text encoders, which work first, and the stages. Each is also printed on
    stderr when it is known. Without a compiler for the topology temporaries are unknown, and
    whether a part fits is said by its weights alone.

    model, split_rows: as `cascade sample` has them. tokens: length of the text that stages share;
    None is the model's own. batch_size: pictures drawn together. dtype: type of public weights.
    int8: whether the shared text encoder is kept in int8. Raises UserError for a model that cannot
    be read.
    """
    opened = open_model(model)
    tokens = tokens or opened.max_tokens
    stages = [(config, opened.own_text_encoder(config.name)) for config in opened.stages]
    devices = topology.devices
    one = None if devices is None else jax.sharding.SingleDeviceSharding(devices[0])
    programs: dict[str, Any] = {}
    if any(own is None and config.text is not None for config, own in stages):
        shared = opened.text_encoder
        programs["text encoder"] = (*_text_encoder(shared, tokens, batch_size, dtype, int8), one)
    for config, own in stages:
        if own is not None:
            programs[f"{config.name} text encoder"] = (
                *_own_text_encoder(own, batch_size, dtype),
                one,
            )
    for config, own in stages:
        config = config.computing_in(dtype)
        stage, kind = Stage(config), jnp.dtype(config.weights_dtype)
        place = None if devices is None else by_rows(config, split_rows, devices)
        length = tokens if own is None else own.config.max_position_embeddings
        draw, inputs = sampling_program(stage, length, batch_size, place)
        where = one if place is None else sharding.replicated(place.mesh)
        programs[config.name] = (draw, _in_dtype(stage.abstract(), kind), (inputs,), where)
    parts: dict[str, Figures] = {}
    width = max(map(len, programs))
    for name, (program, params, inputs, where) in programs.items():
        parts[name] = {"weight_bytes": tree_bytes(params), "temporary_bytes": None}
        if topology.devices is not None:
            print(f"compiling {name} ...", file=sys.stderr)
            measured = compiled(jax.jit(program, in_shardings=where), (params, *inputs), topology)
            parts[name] |= {k: measured[k] for k in ("temporary_bytes", "peak_bytes")}
        # At once: a part of billions of weights takes minutes.
        told = (f"{k.removesuffix('_bytes')} {gib(v)}" for k, v in parts[name].items())
        print(f"{name:<{width}}  {', '.join(told)}", file=sys.stderr, flush=True)
    largest = max(p.get("peak_bytes") or p["weight_bytes"] for p in parts.values())
    return {
        "model": model,
        "topology": topology.name,
        "batch": batch_size,
        "dtype": dtype,
        "parts": parts,
        "together_weight_bytes": sum(p["weight_bytes"] for p in parts.values()),
        "largest_bytes": largest,
        "hbm_bytes": topology.chip.hbm,
        "fits_part_by_part": largest <= topology.chip.hbm,
    }


def _text_encoder(
    name: str, tokens: int, b: int, dtype: Any, int8: bool
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """Returns (program, shapes of its parameters, of its inputs) of the T5 that stages share."""
    config = read_config(locate(name))
    config = dataclasses.replace(config, compute_dtype=dtype, int8=int8)
    encoder = T5Encoder(config, {}, Tokenizer(b"", tokens))  # tokenizes nothing
    ids, mask = (jax.ShapeDtypeStruct((b, tokens), kind) for kind in (jnp.int32, jnp.bool_))
    return encoder.apply, target(config), (ids, mask)


def _own_text_encoder(
    own: Published, b: int, dtype: Any
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """Returns the same of one stage's own CLIP text encoder, which reads all its tokens."""
    config = dataclasses.replace(own.config, compute_dtype=dtype)
    ids = jax.ShapeDtypeStruct((b, config.max_position_embeddings), jnp.int32)

    def embed(params, ids):
        return Network(config).bind(params)(ids)

    return embed, _in_dtype(own.abstract(), dtype), (ids,)


def _in_dtype(shapes: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)
