"""Where the shipped cascade's base model learns shapes: 32 px closeups of scenes of one object.

    cascade train configs/scenes/base64_closeup.py --workdir runs/base64_closeup
    cascade export runs/base64_closeup runs/closeup_model

The same network as base64.py at the same scale, on a quarter of the pixels, all of them near an
object; base64_pairs.py goes on from here.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    base = load(str(Path(__file__).with_name("base64.py")))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, space=Pixels(resolution=32)),
        data=ScenesData(split="train", max_objects=1, closeup=2),
        images=527_000,
        batch_size=16,
        text_tokens=16,  # captions of one object have at most 15
        optimizer=dataclasses.replace(base.optimizer, cooldown_images=0),
        preview_prompts=("a big green star", "a big pink ring", "a small red circle on gray"),
    )
