"""What the frozen text encoder adds to a training step that embeds its captions as they come.

A run from a store of embeddings has no encoder, and none of this.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cascade.devices import flops, sharding
from cascade.errors import UserError
from cascade.models.t5 import T5Config
from cascade.planning.figures import Figures, bytes_each, tree_bytes
from cascade.planning.topology import Topology
from cascade.text.t5 import SHIPPED, T5Encoder, locate, read_config, target
from cascade.text.tokenizer import Tokenizer
from cascade.training.job import Job
from cascade.training.stage_training import StageTraining

# Columns: d_model, d_ff, layers, heads (Raffel et al. 2020; v1.1 on the hub). All have heads 64
# wide and 32128 ids.
# fmt: off
SIZES = {
    "google/t5-v1_1-small": (512,   1024,  8,  6),
    "google/t5-v1_1-base":  (768,   2048, 12, 12),
    "google/t5-v1_1-large": (1024,  2816, 24, 16),
    "google/t5-v1_1-xl":    (2048,  5120, 24, 32),
    "google/t5-v1_1-xxl":   (4096, 10240, 24, 64),
}
# fmt: on
"""The sizes of encoders on the hub, which need not be downloaded to plan."""


def plan_text_encoder(
    job: Job, topology: Topology, mesh: Mesh, step: Figures, tokens: int
) -> Figures:
    """Returns {"text_encoder": the figures of one batch that the encoder embeds before a step}.

    They are None where the run loads no encoder, for a store has its embeddings or no text is read;
    one that is loaded for what a store lacks is counted as if it embedded all.
    Bytes and seconds are of one chip; `bound_seconds`, `peak_bytes`, `fits` and `images_per_second`
    are of encoder and step together, one after the other. step: the figures of the step alone.
    Memory and traffic are those of the weights. Where the encoder's size is not known here, there
    is a note of that under "unknown".
    """
    if not isinstance(job, StageTraining) or job.stage.text is None:
        return {"text_encoder": None}
    if job.embeddings is not None and job.embeddings_missing == "refuse":
        return {"text_encoder": None}
    name = job.text_encoder
    config = _config(name)
    if config is None:
        note = f"the text encoder {name}, which is not here: its memory and time come on top"
        return {"text_encoder": None, "unknown": [*step["unknown"], note]}
    config = dataclasses.replace(config, int8=job.text_int8)
    params = target(config)
    encoder = T5Encoder(config, {}, Tokenizer(b"", tokens))  # tokenizes nothing
    b, chip = job.batch_size, topology.chip
    ids, mask = (jax.ShapeDtypeStruct((b, tokens), kind) for kind in (jnp.int32, jnp.bool_))
    work = flops.count(encoder.apply, params, ids, mask)
    held = bytes_each(params, sharding.shardings(params, mesh))
    fsdp, share = mesh.shape["fsdp"], tree_bytes(params) / mesh.shape["tensor"]
    times = {
        "compute": work / topology.count / chip.flops,
        "memory": share / chip.hbm_bandwidth,
        "interconnect": share * (fsdp - 1) / fsdp / chip.interconnect,
    }
    seconds = step["bound_seconds"] + max(times.values())
    peak = None if step["peak_bytes"] is None else step["peak_bytes"] + held
    return {
        "text_encoder": {
            "name": name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "weight_bytes": held,
            "flops": work,
            **{f"{resource}_seconds": t for resource, t in times.items()},
            "bound_seconds": seconds,
            "peak_bytes": peak,
            "fits": None if peak is None else peak <= chip.hbm,
            "images_per_second": b / seconds,
        }
    }


def _config(name: str) -> T5Config | None:
    """The encoder's sizes, if they can be known without a network."""
    if name in SHIPPED or Path(name).is_dir():
        try:
            return read_config(locate(name))
        except UserError:  # the run will say what is wrong with it
            return None
    size = SIZES.get(name.partition("@")[0])
    if size is None:
        return None
    d_model, d_ff, layers, heads = size
    return T5Config(
        vocab_size=32128, d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads
    )
