"""DeepFloyd IF's stage I on pictures of yours, from its public weights: LoRA, or all of them.

    cascade train configs/if/finetune_base64.py --init models/if --workdir runs/if/mine \
        --data.path pictures
    cascade export runs/if/mine models/mine --rest models/if

init: a folder of `cascade convert deepfloyd`, or a stage's own folder, or its name on the Hugging
Face hub. What it is decides the network; T5 and its 77 clean tokens come along. --rest puts the
other stages of a model beside the trained one.
The adapters are of rank 16, and the weights themselves stay as they are, in two bytes a parameter;
`--lora-rank 0 --optimizer.learning-rate 1e-5` trains all of them instead, in twenty bytes (float32
with its average, Adam's moments and gradients). T5-XXL is kept in int8, in 5.4 GB.
Nobody has trained this file on the public weights, which are gated; its tests do on random ones.
"""

import dataclasses

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.runner.model_folder import open_model
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining
from cascade.training.trainable import LoRA


def config(init: str) -> StageTraining:
    model = open_model(init)
    stage = model.stages[0]
    network = dataclasses.replace(stage.network, compute_dtype="bfloat16", remat="nothing_saveable")
    return StageTraining(
        stage=dataclasses.replace(stage, network=network),
        data=FolderData(path="pictures"),
        text_encoder=model.text_encoder,
        text_tokens=model.max_tokens,
        captions=model.captions,
        text_int8=True,
        init=init,
        trainable=LoRA(rank=16),
        images=16_000,
        batch_size=16,
        optimizer=Optimizer(name="adamw", learning_rate=1e-4, warmup_images=800),
        ema_decay=0.99,
        mesh=MeshConfig(data=-1),
        log_every_images=160,
        save_every_images=4_000,
        preview_every_images=4_000,
        preview_prompts=("a photo of it on a beach", "a photo of it in the snow"),
    )
