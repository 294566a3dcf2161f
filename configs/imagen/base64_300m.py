"""The base model at the size of Imagen's ablations: text -> 64 px, 328 million parameters.

    cascade train configs/imagen/base64_300m.py --workdir runs/imagen/300m --data.path pictures

Saharia et al. 2022, app. D, compare text encoders, sizes and guidance with models of 300 million
after 400 thousand steps of 2048 pictures: a research budget that has published figures. The widths
are those of the ImageNet-64 model of Dhariwal & Nichol 2021. Nobody has trained this file.
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
            conditions=(Text(width=4096, context_width=768, dropout=0.1),),
            network=UNetConfig(
                levels=(
                    Level(width=192, blocks=3),
                    Level(width=384, blocks=3, attention=True),
                    Level(width=576, blocks=3, attention=True),
                    Level(width=768, blocks=3, attention=True),
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
        images=400_000 * BATCH,
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
