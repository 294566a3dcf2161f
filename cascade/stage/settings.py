"""How pictures are drawn from a stage: the settings of its sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascade import ranges
from cascade.diffusion.denoise import Constant, GuidancePlan, Threshold
from cascade.diffusion.grids import Grid, Uniform
from cascade.diffusion.samplers import DPMSolverPP2M, Step

MOST_STEPS = 10_000
MOST_GUIDANCE = 1e6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn from a stage unless the caller says otherwise."""

    steps: int = 32
    """Evaluations of the denoiser, 1 to 10,000; second-order steps take two each."""
    grid: Grid = field(default_factory=Uniform)
    """The times of the steps."""
    guidance: float = 4.0
    """Weight w of classifier-free guidance, 0 to 1e6; 1 means none."""
    guidance_plan: GuidancePlan = field(default_factory=Constant)
    """How the weight changes over the steps."""
    guidance_rescale: float = 0.0
    """phi of `denoise.rescale`, in [0, 1]; 0 for not at all."""
    sampler: Step = field(default_factory=DPMSolverPP2M)
    """How to get from one time to the next."""
    threshold: Threshold = field(default_factory=Threshold)
    """How estimates of x0 are kept in their range."""
    aug_level: float = 0.0
    """Noise on the low-resolution picture, in [0, 1]; only a super-resolution stage has one. It may
    exceed the level trained on, but in public weights."""

    def __post_init__(self):
        ranges.whole(self, -MOST_STEPS, MOST_STEPS, "steps")  # below 1, the grid says more
        try:
            self.grid.check(self.steps)
            self.guidance_plan.check(self.steps)
        except ValueError as e:
            raise ValueError(f"Sampling.{e}") from None
        if self.guidance < 0:
            raise ValueError(f"Sampling.guidance must be 0 or more, got {self.guidance}")
        ranges.real(self, 0, MOST_GUIDANCE, "guidance")
        for name in ("aug_level", "guidance_rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Sampling.{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def guided(self) -> bool:
        """Whether any step needs the unconditional half of the network's batch."""
        return self.guidance_plan.guides(self.guidance)
