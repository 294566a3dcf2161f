"""Measure this machine: time to a picture, training speed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cascade import config
from cascade.devices import xla_flags
from cascade.errors import OptionError, UserError

if TYPE_CHECKING:
    from cascade.training.job import Job

PROMPT = "a small red circle above a big blue square on gray"


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Time `cascade sample` as a person meets it: whole processes, one prompt, all stages.

    The first run starts with an empty compilation cache, the second one finds it filled.
    """

    model: str = "scenes"
    """A model that ships (scenes), or a folder that `cascade export` wrote."""
    prompt: str = PROMPT
    """What to draw."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Time the train step of a config on random pictures and text: no data, no text encoder.

    FILE is a config as `cascade train` takes it, with its overrides (--batch-size 4), and with the
    arguments of its function config(), such as the --init MODEL of configs/finetune.py;
    weights are random, whatever that names. The mesh is the config's, over all devices. MFU counts
    the FLOPs of matrix products and convolutions, forward and backward, without what remat computes
    again.
    """

    steps: int = 10
    """Steps timed, after two that compile and warm up."""
    tokens: int = 128
    """Tokens of each text."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Time the compiler on a config's loss and its gradient, for one device of this machine.

    Nothing is run and no parameter exists, so a stage of any size will do. FILE is a config as for
    `cascade bench train`.
    """

    tokens: int = 128
    """Tokens of each text."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingsOptions:
    """Time how one thread of this machine reads a store of embeddings, at random, as a data worker
    does: texts found by their hashes, padded, in batches of 64.

    Files that are in memory already are read from there; the second half of the reads is timed.
    """

    store: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")] = None
    """A store that `cascade data embed` made; None makes one for the time being, of 2048 texts as
    long as COCO's captions (11 words, give or take 2.4, of 1.25 tokens each, and the end of
    sequence), whose embeddings are random and 4096 wide."""
    reads: int = 4096
    """Texts that are read."""
    tokens: int = 128
    """Length in tokens that texts are padded to."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Time the reading of a dataset as training reads it, in one process, and tell if it is enough.

    Examples are taken at random, so pictures that this machine has read before may come from its
    memory.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset, as for `cascade data inspect`."""
    split: str = "train"
    """The split, of a dataset that has splits."""
    resolution: int = 64
    """Side of the pictures in pixels."""
    count: int = 500
    """Examples that are read, after ten more."""
    trainer: float | None = None
    """Images a second that a trainer takes; it is then told whether it would wait."""


USAGE = """usage: cascade bench sample [--model NAME|DIR] [--prompt TEXT]
       cascade bench train --config FILE [--FIELD VALUE ...] [--steps N] [--tokens N]
       cascade bench compile --config FILE [--FIELD VALUE ...] [--tokens N]
       cascade bench data SOURCE [--resolution N] [--trainer IMAGES_A_SECOND]
       cascade bench embeddings [STORE] [--reads N] [--tokens N]
       cascade bench unet [--size S|M|IF-I-M|SR-S] [--cores N] [--repeats N]

Measure this machine; the figures are JSON on stdout.

  sample   whole runs of `cascade sample`: the first, which compiles, and the second
  train    the train step of a config: images a second, share of the chip's peak
  compile  the compiler on a config's loss and gradient
  data     the reading of a dataset: images a second of one core, enough for a trainer or not
  embeddings
           a store of embeddings: reads a second, bytes a text
  unet     one UNet forward, ours against diffusers' in PyTorch where it is installed

