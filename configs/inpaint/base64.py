"""A base stage that fills holes, fine-tuned from one that draws (GLIDE's inpainting).

    cascade train configs/inpaint/base64.py --workdir runs/inpaint

init: a model whose first stage is fine-tuned, `scenes` unless another is named. The captions tell
of the whole picture, hole or not.
"""

import dataclasses

from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.tasks.inpaint.hole import Hole
from cascade.tasks.inpaint.training import InpaintTraining
from cascade.training.job import Optimizer


def config(init: str = "scenes") -> InpaintTraining:
    model = open_model(init)
    stage = model.stages[0]
    return InpaintTraining(
        stage=dataclasses.replace(stage, conditions=(*stage.conditions, Hole())),
        init=init,
        data=ScenesData(split="train"),
        text_encoder=model.text_encoder,
        text_tokens=model.max_tokens,
        captions=model.captions,
        images=24_000,
        batch_size=8,
        optimizer=Optimizer(
            learning_rate=3e-4, warmup_images=1_000, cooldown_images=12_000, b2=0.99
        ),
        ema_decay=0.998,
        save_every_images=4_000,
        preview_every_images=8_000,
        preview_prompts=("a small red circle above a big blue square on gray", "a big green star"),
    )
