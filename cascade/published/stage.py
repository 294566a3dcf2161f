"""Stages of public weights: told of noise by the entries of the table that they were trained on.

Their networks embed what they are told themselves, so that their conditions turn nothing into
signals: the tokens are those of the text encoder, the level of noise is a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float

from cascade.diffusion import process
from cascade.models.network import NetworkConfig
from cascade.models.signals import Signals, Widths
from cascade.stage import LowRes, Sampling, StageConfig, Text

DRAWING: dict[bool, dict[str, Any]] = {
    False: {"steps": 100, "guidance": 7.0},
    True: {"steps": 50, "guidance": 4.0, "aug_level": 0.251},
}
"""Settings that diffusers' pipelines of DeepFloyd IF have and their files do not, by whether the
stage is super-resolution. Noise level 250 is entry 250 of a table of 1000."""
REDRAWING: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {"steps": 80, "guidance": 10.0},
    (False, True): {"steps": 50},
    (True, False): {},
    (True, True): {"steps": 100, "aug_level": 0.001},
}
"""The settings that its pipelines for image to image and inpainting have instead, by whether the
stage is super-resolution, and whether there is a mask."""


@dataclass(frozen=True, kw_only=True)
class PublishedStageConfig(StageConfig):
    """A stage whose network is a public one."""

    def __post_init__(self):
        super().__post_init__()
        tables = [self.schedule, *([self.lowres.augmentation.schedule] if self.lowres else [])]
        for table in tables:
            if not isinstance(table, process.Discrete):
                raise ValueError(
                    f"StageConfig.schedule must be Discrete with an {type(self.network).__name__}, "
                    f"whose time is the entry of a table, got {table}"
                )

    @property
    def noises_what_is_kept(self) -> bool:
        """False: DeepFloyd IF's pipelines leave it clean, from the start to the end."""
        return False

    def redrawing(self, masked: bool) -> Sampling:
        """The settings of DeepFloyd IF's pipelines for that, as diffusers has them; a setting that
        is not what they draw with is the model's own, and stays."""
        drawing = DRAWING[self.lowres is not None]
        redrawing = REDRAWING[self.lowres is not None, masked]
        own = self.sampling
        kept = own.grid.of_any_length == own.grid
        fields = {
            name: value
            for name, value in redrawing.items()
            if getattr(own, name) == drawing[name] and (kept or name != "steps")
        }
        return dataclasses.replace(own, **fields)

    @property
    def weights_dtype(self) -> str:
        return self.network.compute_dtype

    def computing_in(self, dtype: str) -> PublishedStageConfig:
        network: Any = dataclasses.replace(self.network, compute_dtype=dtype)
        return dataclasses.replace(self, network=network, space=self.space.computing_in(dtype))

    def time(self, logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
        """The entry of the schedule's table, 0..steps - 1."""
        return _entry(self.schedule, logsnr)

    def check(self, settings: Sampling) -> None:
        super().check(settings)
        most = 1.0 if self.lowres is None else self.lowres.augmentation.max_level
        if settings.aug_level > most:
            raise ValueError(
                f"Sampling.aug_level of {self.name} must be at most {most}, the most that it was "
                f"trained on, got {settings.aug_level}"
            )
        if settings.guidance < 1:
            raise ValueError(
                f"Sampling.guidance must be 1, which is none, or more in {self.name}: diffusers' "
                "pipelines take any less for none, and here it would make less of the prompt; got "
                f"{settings.guidance}"
            )


@dataclass(frozen=True, kw_only=True)
class PublishedText(Text):
    """Tokens as the text encoder gives them; no text is the embedding of its null_prompt."""

    null_prompt: str | None = ""
    """The prompt whose embedding stands for no text."""

    def widths(self, network: NetworkConfig) -> Widths:
        return Widths(tokens=self.width)

    def build(self, network: NetworkConfig, *, rngs: nnx.Rngs) -> Any:
        return _Signalled(_tokens)


@dataclass(frozen=True, kw_only=True)
class PublishedLowRes(LowRes):
    """The picture, and the entry of its table that its log-SNR is nearest to."""

    def build(self, network: NetworkConfig, *, rngs: nnx.Rngs) -> Any:
        schedule = self.augmentation.schedule

        def told(picture: Float[Array, "b h w 3"], logsnr: Float[Array, " b"]) -> Signals:
            return Signals(channels=(picture,), vectors=(_entry(schedule, logsnr)[:, None],))

        return _Signalled(told)


class _Signalled(nnx.Module):
    """A module without parameters."""

    def __init__(self, told: Callable[..., Signals]):
        self.told = told

    def __call__(self, *value: Any) -> Signals:
        return self.told(*value)


def _tokens(tokens: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Signals:
    return Signals(tokens=tokens, mask=mask)


def _entry(schedule: process.Schedule, logsnr: Float[Array, " b"]) -> Float[Array, " b"]:
    """PublishedStageConfig has seen to it that the schedule is a table."""
    table: Any = schedule
    return table.entry(logsnr)
