"""Where the shipped cascade's base model learns shapes of two objects: 32 px closeups of up to two.

    cascade train configs/scenes/base64_pairs.py --workdir runs/base64_pairs --init LAYOUT_MODEL
    cascade export runs/base64_pairs runs/pairs_model

LAYOUT_MODEL is what `cascade export` makes of a run of base64_layout.py; base64.py goes on from
here.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.data import ScenesData
from cascade.train import TrainConfig


def config() -> TrainConfig:
    closeup = load(str(Path(__file__).with_name("base64_closeup.py")))
    return dataclasses.replace(
        closeup,
        data=ScenesData(split="train", max_objects=2, closeup=2),
        images=545_000,
        text_tokens=32,  # captions of two objects have at most 30
    )
