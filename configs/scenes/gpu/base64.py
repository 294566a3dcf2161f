"""The base model of a scenes cascade for one GPU and minutes: text -> 64 px.

    cascade train configs/scenes/gpu/base64.py --workdir runs/base64 --minutes 8

Wider and deeper than the one that ships, in bfloat16, with large batches that the GPU draws itself.
launch/train_scenes_gpu.sh trains the whole cascade.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.models import Level, UNetConfig
from cascade.scenes.training import ScenesTraining
from cascade.training.job import Optimizer


def config() -> ScenesTraining:
    cpu = load(str(Path(__file__).parents[1] / "base64.py"))
    network = UNetConfig(
        patch=2,
        levels=(
            Level(width=64, blocks=2),
            Level(width=128, blocks=2, attention=True),
            Level(width=160, blocks=2, attention=True),
        ),
        head_width=32,
        emb_width=128,
        coordinates=True,
        compute_dtype="bfloat16",
    )
    return ScenesTraining(
        stage=dataclasses.replace(cpu.stage, network=network),
        data=cpu.data,
        text_tokens=64,
        images=100_000_000,
        minutes=8.0,
        batch_size=512,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_images=200_000, cooldown_images=1_000_000, b2=0.99
        ),
        ema_decay=0.9995,
        workers=8,
        log_every_images=50_000,
        save_every_images=100_000_000,
        preview_every_images=0,
    )
