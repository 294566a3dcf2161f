"""A base model for one GPU and some days: text -> 64 px, 142 million parameters.

    cascade train configs/imagen/base64_mini.py --workdir runs/imagen/mini --data.path pictures

Imagen's base at a quarter of its width, with T5-v1.1-large for the text. Changed from the paper to
suit a small budget: v-prediction, Adam with a larger rate and a cooldown, few DPM-Solver++ steps
for sampling. Nobody has trained this file; 25.6 million pictures are 100 thousand steps.
"""

from cascade.data import FolderData
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.diffusion.samplers import DPMSolverPP2M
from cascade.models import Level, UNetConfig
from cascade.stage import Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining

BATCH = 256


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="base64",
            space=Pixels(resolution=64),
            conditions=(Text(width=1024, context_width=512, dropout=0.1),),
            network=UNetConfig(
                levels=(
                    Level(width=128, blocks=3),
                    Level(width=256, blocks=3, attention=True),
                    Level(width=384, blocks=3, attention=True),
                    Level(width=512, blocks=3, attention=True),
                ),
                head_width=64,
                compute_dtype="bfloat16",
            ),
            schedule=Cosine(),
            prediction="v",
            loss=Loss(space="v"),
            sampling=Sampling(
                steps=32,
                guidance=5.0,
                sampler=DPMSolverPP2M(),
                threshold=Threshold(kind="dynamic", percentile=0.995),
            ),
        ),
        data=FolderData(path="pictures"),
        text_encoder="google/t5-v1_1-large",
        images=100_000 * BATCH,
        batch_size=BATCH,
        optimizer=Optimizer(
            learning_rate=2e-4,
            warmup_images=2_000 * BATCH,
            cooldown_images=20_000 * BATCH,
            b2=0.99,
        ),
        ema_decay=0.9999,
        log_every_images=100 * BATCH,
        save_every_images=5_000 * BATCH,
        preview_every_images=0,
    )
