"""One diffusion model: where networks meet mathematics."""

from cascade.stage.stage import Augmentation, Edit, Sampling, Stage, StageConfig, time_of

__all__ = ["Augmentation", "Edit", "Sampling", "Stage", "StageConfig", "time_of"]
