"""A base model small enough to watch while it learns: three minutes on two CPU cores.

    cascade train configs/tiny/base64.py --workdir runs/tiny/base64

On scenes of one object, it learns backgrounds first, then colours and sizes; shapes take longer.
"""

from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.models import Level, UNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="base64",
            space=Pixels(resolution=64),
            conditions=(Text(width=128, head_width=32),),
            network=UNetConfig(
                patch=8,
                levels=(Level(width=64, blocks=1, attention=True),),
                head_width=32,
                emb_width=128,
                coordinates=True,
            ),
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(64, reference=16)),
            prediction="x0",
            loss=Loss(weighting="debiased"),
            sampling=Sampling(steps=16, guidance=3.0),
        ),
        data=ScenesData(split="train", max_objects=1),
        text_tokens=32,  # captions of one object have at most 15
        images=10_000,
        batch_size=16,
        optimizer=Optimizer(learning_rate=2e-3, warmup_images=500, cooldown_images=4_000, b2=0.99),
        ema_decay=0.99,
        log_every_images=640,
        save_every_images=4_000,
        preview_every_images=4_000,
        preview_prompts=(
            "a big red circle on white",
            "a big blue square on black",
            "a big green star on gray",
            "a big yellow cross on navy",
        ),
    )
