"""The shipped cascade's second super-resolution model: text and 256 px -> 1024 px.

    cascade train configs/scenes/sr1024.py --workdir runs/sr1024

Trained on crops and without self-attention, so that it draws pictures larger than it saw.
"""

from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, StageConfig, Text
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    return StageTraining(
        stage=StageConfig(
            name="sr1024",
            space=Pixels(resolution=1024),
            conditions=(
                LowRes(resolution=256, augmentation=Augmentation(max_level=0.3), residual=True),
                Text(width=128, head_width=32),
            ),
            network=EfficientUNetConfig(
                # 4x4 pixels, one of the small picture, enter as one. 8x8 is faster, and leaves four
                # times as many places of an edge in its square to be learned.
                patch=4,
                levels=(
                    EfficientLevel(width=32, blocks=1, stride=1),
                    EfficientLevel(width=64, blocks=1, text_attention=True),
                    EfficientLevel(width=64, blocks=1),
                ),
                head_width=32,
                emb_width=128,
            ),
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(1024, reference=64)),
            prediction="x0",
            loss=Loss(space="v"),
            # Dynamic thresholding tames guidance, of which there is none here: a picture with a few
            # values beyond the range would be scaled down whole, white backgrounds to gray.
            sampling=Sampling(
                steps=2, guidance=1.0, threshold=Threshold(kind="static"), aug_level=0.03
            ),
        ),
        data=ScenesData(split="train"),
        crop=256,
        images=47_000,
        batch_size=8,
        optimizer=Optimizer(learning_rate=1e-3, warmup_images=800, cooldown_images=20_000, b2=0.99),
        ema_decay=0.999,
        save_every_images=2_000,
        preview_every_images=8_000,
    )
