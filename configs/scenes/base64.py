"""The shipped cascade's base model: text -> 64 px scenes.

    cascade train configs/scenes/base64.py --workdir runs/base64 --init LAYOUT_MODEL

LAYOUT_MODEL is what `cascade export` makes of a run of base64_layout.py, which began with those of
base64_closeup.py and base64_pairs.py; without --init it starts from nothing. In closeups the same
network learns shapes four times as fast.
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
                # 2x2 pixels enter as one: full resolution costs four times as much on a CPU, and
                # with 4x4 an edge must be learned anew at each of sixteen places in the square.
                patch=2,
                levels=(
                    Level(width=24, blocks=1),
                    Level(width=48, blocks=1),
                    Level(width=96, blocks=2, attention=True),
                ),
                head_width=32,
                emb_width=128,
                coordinates=True,  # without them "above" means nothing: configs/scenes/README.md
            ),
            # Flat pictures keep their layout readable under much more noise than photographs, and
            # at log-SNR 3 their edges too: nothing is left to learn beyond.
            schedule=Cosine(logsnr_max=3.0, shift=resolution_shift(64, reference=16)),
            prediction="x0",
            # Where noise hides where things are, the error is large whatever the network does; the
            # v loss lets it drown the gradient of what can be learned.
            loss=Loss(weighting="debiased"),
            sampling=Sampling(steps=16, guidance=3.0),
        ),
        data=ScenesData(split="train"),
        images=362_000,
        batch_size=8,
        optimizer=Optimizer(
            learning_rate=1e-3,
            warmup_images=2_000,
            cooldown_images=40_000,
            b2=0.99,
        ),
        ema_decay=0.999,
        save_every_images=4_000,
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
