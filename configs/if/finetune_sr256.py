"""DeepFloyd IF's stage II on pictures of yours, from its public weights: LoRA, or all of them.

    cascade train configs/if/finetune_sr256.py --init models/if --workdir runs/if/mine_sr \
        --data.path pictures
    cascade export runs/if/mine_sr models/mine --rest models/if

init: a folder of `cascade convert deepfloyd`, or `STAGE1,STAGE2` as `cascade sample --model` has
them, the folders or their names on the Hugging Face hub. What the second one is decides the
network, its learned variance and its schedules; T5 and its 77 clean tokens come along. --rest puts
the stages that did not train beside this one, and `cascade export runs/if/mine runs/if/mine_sr
models/mine` a base of finetune_base64.py.
Pictures are shrunk to a quarter, enlarged again, and noised at levels 0 to 999, of which the
network is told; it is sampled at level 250. Adapters and memory are those of finetune_base64.py,
and activations are sixteen times as many: hence half the batch.
Nobody has trained this file on the public weights, which are gated; its tests do on random ones.
"""

import dataclasses

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.runner.model_folder import open_model
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining
from cascade.training.trainable import LoRA


def config(init: str) -> StageTraining:
    start = open_model(init)
    enlarging = [stage for stage in start.stages if stage.lowres_resolution is not None]
    if not enlarging:
        raise UserError(f"init={init}: has no super-resolution stage")
    network = dataclasses.replace(
        enlarging[0].network, compute_dtype="bfloat16", remat="nothing_saveable"
    )
    return StageTraining(
        stage=dataclasses.replace(enlarging[0], network=network),
        data=FolderData(path="pictures"),
        text_encoder=start.text_encoder,
        text_tokens=start.max_tokens,
        captions=start.captions,
        text_int8=True,
        init=init,
        trainable=LoRA(rank=16),
        images=16_000,
        batch_size=8,
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, warmup_images=800),
        ema_decay=0.99,
        mesh=MeshConfig(data=-1),
        log_every_images=160,
        save_every_images=4_000,
        preview_every_images=4_000,
    )
