"""The classifier of noised scenes that ships: which colours, shapes and background they have.

    cascade train configs/classify/attributes64.py --workdir runs/attributes64

init: the model whose first stage it is to guide, `scenes` unless another is named. It is the
downsampling half of that stage's U-Net, and begins with its weights.

A quarter of an hour on two CPU cores that others used too. The rate was at its full height for the
first 41,000 pictures then, where it now begins to fall after 16,000. Backgrounds come first, then
colours; shapes and pairs of both are far from learned (at log-SNR -0.8, 85% of colours that are
there get more than one half, and 19% of shapes).
"""

from cascade.runner.model_folder import open_model
from cascade.tasks.classify.classifier import ClassifierConfig
from cascade.tasks.classify.scenes import ATTRIBUTES, ListedScenes
from cascade.tasks.classify.training import ClassifierTraining
from cascade.training.job import Optimizer


def config(init: str = "scenes") -> ClassifierTraining:
    stage = open_model(init).stages[0]
    return ClassifierTraining(
        classifier=ClassifierConfig(
            attributes=ATTRIBUTES, resolution=stage.resolution, network=stage.network
        ),
        init=init,
        schedule=stage.schedule,
        data=ListedScenes(split="train"),
        images=80_000,
        batch_size=16,
        optimizer=Optimizer(
            learning_rate=2e-3, warmup_images=1_600, cooldown_images=64_000, b2=0.99
        ),
        ema_decay=0.998,
        log_every_images=3_200,
        save_every_images=32_000,
        preview_every_images=0,
    )
