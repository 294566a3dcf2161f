"""A super-resolution model small enough to learn while one watches: 64 px -> 256 px.

cascade train configs/tiny/sr256.py --workdir runs/tiny/sr256
"""

from cascade.diffusion.denoise import Threshold
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="sr256",
            space=Pixels(resolution=256),
            conditions=(
                LowRes(resolution=64, augmentation=Augmentation(max_level=0.3), residual=True),
                Text(width=128, head_width=32),
            ),
            network=EfficientUNetConfig(
                patch=4,
                levels=(
                    EfficientLevel(width=64, blocks=1, stride=1),
                    EfficientLevel(width=64, blocks=1, text_attention=True),
                ),
                head_width=32,
                emb_width=128,
            ),
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(256, reference=64)),
            prediction="x0",
            # No guidance, so nothing for dynamic thresholding: see configs/scenes/sr256.py.
            sampling=Sampling(
                steps=6, guidance=1.0, threshold=Threshold(kind="static"), aug_level=0.03
            ),
        ),
        data=ScenesData(split="train"),
        crop=64,
        text_tokens=32,  # the base's
        images=3_000,
        batch_size=16,
        optimizer=Optimizer(learning_rate=2e-3, warmup_images=500, cooldown_images=1_000, b2=0.99),
        ema_decay=0.99,
        log_every_images=320,
        save_every_images=1_000,
        preview_every_images=1_000,
    )
