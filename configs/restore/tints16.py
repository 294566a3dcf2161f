"""A stage that colours red and green squares of one grey: a minute of training to see whether what
is ambiguous comes back in its true proportion.

    cascade train configs/restore/tints16.py --workdir runs/tints
"""

from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.stage import Pixels, Sampling, StageConfig
from cascade.tasks.restore.damage import Grey
from cascade.tasks.restore.source import Source
from cascade.tasks.restore.tints import TintsData
from cascade.tasks.restore.training import RestoreTraining
from cascade.training.job import Optimizer


def config(norm: str = "l2") -> RestoreTraining:
    return RestoreTraining(
        stage=StageConfig(
            name="tints16",
            space=Pixels(resolution=16),
            conditions=(Source(damages=(Grey(),)),),
            network=EfficientUNetConfig(
                patch=2,
                levels=(
                    EfficientLevel(width=24, blocks=1, stride=1),
                    EfficientLevel(width=32, blocks=1),
                    EfficientLevel(width=48, blocks=1),
                ),
                emb_width=48,
            ),
            schedule=Cosine(logsnr_max=6.0),
            prediction="x0",
            loss=Loss(space="x0", norm=norm),
            sampling=Sampling(steps=32, guidance=1.0, threshold=Threshold(kind="static")),
        ),
        data=TintsData(),
        images=48_000,
        batch_size=32,
        optimizer=Optimizer(learning_rate=2e-3, warmup_images=2_000, cooldown_images=16_000),
        ema_decay=0.998,
        log_every_images=4_000,
        save_every_images=16_000,
        preview_every_images=16_000,
    )
