"""SR3 from 16 to 64 px, and a regression of the same size beside it.

    cascade train configs/sr3/sr64.py --workdir runs/sr3
    cascade train configs/sr3/sr64.py --regression True --workdir runs/regression
    cascade train configs/sr3/sr64.py --photographs photographs/train --workdir runs/both

photographs: a folder of pictures that are half of what it learns from, beside scenes;
launch/photographs.py writes one.
"""

from cascade.data.folder import FolderData
from cascade.data.mixture import Mixture
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Augmentation, LowRes, Pixels, Sampling, StageConfig
from cascade.tasks.sr3.regression import RegressionTraining
from cascade.training.job import Optimizer
from cascade.training.stage_training import StageTraining


def config(photographs: str = "", regression: bool = False) -> StageTraining:
    data = ScenesData(split="train")
    if photographs:
        data = Mixture(sources=(data, FolderData(path=photographs)), weights=(1.0, 1.0))
    kind = RegressionTraining if regression else StageTraining
    return kind(
        stage=StageConfig(
            name="sr64",
            space=Pixels(resolution=64),
            conditions=(LowRes(resolution=16, augmentation=Augmentation(max_level=0.0)),),
            # Without attention it enlarges pictures of any size.
            network=EfficientUNetConfig(
                patch=2,
                levels=(
                    EfficientLevel(width=32, blocks=1, stride=1),
                    EfficientLevel(width=48, blocks=1),
                    EfficientLevel(width=64, blocks=1),
                    EfficientLevel(width=80, blocks=1),
                ),
                emb_width=96,
            ),
            schedule=Cosine(logsnr_max=9.0),
            prediction="v",
            loss=Loss(space="v"),
            sampling=Sampling(
                steps=1 if regression else 32,
                guidance=1.0,
                threshold=Threshold(kind="static"),
                aug_level=0.0,
            ),
        ),
        data=data,
        images=40_000,
        batch_size=8,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_images=1_000, cooldown_images=15_000, b2=0.99
        ),
        ema_decay=0.998,
        log_every_images=2_000,
        save_every_images=4_000,
        preview_every_images=4_000,
    )