`cascade bench VERB --help` tells of each word."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade bench` with the words after it. Raises UserError for a person's mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "sample":
        options = config.parse(SampleOptions, argv[1:], prog="cascade bench sample")
        print(json.dumps(bench_sample(options), indent=2))
    elif argv[0] == "train":
        xla_flags.apply(xla_flags.expected_backend(), os.environ)
        _on_config(bench_train, TrainOptions, argv)
    elif argv[0] == "compile":
        # A program found in a cache would say nothing of the compiler.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        _on_config(bench_compile, CompileOptions, argv)
    elif argv[0] == "data":
        options = config.parse(DataOptions, argv[1:], prog="cascade bench data")
        print(json.dumps(bench_data(options), indent=2))
    elif argv[0] == "embeddings":
        options = config.parse(EmbeddingsOptions, argv[1:], prog="cascade bench embeddings")
        print(json.dumps(bench_embeddings(options), indent=2))
    elif argv[0] == "unet":
        from cascade.published.deepfloyd.bench import UNetOptions, bench_unet

        options = config.parse(UNetOptions, argv[1:], prog="cascade bench unet")
        print(json.dumps(bench_unet(options), indent=2))
    else:
        raise UserError(
            f"cascade bench {argv[0]}: must be sample, train, compile, data, embeddings or unet"
        )


