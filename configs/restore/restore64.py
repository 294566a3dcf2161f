"""A stage that colours, fills, widens and cleans pictures: Palette's four tasks, in 64 px windows.

    cascade train configs/restore/restore64.py --workdir runs/restore
    cascade train configs/restore/restore64.py --tasks jpeg --workdir runs/jpeg
    cascade train configs/restore/restore64.py --photographs photographs/train --workdir runs/both

tasks: of colouring, jpeg, inpainting and uncropping, those that it learns, with commas between.
photographs: a folder of pictures that are half of what it learns from, beside scenes;
launch/photographs.py writes one. norm: l2, or l1, whose pictures are less varied.
"""

from cascade.data.folder import FolderData
from cascade.data.mixture import Mixture
from cascade.diffusion.denoise import Threshold
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.errors import UserError
from cascade.models import EfficientLevel, EfficientUNetConfig
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels, Sampling, StageConfig
from cascade.tasks.restore.damage import EVERY
from cascade.tasks.restore.source import Source
from cascade.tasks.restore.training import RestoreTraining
from cascade.training.job import Optimizer


def config(
    tasks: str = "colouring,jpeg,inpainting,uncropping", photographs: str = "", norm: str = "l2"
) -> RestoreTraining:
    known = {damage.name: damage for damage in EVERY}
    if unknown := [name for name in tasks.split(",") if name not in known]:
        raise UserError(f"--tasks {tasks}: {unknown[0]!r} is none of {', '.join(known)}")
    data = ScenesData(split="train")
    if photographs:
        both = data, FolderData(path=photographs)
        data = Mixture(sources=both, weights=(1.0, 1.0))
    return RestoreTraining(
        stage=StageConfig(
            name="restore64",
            space=Pixels(resolution=64),
            conditions=(
                Source(damages=tuple(known[name] for name in tasks.split(",")), residual=True),
            ),
            # Without attention it restores pictures of any size.
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
            schedule=Cosine(logsnr_max=9.0, shift=resolution_shift(64, reference=32)),
            prediction="x0",
            loss=Loss(space="x0", norm=norm),
            sampling=Sampling(steps=16, guidance=1.0, threshold=Threshold(kind="static")),
        ),
        data=data,
        images=100_000,
        batch_size=8,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_images=1_000, cooldown_images=30_000, b2=0.99
        ),
        ema_decay=0.998,
        log_every_images=2_000,
        save_every_images=4_000,
        preview_every_images=4_000,
    )
