"""`cascade plan CONFIG --topology v5e:16x16`: what a run would need on machines that are not here.

For TPUs the real step is compiled ahead of time for the topology, on any host: XLA then says how
much memory a chip needs, and its optimized program what a chip reads, writes and sends (plan_hlo).
Work is counted from the traced program (flops). What a chip can do is a table (chips). From these
follows a bound: a step takes at least as long as the slowest of the three takes alone,

    time = max(FLOPs / peak, HBM bytes / HBM bandwidth, bytes sent / interconnect)

reached if all else hides behind it. GPUs have no compiler for absent machines; for them, memory and
traffic are estimated from shapes (`_from_shapes`), and the plan says what that leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import queue
import re
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cascade import config as configs
from cascade.devices import flops, sharding, xla_flags
from cascade.devices.chips import CHIPS, Chip, chip_named
from cascade.errors import UserError
from cascade.models import Conditioning, Network
from cascade.planning import hlo as plan_hlo
from cascade.published.deepfloyd import stage as deepfloyd
from cascade.runner.cascade import by_rows
from cascade.stage import Stage, StageConfig
from cascade.storage.network import Published
from cascade.text.t5 import T5Encoder, locate, read_config, target
from cascade.text.tokenizer import DEFAULT_MAX_TOKENS, Tokenizer
from cascade.training import loop as train
from cascade.training.loop import TrainConfig

PAPER_STEPS = 2_500_000
SUGGESTIONS = 6
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so that several may plan at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

USAGE = """usage: cascade plan CONFIG --topology CHIP:SHAPE [--FIELD VALUE ...]
       cascade plan MODEL --sample --topology CHIP:SHAPE [--dtype D] [--t5-int8]
                    [--split-rows N]

