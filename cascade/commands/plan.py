"""What a run needs on a TPU slice or GPUs that are not here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from cascade.errors import UserError

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
  --FIELD VALUE        override a field of the config: --mesh.fsdp 16, --batch-size 2048; or
                       --embeddings STORE, with which no text encoder is in memory"""


def main(argv: Sequence[str]) -> None:
    """Run `cascade plan` with the words after it. Raises UserError for a person's mistake."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    path, (options, rest) = argv[0], _options(argv[1:])
    plan = _plan_config if path.endswith(".py") else _plan_model
    print(json.dumps(plan(path, options, rest), indent=2))


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of the command itself, and the words that it leaves to the config."""
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
        options, rest = own.parse_known_args(list(words))
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
    return options, rest


def _plan_config(path: str, options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Returns the figures of a config file, and prints them as a table on stderr."""
    if options.suggest and options.sample:
        raise UserError("--suggest is for training: leave out --sample, or --suggest")
    import jax

    from cascade.commands.train import read_job
    from cascade.planning.figures import table
    from cascade.planning.sampling import plan_sampling
    from cascade.planning.search import suggest
    from cascade.planning.topology import open_topology
    from cascade.planning.training import plan_training
    from cascade.text.tokenizer import DEFAULT_MAX_TOKENS
    from cascade.training.stage_training import StageTraining

    tokens = options.tokens or DEFAULT_MAX_TOKENS
    settings: Any = read_job(path, rest, prog=f"cascade plan {path}")
    if options.sample and not isinstance(settings, StageTraining):
        raise UserError(f"config {path}: --sample draws pictures, which only a stage can")
    jax.config.update("jax_platforms", "cpu")  # nothing runs; other platforms take long to start
    topology = open_topology(options.topology)
    if options.suggest:
        figures = suggest(settings, topology, tokens=tokens)
    elif options.sample:
        figures = plan_sampling(
            settings,
            topology,
            tokens=tokens,
            batch_size=options.sample_batch,
            split_rows=options.split_rows,
        )
    else:
        figures = plan_training(settings, topology, tokens=tokens)
    print(table(figures), file=sys.stderr)
    return figures


def _plan_model(model: str, options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Returns the memory of a model's parts, and prints on stderr whether they fit."""
    if rest:
        raise UserError(f"cascade plan {model}: a model has no field {rest[0]}")
    if not options.sample or options.suggest:
        raise UserError(f"cascade plan {model}: a model is sampled: add --sample, no --suggest")
    import jax

    from cascade.planning.figures import gib
    from cascade.planning.sampling import plan_model
    from cascade.planning.topology import open_topology

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
        f"part by part (--offload) it {fits}: {gib(figures['largest_bytes'])} of "
        f"{gib(figures['hbm_bytes'])}; all weights together take "
        f"{gib(figures['together_weight_bytes'])}",
        file=sys.stderr,
    )
    return figures
