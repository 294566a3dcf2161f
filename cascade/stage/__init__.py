"""One diffusion model: where networks meet mathematics.

stage       Stage: init, loss, denoiser, sample
config      StageConfig: what a stage is made of, and what it refuses
conditions  what a stage is told: Text, LowRes
space       what is diffused: Pixels, Latents
settings    how pictures are drawn: Sampling
steering    how a run of sampling is changed from outside
"""

from cascade.stage.conditions import Augmentation, Condition, LowRes, Text, TextInput, time_of
from cascade.stage.config import StageConfig
from cascade.stage.settings import Sampling
from cascade.stage.space import Latents, Pixels, Space
from cascade.stage.stage import Stage
from cascade.stage.steering import Start, Steering

__all__ = [
    "Augmentation",
    "Condition",
    "Latents",
    "LowRes",
    "Pixels",
    "Sampling",
    "Space",
    "Stage",
    "StageConfig",
    "Start",
    "Steering",
    "Text",
    "TextInput",
    "time_of",
]
