"""Where the shipped super-resolution learns which thing has which finish: closeups of two things.

    cascade train configs/scenes/sr256_pairs.py --workdir runs/sr256_pairs
    cascade export runs/sr256_pairs runs/sr_pairs_model

sr256.py goes on from here. A closeup is as large as the crops of sr256.py, in the same scale of
pixels, and always shows two things; most crops show one, whose finish the pooled text can tell.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.scenes.dataset import ScenesData
from cascade.stage import Pixels
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    whole = load(str(Path(__file__).with_name("sr256.py")))
    lowres, text = whole.stage.conditions
    return dataclasses.replace(
        whole,
        stage=dataclasses.replace(
            whole.stage,
            space=Pixels(resolution=128),
            conditions=(dataclasses.replace(lowres, resolution=32), text),
        ),
        crop=None,
        data=ScenesData(split="train", min_objects=2, max_objects=2, closeup=2),
        images=54_000,
        text_tokens=32,  # captions of two objects have at most 30
        optimizer=dataclasses.replace(whole.optimizer, cooldown_images=0),
    )
