"""The job of a stage that restores pictures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cascade import images
from cascade.devices import sharding
from cascade.stage import Stage
from cascade.tasks.restore.damage import DamagedData
from cascade.tasks.restore.source import Restoring, Source
from cascade.training.stage_training import RunningStage, StageTraining

SHOWN = 6
"""Rows of a preview, at most."""


@dataclass(frozen=True, kw_only=True)
class RestoreTraining(StageTraining):
    """Train a stage that has a Source among its conditions, to undo what that says is done to the
    pictures of `data`; previews show damaged, restored and true pictures."""

    def __post_init__(self):
        super().__post_init__()
        if self.source is None:
            raise ValueError("RestoreTraining.stage must have a Source among its conditions")
        if self.stage.lowres is not None:
            raise ValueError("RestoreTraining.stage must have no LowRes, which is to enlarge")

    @property
    def source(self) -> Source | None:
        """What the stage is told of damaged pictures."""
        return next((c for c in self.stage.conditions if isinstance(c, Source)), None)

    def open(self, mesh, workdir):
        assert self.source is not None
        damaged = DamagedData(whole=self.data, damages=self.source.damages)
        return _Running(dataclasses.replace(self, data=damaged), mesh)


class _Running(RunningStage):
    def preview(self, params, batch, file):
        wanted = {name: batch[name] for name in ("image", "source", "hole")}
        params, shown = sharding.fetch((params, wanted))
        if jax.process_index() != 0:
            return
        shown = {name: value[:SHOWN] for name, value in shown.items()}
        drawn = restored(Stage(self._job.stage), params, shown["source"], shown["hole"])
        told = images.to_uint8(jnp.where(shown["hole"], 0, images.to_float(shown["source"])))
        part = shown["hole"].min(axis=(1, 2, 3), keepdims=True) < 1
        columns = zip(jnp.where(part, told, shown["source"]), drawn, shown["image"], strict=True)
        file.parent.mkdir(exist_ok=True)
        images.save_png(file, images.grid([jax.device_get(x) for row in columns for x in row], 3))


def restored(stage: Stage, params: Any, source: Any, hole: Any, seed: int = 0) -> Any:
    """Pictures uint8 [b, h, w, 3] of sources uint8 [b, h, w, 3] and holes bool [b, h, w, 1].

    The stage is told nothing else.
    """
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(len(source)))
    steering = Restoring(source=images.to_float(source), hole=jnp.asarray(hole))
    settings, sides = stage.config.sampling, (source.shape[1], source.shape[2])
    drawn = stage.sample(params, {}, keys, settings=settings, sides=sides, steering=steering)
    return images.to_uint8(drawn)
