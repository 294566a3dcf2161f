"""Where the shipped base model learns what belongs to what: 32 px closeups of two objects.

    cascade train configs/scenes/base64_pairs.py --workdir runs/base64_pairs --init CLOSEUP_MODEL
    cascade export runs/base64_pairs runs/pairs_model

CLOSEUP_MODEL is what `cascade export` makes of a run of base64_closeup.py; base64_layout.py goes on
from here. Of one object a network can learn from the pooled text; with two it must find, in the
attention to the text, the noun that a shape, a colour or a place belongs to.
"""

import dataclasses
from pathlib import Path

from cascade.config import load
from cascade.scenes.dataset import ScenesData
from cascade.training.stage_training import StageTraining


def config() -> StageTraining:
    closeup = load(str(Path(__file__).with_name("base64_closeup.py")))
    return dataclasses.replace(
        closeup,
        data=ScenesData(split="train", min_objects=2, max_objects=2, closeup=2),
        images=871_000,
        batch_size=8,
        text_tokens=32,  # captions of two objects have at most 30
    )
