"""Where the shipped base model learns what stands where: whole scenes, most of them noisy.

    cascade train configs/scenes/base64_layout.py --workdir runs/base64_layout --init PAIRS_MODEL
    cascade export runs/base64_layout runs/layout_model

PAIRS_MODEL is what `cascade export` makes of a run of base64_pairs.py; base64.py goes on from here.
What stands where is decided while noise hides all but the largest things, so most pictures here are
that noisy, and their errors are not weighed down.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    base = load(str(Path(__file__).with_name("base64.py")))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(
            base.stage,
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(64, reference=8)),
            loss=Loss(space="x0"),
        ),
        images=456_000,
        optimizer=dataclasses.replace(base.optimizer, cooldown_images=0),
    )
