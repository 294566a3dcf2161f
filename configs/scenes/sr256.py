"""The shipped cascade's first super-resolution model: text and 64 px -> 256 px.

    cascade train configs/scenes/sr256.py --workdir runs/sr256 --init PAIRS_MODEL

PAIRS_MODEL is what `cascade export` makes of a run of sr256_pairs.py; without --init it starts from
nothing, and small things get the finish of others.
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
            name="sr256",
            space=Pixels(resolution=256),
            conditions=(
                LowRes(resolution=64, augmentation=Augmentation(max_level=0.5), residual=True),
                Text(width=128, head_width=32),
            ),
            network=EfficientUNetConfig(
                patch=4,
                levels=(
                    # Which thing has which finish is learned sooner where finishes are drawn:
                    # configs/scenes/README.md.
                    EfficientLevel(width=64, blocks=1, stride=1, text_attention=True),
                    EfficientLevel(width=96, blocks=1),
                    EfficientLevel(width=128, blocks=2, text_attention=True),
                ),
                head_width=32,
                emb_width=128,
            ),
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(256, reference=64)),
            prediction="x0",
            loss=Loss(space="v"),
            # Dynamic thresholding tames guidance, of which there is none here: a picture with a few
            # values beyond the range would be scaled down whole, white backgrounds to gray.
            sampling=Sampling(
                steps=4, guidance=1.0, threshold=Threshold(kind="static"), aug_level=0.03
            ),
        ),
        data=ScenesData(split="train"),
        crop=128,
        images=143_000,
        batch_size=8,
        optimizer=Optimizer(learning_rate=8e-4, warmup_images=800, cooldown_images=15_000, b2=0.99),
        ema_decay=0.998,
        save_every_images=4_000,
        preview_every_images=4_000,
    )