What a training run would need on accelerators that are not here: a table on stderr, and all
figures as JSON on stdout. Nothing is trained; for TPUs the step is compiled, which takes minutes.

  CONFIG               a config file of `cascade train`
  MODEL                a model as `cascade sample` takes it, of which only the config.json files
                       need be there: the memory of its text encoder and of every stage
  --topology NAME      chips along each axis of a TPU slice, such as v4:2x2x4, v5e:16x16, v5p:4x4x4,
                       v6e:16x16 (needs pip install 'cascade-diffusion[plan]'), or a number of
                       GPUs: a100:N, h100:N, h200:N
  --sample             the sampling of a batch instead of a training step
  --sample-batch N     pictures drawn together (default: one for each part of the batch)
  --split-rows N       with N chips sharing each picture of a super-resolution stage by its rows, as
                       `cascade sample --split-rows` does: figures are of those chips
  --tokens N           length of the text (default 128, or what a MODEL has)
  --dtype D            of a MODEL's public weights: float32 or (default) bfloat16
  --t5-int8            with the text encoder of a MODEL in int8
  --suggest            try meshes (fsdp, and for TPUs tensor), remat and microbatches, and name the
                       fastest that fits
  --FIELD VALUE        override a field of the config: --mesh.fsdp 16, --batch-size 2048"""

Figures = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    path, words = argv[0], list(argv[1:])
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--topology")
    own.add_argument("--sample", action="store_true")
    own.add_argument("--sample-batch", type=int)
    own.add_argument("--split-rows", type=int, default=1)
    own.add_argument("--tokens", type=int)
    own.add_argument("--suggest", action="store_true")
    own.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    own.add_argument("--t5-int8", action="store_true")
    try:
        options, rest = own.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise UserError(f"cascade plan: {e}") from None
    if options.topology is None:
        raise UserError("--topology is missing, such as v5e:16x16; see cascade plan --help")
    if options.tokens is not None and options.tokens < 1:
        raise UserError(f"--tokens must be positive, got {options.tokens}")
    given = options.sample_batch
    if given is not None and (given < 1 or not options.sample):
        raise UserError("--sample-batch must be positive, and goes with --sample")
    if options.split_rows != 1 and not options.sample:
        raise UserError("--split-rows goes with --sample")
    if not path.endswith(".py"):
        print(json.dumps(_plan_model(path, options, rest), indent=2))
        return
    if options.suggest and options.sample:
        raise UserError("--suggest is for training: leave out --sample, or --suggest")
    tokens = options.tokens or DEFAULT_MAX_TOKENS
    default, rest = configs.load_with(path, rest)
    if not isinstance(default, TrainConfig):
        raise UserError(f"config {path}: config() must return a TrainConfig")
    config = configs.parse(TrainConfig, rest, default=default, prog=f"cascade plan {path}")
    jax.config.update("jax_platforms", "cpu")  # nothing runs; other platforms take long to start
    topology = open_topology(options.topology)
    if options.suggest:
        figures = suggest(config, topology, tokens=tokens)
    elif options.sample:
        figures = plan_sampling(
            config,
            topology,
            tokens=tokens,
            batch_size=options.sample_batch,
            split_rows=options.split_rows,
        )
    else:
        figures = plan_training(config, topology, tokens=tokens)
    print(table(figures), file=sys.stderr)
    print(json.dumps(figures, indent=2))


@dataclasses.dataclass(frozen=True)
class Topology:
    """chip: what it is made of. devices: TPUs that can be compiled for; None for GPUs."""

    name: str
    chip: Chip
    count: int
    devices: Sequence[Any] | None


def open_topology(name: str) -> Topology:
    """`v5e:16x16` or `h100:8`. Raises UserError for what is unknown or cannot be compiled for."""
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


def plan_training(config: TrainConfig, topology: Topology, *, tokens: int) -> Figures:
    """The figures of one optimizer step, text embeddings given; see `_figures` for their names."""
    mesh = _mesh(config, topology)
    state, batch = _state_of(config), batch_of(config, tokens)
    executed, model = _step_flops(config, tokens), _step_flops(_with_remat(config, False), tokens)
    if topology.devices is None:
        measured = _from_shapes(config, topology, mesh, tokens)
    else:
        placement = sharding.shardings(state, mesh)
        jitted = jax.jit(
            train.make_train_step(config, Stage(config.stage), train.make_optimizer(config), mesh),
            in_shardings=(placement, sharding.batch_sharding(mesh)),
            out_shardings=(placement, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        measured = _compiled(jitted, (state, batch), topology)
    figures = _figures(
        config,
        topology,
        mesh,
        state["ema"],
        measured,
        model=model,
        executed=executed,
        images=config.batch_size,
    )
    seconds = PAPER_STEPS * figures["bound_seconds"]
    return figures | {
        "paper_steps": PAPER_STEPS,
        "paper_days": seconds / 86400,
        "paper_chip_hours": seconds * topology.count / 3600,
    }


def plan_sampling(
    config: TrainConfig,
    topology: Topology,
    *,
    tokens: int,
    batch_size: int | None = None,
    split_rows: int = 1,
) -> Figures:
    """The figures of drawing one batch with the config's sampling settings, all steps of it.

    split_rows: so many chips, the others left out, share each picture of a super-resolution stage
    and have its weights whole, as in `Cascade.draw`; else the config's mesh splits both.
    """
    if topology.devices is None:
        raise UserError("--sample needs a compiler, and GPUs have none for absent machines")
    stage, params = Stage(config.stage), Stage(config.stage).abstract()
    place = by_rows(config.stage, split_rows, topology.devices)
    if place is not None:
        mesh = place.mesh
        topology = dataclasses.replace(topology, count=split_rows)
        weights = pictures = sharding.replicated(mesh)
        drawn, b = None, batch_size or 1
    elif split_rows == 1:
        mesh = _mesh(config, topology)
        weights, pictures = sharding.shardings(params, mesh), sharding.batch_sharding(mesh)
        drawn, b = pictures, batch_size or sharding.batch_parts(mesh)
    else:
        raise UserError(f"--split-rows {split_rows}: {stage.config.name} draws from text alone")
    draw, inputs = drawing(stage, tokens, b, place)
    work = flops.count(draw, params, inputs)
    jitted = jax.jit(draw, in_shardings=(weights, pictures), out_shardings=drawn)
    measured = _compiled(jitted, (params, inputs), topology)
    return _figures(config, topology, mesh, params, measured, model=work, executed=work, images=b)


def drawing(
    stage: Stage, tokens: int, b: int, place: sharding.ByRows | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The program (params, inputs) -> b pictures of a stage by its own settings, and the shapes of
    its inputs. place: as in `Stage.sample`."""
    config = stage.config
    text = {
        "text": jax.ShapeDtypeStruct((b, tokens, config.network.text_width or 1), jnp.float32),
        "text_mask": jax.ShapeDtypeStruct((b, tokens), jnp.bool_),
    }
    inputs: dict[str, Any] = {
        "cond": text,
        "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b)),
    }
    if config.network.null_prompt is not None:
        inputs["negative"] = text
    if (low := config.lowres_resolution) is not None:
        inputs["lowres"] = jax.ShapeDtypeStruct((b, low, low, 3), jnp.float32)

    def draw(params, inputs):
        negative = inputs.get("negative")
        return stage.sample(
            params,
            Conditioning(**inputs["cond"]),
            inputs["keys"],
            settings=config.sampling,
            lowres=inputs.get("lowres"),
            negative=None if negative is None else Conditioning(**negative),
            place=place,
        )

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
    """The memory of one chip while a model draws a batch on it, part by part, from configs alone.

    model, split_rows: as `cascade sample` has them. Its parts are the text encoders, which work
    first, and the stages. tokens: of the text that stages share; None is the model's own number.
    Without a compiler for the topology temporaries are unknown, and what is said of fitting is of
    weights alone.
    """
    start = deepfloyd.Start(model=model)
    tokens = tokens or start.max_tokens()
    stages = [(config, start.own_text_encoder(config)) for config in start.stages()]
    devices = topology.devices
    one = None if devices is None else jax.sharding.SingleDeviceSharding(devices[0])
    programs: dict[str, Any] = {}
    if any(own is None for _, own in stages):
        programs["text encoder"] = (*_text_encoder(start, tokens, batch_size, dtype, int8), one)
    for config, own in stages:
        if own is not None:
            programs[f"{config.name} text encoder"] = (
                *_own_text_encoder(own, batch_size, dtype),
                one,
            )
    for config, own in stages:
        kind = jnp.dtype("float32")
        if config.published:
            config, kind = deepfloyd.computing_in(config, dtype), jnp.dtype(dtype)
        stage = Stage(config)
        place = None if devices is None else by_rows(config, split_rows, devices)
        length = tokens if own is None else own.config.max_position_embeddings
        draw, inputs = drawing(stage, length, batch_size, place)
        where = one if place is None else sharding.replicated(place.mesh)
        programs[config.name] = (draw, _in_dtype(stage.abstract(), kind), (inputs,), where)
    parts: dict[str, Figures] = {}
    width = max(map(len, programs))
    for name, (program, params, inputs, where) in programs.items():
        parts[name] = {"weight_bytes": _size(params), "temporary_bytes": None}
        if topology.devices is not None:
            print(f"compiling {name} ...", file=sys.stderr)
            measured = _compiled(jax.jit(program, in_shardings=where), (params, *inputs), topology)
            parts[name] |= {k: measured[k] for k in ("temporary_bytes", "peak_bytes")}
        # At once: a part of billions of weights takes minutes.
        told = (f"{k.removesuffix('_bytes')} {_gib(v)}" for k, v in parts[name].items())
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


