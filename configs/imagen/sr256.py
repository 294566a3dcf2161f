"""Imagen's first super-resolution model at the paper's size: text and 64 px -> 256 px, 580 million.

    cascade train configs/imagen/sr256.py --workdir runs/imagen/sr256 --data.path pictures

Saharia et al. 2022, app. B.1 and F: 128 TPU v4 chips, 2.5 million steps of 2048 pictures; nobody
has trained this file. Open in the paper and chosen here: as in base64.py, uniform augmentation
levels, 128 steps, level .2 of the .1 to .3 that the paper finds best to look at, guidance 5 as in
its figure A.10 (8 for the best FID).
"""

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.diffusion.samplers import Ancestral
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.stage import LowRes, Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining

BATCH = 2048


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="sr256",
            space=Pixels(resolution=256),
            conditions=(
                LowRes(resolution=64),
                Text(width=4096, head_width=128, dropout=0.1),
            ),
            network=EfficientUNetConfig(
                levels=(
                    EfficientLevel(width=128, blocks=2),
                    EfficientLevel(width=256, blocks=4),
                    EfficientLevel(width=512, blocks=8),
                    EfficientLevel(width=1024, blocks=8, self_attention=True, text_attention=True),
                ),
                head_width=128,  # 8 heads at width 1024
                compute_dtype="bfloat16",
                remat="nothing_saveable",
            ),
            schedule=Cosine(),
            prediction="eps",
            loss=Loss(space="eps"),
            sampling=Sampling(
                steps=128,
                guidance=5.0,
                sampler=Ancestral(),
                threshold=Threshold(kind="dynamic", percentile=0.995),
                aug_level=0.2,
            ),
        ),
        data=FolderData(path="pictures"),
        text_encoder="google/t5-v1_1-xxl",
        images=2_500_000 * BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            name="adam",
            learning_rate=1e-4,
            warmup_images=10_000 * BATCH,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
        ),
        ema_decay=0.9999,
        mesh=MeshConfig(data=1, fsdp=-1),
        log_every_images=100 * BATCH,
        save_every_images=5_000 * BATCH,
        preview_every_images=0,
    )
