"""A super-resolution model of a scenes cascade for one GPU and minutes: text and 256 px -> 1024 px.

    cascade train configs/scenes/gpu/sr1024.py --workdir runs/sr1024 --minutes 3

The network of the one that ships, in bfloat16, with large batches of crops that the GPU draws.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.scenes.training import ScenesTraining
from cascade.training.job import Optimizer


def config() -> ScenesTraining:
    cpu = load(str(Path(__file__).parents[1] / "sr1024.py"))
    network = dataclasses.replace(cpu.stage.network, compute_dtype="bfloat16")
    return ScenesTraining(
        stage=dataclasses.replace(cpu.stage, network=network),
        data=cpu.data,
        crop=cpu.crop,
        text_tokens=64,
        images=100_000_000,
        minutes=3.0,
        batch_size=32,
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_images=10_000, cooldown_images=50_000, b2=0.99
        ),
        ema_decay=0.999,
        workers=3,
        log_every_images=10_000,
        save_every_images=100_000_000,
        preview_every_images=0,
    )
