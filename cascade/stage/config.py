"""The configuration of one stage, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float

from cascade.diffusion import loss, process
from cascade.models.network import NetworkConfig
from cascade.models.signals import Widths
from cascade.stage.conditions import Condition, LowRes, Text, time_of
from cascade.stage.settings import Sampling
from cascade.stage.space import Space


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a cascade: what it draws, with which network, process and objective."""

    name: str
    """Its folder in a model: letters, digits, - and _."""
    space: Space
    """What is diffused, and the side of the pictures drawn."""
    conditions: tuple[Condition, ...] = ()
    """What the network is told; a stage with a LowRes is super-resolution. Their vectors are added
    to the embedding of time in this order."""
    network: NetworkConfig
    """What denoises."""
    schedule: process.Schedule = field(default_factory=process.Cosine)
    """How log-SNR falls with time."""
    prediction: process.Prediction = "v"
    """What the network's output means."""
    loss: loss.Loss = field(default_factory=loss.Loss)
    """Which weight the error carries in training."""
    variance: loss.LearnedVariance | None = None
    """If the network also predicts the variance of each step, by as many output channels more, how
    that is trained."""
    sampling: Sampling = field(default_factory=Sampling)
    """How pictures are drawn unless the caller says otherwise."""

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name == "text_encoder":
            raise ValueError(
                "StageConfig.name must be of letters, digits, - and _, and not text_encoder, got "
                f"{self.name!r}"
            )
        names = [condition.name for condition in self.conditions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"StageConfig.conditions must have one {name}, got {names.count(name)}"
                )
        for condition in self.conditions:
            condition.check(self.space, self.prediction)
        self.network.check(self.widths)
        self.check_sides()
        if self.prediction == "eps" and self.schedule.ends_in_noise:
            raise ValueError(
                f'StageConfig.prediction must be "v" or "x0" with {self.schedule}, got "eps": at '
                "its end the input is noise alone, and to predict that says nothing of x0"
            )
        if self.network.in_channels != (own := self.space.shape()[-1]):
            raise ValueError(
                f"StageConfig.network.in_channels must be the {own} channels of "
                f"{type(self.space).__name__}, got {self.network.in_channels}"
            )
        channels = own * (1 if self.variance is None else 2)
        if self.network.out_channels != channels:
            learned = "without" if self.variance is None else "with"
            raise ValueError(
                f"StageConfig.network.out_channels must be {channels} {learned} learned variance, "
                f"got {self.network.out_channels}"
            )
        self.check(self.sampling)

    @property
    def widths(self) -> Widths:
        """How much its conditions tell the network."""
        told = [condition.widths(self.network) for condition in self.conditions]
        tokens = {w.tokens for w in told if w.tokens}
        if len(tokens) > 1:
            raise ValueError(
                f"StageConfig.conditions must give tokens of one width, got {sorted(tokens)}"
            )
        return Widths(channels=sum(w.channels for w in told), tokens=max(tokens, default=0))

    @property
    def resolution(self) -> int:
        """Side of the pictures it draws, in pixels."""
        return self.space.resolution

    @property
    def lowres(self) -> LowRes | None:
        """The condition that makes it super-resolution; None in a base stage."""
        return next((c for c in self.conditions if isinstance(c, LowRes)), None)

    @property
    def lowres_resolution(self) -> int | None:
        """Side of the smaller pictures that it enlarges, in pixels; None in a base stage."""
        return None if self.lowres is None else self.lowres.resolution

    @property
    def text(self) -> Text | None:
        """Its condition on a text, if it has one."""
        return next((c for c in self.conditions if isinstance(c, Text)), None)

    @property
    def noises_what_is_kept(self) -> bool:
        """Whether what a steering keeps of a picture is given to the network as noisy as the rest
        (Song et al. 2021, "Score-Based Generative Modeling through SDEs", App. I.2)."""
        return True

    def redrawing(self, masked: bool) -> Sampling:
        """How a picture is drawn anew unless the caller says otherwise. masked: in part only."""
        return self.sampling

    @property
    def weights_dtype(self) -> str:
        """Type of the parameters when pictures are drawn."""
        return "float32"

    def computing_in(self, dtype: str) -> StageConfig:
        """The stage as `cascade sample --dtype` asks for it: networks of ours keep to their own."""
        return self

    def time(self, logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
        """What the network is told of log-SNR, whatever schedule is in use."""
        return time_of(logsnr)

    def check_sides(self, crop: int | None = None) -> None:
        """Raise ValueError unless the network divides what is diffused of its pictures.

        crop: of a part of them, this side in pixels.
        """
        shape = self.space.shape(None if crop is None else (crop, crop))
        if len(shape) == 3:
            try:
                self.network.check_sides(*shape[:2])
            except ValueError as e:
                what = f"{self.resolution} px" if crop is None else f"crop={crop}"
                raise ValueError(f"stage {self.name} of {what}: {e}") from None

    def batch_shapes(self, b: int, tokens: int, crop: int | None = None) -> dict[str, Any]:
        """What `Stage.loss` takes, as ShapeDtypeStructs: b examples, texts of so many tokens."""
        shapes: dict[str, jax.ShapeDtypeStruct] = dict(self.space.shapes(b, crop))
        for condition in self.conditions:
            shapes |= condition.shapes(self.space, b, tokens, crop)
        return shapes

    def check(self, settings: Sampling) -> None:
        """Raise ValueError for settings that make no sense for this stage."""
        if not self.space.bounded and settings.threshold.kind != "none":
            raise ValueError(
                f'Sampling.threshold must be "none" in {self.name}, whose '
                f"{type(self.space).__name__} have no range to be kept in, got "
                f"{settings.threshold.kind!r}"
            )
        if settings.sampler.needs_variance and self.variance is None:
            raise ValueError(
                f"Sampling.sampler {settings.sampler} needs a network that has learned the "
                f"variance, which {self.name} has not: give gamma a number in [0, 1]"
            )
        if self.schedule.ends_in_noise and settings.grid(settings.steps, self.schedule)[0] < 1:
            raise ValueError(
                f"Sampling.grid {settings.grid} begins short of t=1, where {self.schedule} has the "
                "pure noise that sampling starts from: use Uniform or another from 1 on"
            )
