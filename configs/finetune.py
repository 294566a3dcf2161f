"""Your own pictures taught to a model that is there: LoRA adapters, or all of its weights.

    cascade train configs/finetune.py --data folder:pictures --workdir runs/mine
    cascade export runs/mine mine --rest scenes

FINETUNE.md tells all of it, from a folder of twenty pictures to samples.

--init NAME    the model to begin from, as `cascade sample --model` names it: one that ships, a
               folder of `cascade export` or of `cascade convert`, a name on the Hugging Face hub.
               What it is decides network, text encoder and captions. Without it, scenes.
--stage NAME   which of its stages learns; without it, the first. `cascade models` names them.

A stage of up to 100M parameters learns all its weights. A larger one learns adapters of rank 16,
and its weights stay as they are in bfloat16, two bytes each, and T5 in int8; all of them learn
with `--lora-rank 0 --optimizer.learning-rate 1e-5`, in twenty bytes (float32 with its average,
Adam's moments and gradients). Nobody has trained this file on the public weights of DeepFloyd IF,
which are gated; its tests do on random ones.
"""

import dataclasses
import math

import jax

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.runner.model_folder import open_model
from cascade.stage import Stage
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining
from cascade.training.trainable import LoRA, Weights


def config(init: str = "scenes", stage: str = "") -> StageTraining:
    model = open_model(init)
    named = {one.name: one for one in model.stages}
    if stage and stage not in named:
        raise UserError(f"stage={stage}: {init} has no such stage, only {', '.join(named)}")
    chosen = named[stage] if stage else model.stages[0]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(Stage(chosen).abstract()))
    if large := count > 100e6:
        network = dataclasses.replace(
            chosen.network, compute_dtype="bfloat16", remat="nothing_saveable"
        )
        chosen = dataclasses.replace(chosen, network=network)
    enlarges = chosen.lowres is not None
    return StageTraining(
        stage=chosen,
        data=FolderData(path="pictures"),
        crop=256 if enlarges and chosen.resolution > 256 else None,
        text_encoder=model.text_encoder,
        text_tokens=model.max_tokens,
        captions=model.captions,
        text_int8=large,
        init=init,
        trainable=LoRA(rank=16) if large else Weights(),
        images=16_000 if large else 3_200,
        batch_size=8 if enlarges else 16,
        optimizer=Optimizer(name="adamw", learning_rate=1e-4 if large else 1e-3, warmup_images=320),
        ema_decay=0.99,
        mesh=MeshConfig(data=-1),
        log_every_images=160,
        save_every_images=1_600,
        preview_every_images=1_600,
        preview_captions=4,
    )
