"""Imagen's base model at the paper's size: text -> 64 px, 2.28 billion parameters.

    cascade train configs/imagen/base64.py --workdir runs/imagen/base64 --data.path pictures

Saharia et al. 2022, app. F: 256 TPU v4 chips, 2.5 million steps of 2048 pictures; nobody
has trained this file. What the paper leaves open is chosen here: 128 tokens, the projection
of their embeddings to 2048 before the attention layers, EMA .9999, bfloat16, clipping, a constant
rate after the warm-up (its printed end value is a slip), 256 ancestral steps, guidance 5 as in its
figure A.10 (1.35 for the best FID). Its "2B" fits this reading; Linears from 4096 in every layer
would be 2.41.
"""

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.diffusion.samplers import Ancestral
from cascade.models import Level, UNetConfig
from cascade.stage import Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining

BATCH = 2048


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="base64",
            space=Pixels(resolution=64),
            conditions=(Text(width=4096, context_width=2048, dropout=0.1),),
            network=UNetConfig(
                levels=(
                    Level(width=512, blocks=3),
                    Level(width=1024, blocks=3, attention=True),
                    Level(width=1536, blocks=3, attention=True),
                    Level(width=2048, blocks=3, attention=True),
                ),
                head_width=64,
                compute_dtype="bfloat16",
                remat="nothing_saveable",
            ),
            schedule=Cosine(),
            prediction="eps",
            loss=Loss(space="eps"),
            sampling=Sampling(
                steps=256,
                guidance=5.0,
                sampler=Ancestral(),
                threshold=Threshold(kind="dynamic", percentile=0.995),
            ),
        ),
        data=FolderData(path="pictures"),
        text_encoder="google/t5-v1_1-xxl",
        images=2_500_000 * BATCH,
        batch_size=BATCH,
        # Relative to the size of each parameter, as optax's default is.
        optimizer=Optimizer(
            name="adafactor", learning_rate=1e-4, warmup_images=10_000 * BATCH, weight_decay=0.0
        ),
        ema_decay=0.9999,
        mesh=MeshConfig(data=1, fsdp=-1),
        log_every_images=100 * BATCH,
        save_every_images=5_000 * BATCH,
        preview_every_images=0,
    )
