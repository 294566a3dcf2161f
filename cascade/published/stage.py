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
