"""The shipped cascade's base model: text -> 64 px scenes.

cascade train configs/scenes/base64.py --workdir runs/base64
"""

from cascade.data import ScenesData
from cascade.diffusion.loss import Loss
from cascade.diffusion.process import Cosine, resolution_shift
from cascade.models import Level, UNetConfig
from cascade.stage import Sampling, StageConfig
from cascade.train import Optimizer, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        stage=StageConfig(
            name="base64",
            resolution=64,
            network=UNetConfig(
                # 4x4 pixels enter as one: flat shapes need few channels a pixel, and on a CPU
                # wide convolutions at 16x16 run ten times faster than narrow ones at 64x64.
                patch=4,
                levels=(
                    Level(width=48, blocks=1),
                    Level(width=96, blocks=2, attention=True),
                ),
                head_width=32,
                text_width=128,
                emb_width=192,
            ),
            # Flat pictures keep their layout readable under much more noise than photographs, and
            # at log-SNR 3 their edges too: nothing is left to learn beyond, and ending there
            # bounds the weight, SNR + 1, that the v loss has on a prediction of x0.
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(64, reference=32)),
            prediction="x0",
            loss=Loss(space="v"),
            sampling=Sampling(steps=24, guidance=3.0),
        ),
        data=ScenesData(split="train"),
        images=76_000,
        batch_size=8,
        optimizer=Optimizer(
            learning_rate=1e-3,
            warmup_images=2_000,
            cooldown_images=24_000,
            b2=0.99,
        ),
        ema_decay=0.999,
        save_every_images=8_000,
        preview_every_images=8_000,
        preview_prompts=(
            "a small red circle above a big blue square on gray",
            "a big green star",
            "three small yellow hearts",
            "a pink ring left of a brown triangle",
            "a small purple diamond inside a big orange square",
            "a big cyan cross below a small red heart on white",
            "two big blue circles",
            "a small green triangle right of a small orange ring",
        ),
    )
