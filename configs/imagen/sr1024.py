"""Imagen's second super-resolution model: text and 256 px -> 1024 px, 576 million parameters.

    cascade train configs/imagen/sr1024.py --workdir runs/imagen/sr1024 --data.path pictures

Saharia et al. 2022, app. B.1 and F: 128 TPU v4 chips, 2.5 million steps of 2048 crops of 256 px;
nobody has trained this file. The paper calls it a model of 400 million, but prints for it the
widths and blocks of the first one: without self-attention these make 576, and no reading of the
list makes 400. We follow the list. The rest as in sr256.py; steps and guidance are ours.
"""

from cascade.data import FolderData
from cascade.devices.sharding import MeshConfig
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import LinearVP
from cascade.diffusion.samplers import Ancestral
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.stage import LowRes, Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining

BATCH = 2048


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="sr1024",
            space=Pixels(resolution=1024),
            conditions=(
                LowRes(resolution=256),
                Text(width=4096, head_width=128, dropout=0.1),
            ),
            network=EfficientUNetConfig(
                levels=(
                    EfficientLevel(width=128, blocks=2),
                    EfficientLevel(width=256, blocks=4),
                    EfficientLevel(width=512, blocks=8),
                    EfficientLevel(width=1024, blocks=8, text_attention=True),
                ),
                head_width=128,  # 8 heads at width 1024
                compute_dtype="bfloat16",
                remat="nothing_saveable",
            ),
            schedule=LinearVP(),
            prediction="eps",
            loss=Loss(space="eps"),
            sampling=Sampling(
                steps=32,
                guidance=5.0,
                sampler=Ancestral(),
                threshold=Threshold(kind="dynamic", percentile=0.995),
                aug_level=0.1,
            ),
        ),
        data=FolderData(path="pictures"),
        text_encoder="google/t5-v1_1-xxl",
        crop=256,
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