def bench_train(job: Job, options: TrainOptions) -> dict[str, Any]:
    """Time the train step of a job on this machine: images a second, and what follows from it.

    Returns the figures as JSON values. mfu is None on a device that is not in the table of chips.
    Raises UserError for steps below 1, and for a batch that the mesh does not divide.
    """
    import jax

    from cascade.devices import sharding
    from cascade.devices.chips import chip_of
    from cascade.training.loop import check_batch
    from cascade.training.step import begin, make_train_step, step_flops

    if options.steps < 1:
        raise UserError(f"--steps must be 1 or more, got {options.steps}")
    b = job.batch_size
    mesh = sharding.make_mesh(job.mesh)
    check_batch(job, mesh)
    optimizer = job.transformation()
    key = jax.random.key(0, impl="rbg")

    def init(key):
        return begin(job, optimizer, job.fresh(key))

    placement = sharding.shardings(jax.eval_shape(init, key), mesh)
    state = jax.jit(init, out_shardings=placement)(key)
    batch = sharding.shard_batch(_random_batch(job, options.tokens), mesh)
    step = jax.jit(
        make_train_step(job, optimizer, mesh),
        in_shardings=(placement, sharding.batch_sharding(mesh)),
        out_shardings=(placement, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    work = step_flops(job, step, state, batch)
    parameters = sum(x.size for x in jax.tree.leaves(state["train"]["params"]))
    start = time.perf_counter()
    print("compiling ...", file=sys.stderr)
    for _ in range(2):
        state, metrics = jax.block_until_ready(step(state, batch))
    warm = time.perf_counter()
    for _ in range(options.steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - warm) / options.steps
    device = jax.devices()[0]
    chip, rate = chip_of(device.device_kind), work / seconds / jax.device_count()
    return {
        "stage": job.name,
        "parameters": parameters,
        "batch_size": b,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "images_per_second": _rounded(b / seconds),
        "step_seconds": _rounded(seconds),
        "first_two_steps_seconds": round(warm - start, 2),
        "tflops_per_device": _rounded(rate / 1e12),
        "mfu": _rounded(rate / chip.flops) if chip else None,
        "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def bench_compile(job: Job, options: CompileOptions) -> dict[str, Any]:
    """Time the lowering and the compilation of a job's loss and gradient, and tell their size.

    Returns the figures as JSON values. cpu_seconds is the time of both together over all cores,
    which other work on the machine does not stretch. hlo_bytes is the size of the program's text,
    hlo_bytes_compiled that of its text once optimized.
    """
    import jax

    if options.tokens < 1:
        raise UserError(f"--tokens must be 1 or more, got {options.tokens}")
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, batch = jax.eval_shape(job.fresh, key), job.batch_shapes(options.tokens)
    start, worked = time.perf_counter(), time.process_time()
    print("lowering ...", file=sys.stderr)
    lowered = jax.jit(jax.value_and_grad(job.loss, has_aux=True)).lower(params, batch, key)
    compiling = time.perf_counter()
    print("compiling ...", file=sys.stderr)
    program = lowered.compile()
    done, worked = time.perf_counter(), time.process_time() - worked
    return {
        "stage": job.name,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "batch_size": job.batch_size,
        "device": jax.devices()[0].device_kind,
        "lower_seconds": round(compiling - start, 2),
        "compile_seconds": round(done - compiling, 2),
        "cpu_seconds": round(worked, 2),
        "hlo_bytes": len(lowered.as_text()),
        "hlo_bytes_compiled": len(program.as_text() or ""),
    }


def bench_data(options: DataOptions) -> dict[str, Any]:
    """Time the reading of a dataset in one process, as JSON values.

    images_per_second_per_core counts the time that the processor worked, and
    images_per_second_of_a_reader the waiting for the disk too; `cores` of them together are taken
    for what all cores can do. Raises UserError as `Data.open` does, and where nothing can be read.
    """
    import numpy as np

    from cascade.data.source import BadRecord
    from cascade.scenes.words import dataset

    if options.count < 1 or options.resolution < 1:
        raise UserError(
            f"--count and --resolution must be 1 or more, got {options.count} and "
            f"{options.resolution}"
        )
    began = time.perf_counter()
    source = dataset(options.source, options.split).open(options.resolution)
    opened, rng = time.perf_counter() - began, np.random.default_rng(0)
    for index in rng.integers(len(source), size=10):
        with contextlib.suppress(BadRecord):
            source.drawn(int(index), rng)
    bad, start, worked = 0, time.perf_counter(), time.process_time()
    for index in rng.integers(len(source), size=options.count):
        try:
            source.drawn(int(index), rng)
        except BadRecord:
            bad += 1
    worked, waited = time.process_time() - worked, time.perf_counter() - start
    if bad == options.count:
        raise UserError(f"{options.source}: none of {bad} examples can be read; inspect it")
    read, cores = options.count - bad, os.cpu_count() or 1
    told: dict[str, Any] = {
        "examples": len(source),
        "open_seconds": round(opened, 2),
        "read": read,
        "bad_records": bad,
        "images_per_second_per_core": _rounded(read / worked),
        "images_per_second_of_a_reader": _rounded(read / waited),
        "cores": cores,
    }
    if options.trainer is not None:
        told["trainer_images_per_second"] = options.trainer
        told["trainer_waits"] = read / waited * cores < options.trainer
    return told


def bench_embeddings(options: EmbeddingsOptions) -> dict[str, Any]:
    """Time reads of a store by one thread, as JSON values.

    bytes_per_text is that of all its shards; padded_bytes_per_text what `tokens` tokens of float16
    would take, and smaller the first in the second. Raises UserError for numbers below 1, and for a
    store as `open_store` does.
    """
    for name in ("reads", "tokens"):
        if (value := getattr(options, name)) < 1:
            raise OptionError(name, value, "must be 1 or more")
    if options.store is not None:
        return _read_store(options.store, options)
    with tempfile.TemporaryDirectory() as folder:
        _write_random_store(Path(folder))
        return _read_store(folder, options) | {"store": None}


def _write_random_store(folder: Path) -> None:
    """Make a store of 2048 texts as long as COCO's captions."""
    import numpy as np

    from cascade.text import store_making
    from cascade.text.store import Making

    rng, texts = np.random.default_rng(0), store_making.Gathered(1, [0])
    for i in range(2048):
        texts.add(str(i))
    making = Making(
        texts_digest=texts.digest,
        text_encoder="none",
        encoder_digest="",
        text_int8=False,
        captions="verbatim",
        max_tokens=128,
        window=512,
        width=4096,
        dtype="int8",
        shards=1,
    )

    def encode(texts: Sequence[str]) -> Iterator[tuple[int, Any]]:
        for row in range(len(texts)):
            length = round(1.25 * max(5, rng.normal(11, 2.4))) + 1
            yield row, rng.standard_normal((length, making.width), np.float32)

    facts = [store_making.make_shard(folder, 0, making, texts.texts[0], encode)]
    store_making.finish(folder, store_making.config_of(making, facts, ""), facts)


def _read_store(name: str, options: EmbeddingsOptions) -> dict[str, Any]:
    import numpy as np

    from cascade.text.store import open_store, shard_names

    store = open_store(name)
    made, rng = store.config, np.random.default_rng(0)
    names = shard_names(made)
    size = sum((store.folder / name).stat().st_size for name in names)
    each = size / max(1, made.texts)
    padded = 2 * options.tokens * made.width
    sizes = np.array([len(store.shard(n).hashes) for n in range(made.shards)])
    chosen = rng.choice(made.shards, options.reads, p=sizes / sizes.sum()).tolist()
    hashes = [store.shard(n).hashes[rng.integers(sizes[n])].tobytes() for n in chosen]
    batches = [hashes[i : i + 64] for i in range(0, len(hashes), 64)]
    half = len(batches) // 2
    for batch in batches[:half]:
        store.read_hashes(batch, options.tokens)
    start = time.perf_counter()
    for batch in batches[half:]:
        store.read_hashes(batch, options.tokens)
    seconds = time.perf_counter() - start
    return {
        "store": name,
        "dtype": made.dtype,
        "width": made.width,
        "texts": made.texts,
        "tokens_per_text": round(made.tokens / max(1, made.texts), 2),
        "bytes_per_text": round(each, 1),
        "padded_bytes_per_text": padded,
        "smaller": round(padded / each, 2),
        "lowest_cosine": made.lowest_cosine,
        "reads_per_second": _rounded(sum(map(len, batches[half:])) / seconds),
    }


def _rounded(value: float) -> float:
    """The value to four digits, wherever they begin: a slow machine's is small, not nothing."""
    return float(f"{value:.4g}")


def _on_config(bench: Any, kind: Any, argv: Sequence[str]) -> None:
    """Do what `cascade bench VERB --config FILE ...` asks for, and print it."""
    from cascade.commands.train import read_job

    prog = f"cascade bench {argv[0]} --config FILE"
    path, rest = config.take(argv[1:], "--config")
    if {"-h", "--help"} & set(rest):
        config.parse(kind, ["--help"], prog=prog)
    if path is None:
        raise UserError(f"{prog}: --config is missing; give a file as configs/tiny/base64.py")
    own = []
    for field in dataclasses.fields(kind):
        value, rest = config.take(rest, f"--{field.name}")
        own += [] if value is None else [f"--{field.name}", value]
    options = config.parse(kind, own, prog=prog)
    print(json.dumps(bench(read_job(path, rest, prog=prog), options), indent=2))


def _random_batch(job: Job, tokens: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)

    def filled(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if dtype == np.bool_:
            return np.ones(shape, bool)
        if np.issubdtype(dtype, np.integer):
            return rng.integers(0, 256, shape, dtype)
        return rng.standard_normal(shape, dtype)

    return {name: filled(x.shape, x.dtype) for name, x in job.batch_shapes(tokens).items()}


def bench_sample(options: SampleOptions) -> dict[str, Any]:
    """Time a first and a second run of `cascade sample`, as JSON values.

    peak_memory_bytes is that of the larger of the two. Raises UserError as the run does.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "cascade", "sample", options.prompt),
            *("--model", options.model, "--out", str(Path(folder) / "samples")),
        ]
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        seconds = []
        for name in ("first run", "second run"):
            print(f"{name} ...", file=sys.stderr)
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds.append(round(time.perf_counter() - start, 2))
            if done.returncode:
                raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return {
        "first_run_seconds": seconds[0],
        "second_run_seconds": seconds[1],
        "peak_memory_bytes": peak,
        "cores": os.cpu_count(),
    }
