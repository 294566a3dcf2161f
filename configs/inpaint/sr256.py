"""The first super-resolution stage, fine-tuned to fill holes: it sees the small picture whole, and
the large one outside the hole (GLIDE's inpainting).

    cascade train configs/inpaint/sr256.py --workdir runs/inpaint256
    cascade export runs/inpaint runs/inpaint256 models/inpaint --rest scenes

init: a model whose second stage is fine-tuned, `scenes` unless another is named.
"""

import dataclasses

from cascade.runner.model_folder import open_model
from cascade.scenes.dataset import ScenesData
from cascade.tasks.inpaint.hole import Hole
from cascade.tasks.inpaint.training import InpaintTraining
from cascade.training.job import Optimizer


def config(init: str = "scenes") -> InpaintTraining:
    model = open_model(init)
    stage = model.stages[1]
    return InpaintTraining(
        stage=dataclasses.replace(stage, conditions=(*stage.conditions, Hole())),
        init=init,
        data=ScenesData(split="train"),
        text_encoder=model.text_encoder,
        text_tokens=model.max_tokens,
        captions=model.captions,
        crop=128,
        images=8_000,
        batch_size=8,
        optimizer=Optimizer(learning_rate=2e-4, warmup_images=400, cooldown_images=4_000, b2=0.99),
        ema_decay=0.998,
        save_every_images=2_000,
        preview_every_images=4_000,
    )