def _plan_model(model: str, options: argparse.Namespace, rest: Sequence[str]) -> Figures:
    if rest:
        raise UserError(f"cascade plan {model}: a model has no field {rest[0]}")
    if not options.sample or options.suggest:
        raise UserError(f"cascade plan {model}: a model is sampled: add --sample, no --suggest")
    jax.config.update("jax_platforms", "cpu")
    figures = plan_model(
        model,
        open_topology(options.topology),
        tokens=options.tokens,
        batch_size=options.sample_batch or 1,
        dtype=options.dtype,
        int8=options.t5_int8,
        split_rows=options.split_rows,
    )

    fits = "fits" if figures["fits_part_by_part"] else "does NOT fit"
    print(
        f"part by part (--offload) it {fits}: {_gib(figures['largest_bytes'])} of "
        f"{_gib(figures['hbm_bytes'])}; all weights together take "
        f"{_gib(figures['together_weight_bytes'])}",
        file=sys.stderr,
    )
    return figures


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:#.3g} GiB"


def _text_encoder(
    start: deepfloyd.Start, tokens: int, b: int, dtype: Any, int8: bool
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """(program, shapes of its parameters, of its inputs) of the T5 that a model's stages share."""
    config = read_config(locate(start.text_encoder()))
    config = dataclasses.replace(config, compute_dtype=dtype, int8=int8)
    encoder = T5Encoder(config, {}, Tokenizer(b"", tokens))  # tokenizes nothing
    ids, mask = (jax.ShapeDtypeStruct((b, tokens), kind) for kind in (jnp.int32, jnp.bool_))
    return encoder.apply, target(config), (ids, mask)


def _own_text_encoder(
    own: Published, b: int, dtype: Any
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The same of the CLIP text encoder of one stage, which reads all its tokens."""
    config = dataclasses.replace(own.config, compute_dtype=dtype)
    ids = jax.ShapeDtypeStruct((b, config.max_position_embeddings), jnp.int32)

    def embed(params, ids):
        return Network(config).bind(params)(ids)

    return embed, _in_dtype(own.abstract(), dtype), (ids,)


def _in_dtype(shapes: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)


def suggest(config: TrainConfig, topology: Topology, *, tokens: int) -> Figures:
    """The figures of the fastest of some settings that fit, with all that were tried.

    Meshes with fsdp over 1, some or all chips and, for TPUs, tensor over 2 or 4 (what that sends
    only a compiler knows), without and with remat, in 1, 2, 4 ... microbatches. Compiling takes
    minutes, so memory estimated from shapes chooses whom to try: the settings that recompute and
    split least come first, and of those that seem to fit, at most six are tried, two of them with a
    tensor axis.
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


def batch_of(config: TrainConfig, tokens: int, batch_size: int | None = None) -> dict[str, Any]:
    """The shapes of a batch, as `Stage.loss` takes it."""
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


def table(figures: Figures) -> str:
    """The figures for people."""

    def seconds(value: float | None) -> str:
        return "unknown" if value is None else f"{value * 1e3:#.3g} ms"

    f = figures
    rows = [
        ("topology", f"{f['topology']}, {f['chips']} chips"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items())),
        ("parameters", f"{f['parameters'] / 1e6:.1f} M"),
        ("arguments, each chip", _gib(f["argument_bytes"])),
        ("temporaries", _gib(f["temporary_bytes"])),
        ("peak", f"{_gib(f['peak_bytes'])} of {_gib(f['hbm_bytes'])}"),
        ("fits", {True: "yes", False: "NO", None: "unknown"}[f["fits"]]),
        ("FLOPs, all chips", f"{f['flops']:.4g} ({f['model_flops']:.4g} without recomputation)"),
        ("HBM traffic", _gib(f["hbm_traffic_bytes"])),
        *(
            (kind, f"{c['count'] or '?'} times, {_gib(c['sent_bytes'])} sent")
            for kind, c in f["collectives"].items()
        ),
        ("time of compute", seconds(f["compute_seconds"])),
        ("time of memory", seconds(f["memory_seconds"])),
        ("time of interconnect", seconds(f["interconnect_seconds"])),
        ("bound", f"{seconds(f['bound_seconds'])}, by {f['bound_by']}"),
        ("images/s at the bound", f"{f['images_per_second']:.4g}"),
        ("MFU at the bound", f"{f['mfu']:.1%}"),
    ]
    if "paper_days" in f:
        rows.append(
            (
                "2.5M steps",
                f"{f['paper_days']:.3g} days, {f['paper_chip_hours']:.4g} chip-hours at least",
            )
        )
    if "settings" in f:
        rows.append(("settings", ", ".join(f"{k}={v}" for k, v in f["settings"].items())))
    if f["compile_seconds"] is not None:
        rows.append(("compiled in", f"{f['compile_seconds']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines + [f"not known: {note}" for note in f["unknown"]])


def _compiled(jitted: Any, shapes: tuple[Any, ...], topology: Topology) -> Figures:
    """What XLA says of one chip: memory, traffic and collectives of the program for it.

    Most of a TPU compiler's time goes into what follows the assignment of buffers, and tells
    nothing more. So it is asked to write down the optimized program and its buffers, and for the
    least effort at machine code, where libtpu gives up (UNIMPLEMENTED); if it takes long even so,
    as for the routes of all-to-alls between hundreds of chips, nobody waits for it.
    """
    lowered = jitted.lower(*shapes)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {"xla_dump_to": folder}
        if topology.devices and topology.devices[0].platform == "tpu":
            options["xla_jf_llo_level"] = 0
        program = _compile(lowered, options, pathlib.Path(folder))
        if isinstance(program, str) and not program.startswith("UNIMPLEMENTED"):
            return _too_large(program) | {"compile_seconds": time.perf_counter() - start}
        if program is None or isinstance(program, str):
            memory = plan_hlo.memory(_written(folder, "after_optimizations-buffer-assignment"))
            hlo = _written(folder, "after_optimizations")
        else:
            memory, hlo = _memory_of(program.memory_analysis()), program.as_text()
    seconds, moved = time.perf_counter() - start, plan_hlo.traffic(hlo)
    return {
        **{name: float(size) for name, size in dataclasses.asdict(memory).items()},
        "fits": memory.peak_bytes <= topology.chip.hbm,
        "hbm_traffic_bytes": moved.hbm_bytes,
        "collectives": {
            kind: {"count": moved.counts[kind], "sent_bytes": moved.sent_bytes[kind]}
            for kind in moved.counts
        },
        "compile_seconds": seconds,
        "unknown": ["memory of the program's machine code, some hundred MB for a large network"],
    }


_PATIENCE = 30.0


def _compile(lowered: Any, options: dict[str, Any], folder: pathlib.Path) -> Any:
    """The compiled program, or the compiler's error; None where it still has not ended
    _PATIENCE seconds after the last of the files that a plan reads lay in `folder`."""
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def compile_it() -> None:
        try:
            outcome.put(lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as e:
            outcome.put(str(e))

    threading.Thread(target=compile_it, daemon=True).start()
    written = None
    while written is None or time.perf_counter() - written < _PATIENCE:
        with contextlib.suppress(queue.Empty):
            return outcome.get(timeout=1)
        if written is None and list(folder.glob("*.after_optimizations_after_buffer_assignment.*")):
            written = time.perf_counter()
    return None


def _memory_of(stats: Any) -> plan_hlo.Memory:
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    return plan_hlo.Memory(stats.argument_size_in_bytes, temporary, held + temporary)


def _written(folder: str, what: str) -> str:
    """The compiler's file of one program."""
    files = list(pathlib.Path(folder).glob(f"*.{what}.txt"))
    if len(files) != 1:
        raise UserError(f"the compiler wrote {len(files)} files of {what}, and not one")
    return files[0].read_text()


def _too_large(message: str) -> Figures:
    """A program that needs more memory than a chip has is refused; the refusal says how much."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    if used is None:
        raise UserError(f"the compiler refused the program: {message.splitlines()[0]}")
    return {
        "argument_bytes": None,
        "temporary_bytes": None,
        "peak_bytes": float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))),
        "fits": False,
        "hbm_traffic_bytes": None,
        "collectives": {},
        "unknown": [
            "traffic and collectives of a program that does not fit: the bound is that of compute"
        ],
    }


def _from_shapes(config: TrainConfig, topology: Topology, mesh: Mesh, tokens: int) -> Figures:
    """What shapes alone say of a step.

    Memory: state and batch as sharded, gradients like parameters, and what the backward pass of
    one microbatch keeps. Traffic: state read and written, the kept written and read. Collectives:
    for the fsdp axis, parameters gathered forward and backward and gradients scattered, for every
    microbatch; for the data axis, gradients summed.
    """
    data, fsdp, parts = mesh.shape["data"], mesh.shape["fsdp"], sharding.batch_parts(mesh)
    state, batch, n = _state_of(config), batch_of(config, tokens), config.microbatches
    held = _bytes_each(state, sharding.shardings(state, mesh))
    params = state["train"]["params"]
    gradients = _bytes_each(params, sharding.shardings(params, mesh))
    kept = _kept_bytes(config.stage, batch_of(config, tokens, config.batch_size // n // parts))
    arguments = held + _size(batch) / parts
    whole = _size(params)
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


def _kept_bytes(config: StageConfig, batch: Any) -> float:
    """What the forward pass on a batch keeps for the backward pass, parameters left out."""
    shapes = tuple((name, x.shape, x.dtype) for name, x in batch.items())
    return _kept_by_shapes(config, shapes)


@functools.cache
def _kept_by_shapes(config: StageConfig, shapes: tuple[Any, ...]) -> float:
    stage = Stage(config)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}

    def residuals(params, batch, key):
        return jax.vjp(lambda p: stage.loss(p, batch, key)[0], params)[1]

    params, key = stage.abstract(), jax.eval_shape(lambda: jax.random.key(0))
    return max(0.0, _size(jax.eval_shape(residuals, params, batch, key)) - _size(params))


def _step_flops(config: TrainConfig, tokens: int) -> float:
    # Neither the mesh nor microbatches change them.
    return _counted(dataclasses.replace(config, mesh=sharding.MeshConfig(), microbatches=1), tokens)


@functools.cache
def _counted(config: TrainConfig, tokens: int) -> float:
    step = train.make_train_step(config, Stage(config.stage), train.make_optimizer(config))
    return flops.count(step, _state_of(config), batch_of(config, tokens))


def _suggestions(config: TrainConfig, topology: Topology, tokens: int) -> list[TrainConfig]:
    """The cheapest settings of each kind of mesh; those without a tensor axis come first."""
    if topology.devices is None:
        return list(itertools.islice(_candidates(config, topology, tokens, (1,)), SUGGESTIONS))
    plain = itertools.islice(_candidates(config, topology, tokens, (1,)), SUGGESTIONS - 2)
    split = itertools.islice(_candidates(config, topology, tokens, (2, 4)), 2)
    return [*plain, *split]


def _candidates(
    config: TrainConfig, topology: Topology, tokens: int, tensors: Sequence[int]
) -> Iterator[TrainConfig]:
    """Settings that seem to fit, from the cheapest: few microbatches, no remat, little sharding.

    tensors: sizes of the tensor axis. A microbatch has at least a picture for each of the devices.
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
        candidate = dataclasses.replace(_with_remat(config, policy), microbatches=n, mesh=mesh)
        absent = _mesh(candidate, dataclasses.replace(topology, devices=None))
        if _from_shapes(candidate, topology, absent, tokens)["fits"]:
            yield candidate


def _with_remat(config: TrainConfig, policy: Any) -> TrainConfig:
    network = dataclasses.replace(config.stage.network, remat=policy)
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, network=network))


def _state_of(config: TrainConfig) -> Any:
    stage, optimizer = Stage(config.stage), train.make_optimizer(config)

    def init(key):
        return train.begin(config, optimizer, stage.init(key))

    return jax.eval_shape(init, jax.random.key(0))


def _mesh(config: TrainConfig, topology: Topology) -> Mesh:
    """The run's mesh. UserError unless it divides the batch."""
    devices = topology.devices or [_AbsentGPU(i) for i in range(topology.count)]
    mesh = sharding.make_mesh(config.mesh, devices)
    train.check_batch(config, mesh)
    return mesh


@dataclasses.dataclass(frozen=True)
class _AbsentGPU:
    """As much of a device as a mesh asks for, on which nothing is ever placed."""

    id: int
    platform: str = "gpu"
    device_kind: str = "GPU"
    process_index: int = 0


def _figures(
    config: TrainConfig,
    topology: Topology,
    mesh: Mesh,
    params: Any,
    measured: Figures,
    *,
    model: float,
    executed: float,
    images: int,
) -> Figures:
    """All figures, by name. Bytes and seconds are of one chip, FLOPs of all chips together.

    model_flops: without recomputation, of which `mfu` is the share of the peak at the bound.
    """
    chip, n = topology.chip, topology.count
    traffic = measured["hbm_traffic_bytes"]
    sent = sum(c["sent_bytes"] for c in measured["collectives"].values())
    times = {
        "compute": executed / n / chip.flops,
        "memory": None if traffic is None else traffic / chip.hbm_bandwidth,
        "interconnect": None if traffic is None else sent / chip.interconnect,
    }
    known = {name: t for name, t in times.items() if t is not None}
    by = max(known, key=lambda name: known[name])
    bound = known[by]
    return {
        "stage": config.stage.name,
        "topology": topology.name,
        "chips": n,
        "mesh": dict(mesh.shape),
        "batch": images,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        **measured,
        "hbm_bytes": chip.hbm,
        "flops": executed,
        "model_flops": model,
        **{f"{name}_seconds": t for name, t in times.items()},
        "bound_seconds": bound,
        "bound_by": by,
        "images_per_second": images / bound,
        "mfu": model / n / chip.flops / bound,
    }


def _bytes_each(tree: Any, placement: Any) -> float:
    """Of one device's part."""
    parts = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placement
    )
    return float(sum(jax.tree.leaves(parts)))


def _size(tree: Any) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
