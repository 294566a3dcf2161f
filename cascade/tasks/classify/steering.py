"""How a classifier steers a picture that is being drawn."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade.diffusion.denoise import Threshold, pulled
from cascade.errors import OptionError, UserError
from cascade.models import Network
from cascade.stage import StageConfig, Start, Steering
from cascade.tasks.classify.classifier import ClassifierConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("asked", "scale", "params"),
    meta_fields=("classifier",),
)
@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(Steering):
    """Draw pictures that a classifier thinks have the attributes that are asked for.

    At every step x0_hat moves along the gradient of log p(c | x_t), c being all that is asked, as
    `denoise.pulled` says; whatever guidance the stage has of its own comes first.
    """

    # Any, since transformations also build this pytree of shapes and placeholders.
    asked: Any
    """float32 [b, attributes]: 1 for what is asked for, 0 for what is left open."""
    scale: Any
    """float32 [b], 0 or more: the s of Dhariwal & Nichol 2021; 0 is no guidance."""
    params: Any
    """The classifier's parameters, the same for all pictures."""
    classifier: ClassifierConfig
    """The classifier."""

    @property
    def names(self) -> list[str]:
        """What is asked for, of one picture."""
        attributes = zip(self.classifier.attributes, np.asarray(self.asked), strict=True)
        return [name for name, asked in attributes if asked]

    def repeated(self, b: int) -> ClassifierGuidance:
        rows = {
            name: np.broadcast_to(value, (b, *np.shape(value)))
            for name, value in (("asked", self.asked), ("scale", self.scale))
        }
        return dataclasses.replace(self, **rows)

    def start(self, noise, schedule, times):
        network = Network(self.classifier)

        def log_p(x_t, logsnr):
            told = jax.nn.log_sigmoid(network(self.params, x_t, logsnr))
            return jnp.sum(self.asked * told, axis=-1)

        return Start(noise, times, around=lambda denoiser: pulled(denoiser, log_p, self.scale))


def guided(stage: StageConfig) -> StageConfig:
    """The stage as it is guided unless the caller says otherwise: its threshold is static.

    What a gradient adds stands in few pixels, for which dynamic thresholding dims all others.
    """
    sampling = stage.sampling
    if sampling.threshold.kind != "dynamic":
        return stage
    sampling = dataclasses.replace(sampling, threshold=Threshold(kind="static"))
    return dataclasses.replace(stage, sampling=sampling)


def guiding(
    stage: StageConfig, classifier: tuple[ClassifierConfig, Any], attributes: str, scale: float
) -> ClassifierGuidance:
    """What steers one picture of the stage to the attributes, a list with commas between.

    classifier: as `classifier.load` gives it. Raises UserError for a stage that it cannot guide and
    for attributes that it does not know.
    """
    own, params = classifier
    side = stage.resolution
    if stage.space.shape() != (side, side, 3):
        raise UserError(
            f"--attributes: stage {stage.name} draws in {type(stage.space).__name__}, and a "
            "classifier is of pixels"
        )
    if side != own.resolution:
        raise UserError(
            f"--attributes: stage {stage.name} draws {side} px, and the classifier is of "
            f"{own.resolution} px; give another --classifier, or begin with another stage"
        )
    asked = [" ".join(name.lower().split()) for name in attributes.split(",")]
    for name in asked:
        if name not in own.attributes:
            near = difflib.get_close_matches(name, own.attributes, 3)
            some = near or [*own.attributes[:3], "..."]
            hint = "did you mean" if near else f"it knows {len(own.attributes)}, such as"
            raise OptionError(
                "attributes", attributes, f"{name!r} is not known; {hint} {', '.join(some)}"
            )
    return ClassifierGuidance(
        asked=np.array([float(name in asked) for name in own.attributes], np.float32),
        scale=np.float32(scale),
        params=params,
        classifier=own,
    )
