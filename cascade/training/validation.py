"""The loss of pictures that are never trained on, by noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascade.data import Source, batches
from cascade.data.pipeline import TokenizeFn
from cascade.devices import sharding
from cascade.models import placing
from cascade.stage import Stage

if TYPE_CHECKING:
    from cascade.training.stage_training import StageTraining

LEVELS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""The quarters of the times of noise: at 0 is the picture itself, and at 1 all noise."""


class HeldOut:
    """The loss of pictures that are not trained on, by noise level."""

    def __init__(
        self, job: StageTraining, source: Source, tokenizer: TokenizeFn | None, mesh: Mesh
    ):
        self._job, self._source, self._tokenizer, self._mesh = job, source, tokenizer, mesh
        self._losses = jax.jit(self._by_level, out_shardings=sharding.replicated(mesh))

    def losses(self, params: Any, prepare: Callable[..., dict[str, Any]]) -> dict[str, float]:
        """{"validation/loss": over all levels, "validation/loss_0.00-0.25": over a quarter, ...}.

        prepare: (batch of this process, step) -> what the loss takes. The same pictures meet the
        same noise each time.
        """
        job = self._job
        size = job.batch_size // job.microbatches  # which is known to fit into memory
        count = max(1, min(len(self._source), job.validation_images) // size)
        found = batches(
            self._source,
            lowres_resolution=job.stage.lowres_resolution,
            crop=job.crop,
            degradation=job.degradation,
            batch_size=size,
            seed=job.seed,
            tokenizer=self._tokenizer,
            rows=sharding.process_rows(self._mesh, size),
        )
        total = np.zeros(len(LEVELS))
        for step in range(count):
            batch = prepare(next(found), step)
            key = jax.random.fold_in(jax.random.key(job.seed), 2**31 + step)
            total += np.asarray(self._losses(params, batch, key))
        found.close()
        named = {
            f"validation/loss_{low:.2f}-{high:.2f}": float(x) / count
            for (low, high), x in zip(LEVELS, total, strict=True)
        }
        return {"validation/loss": float(total.mean()) / count, **named}

    def _by_level(self, params: Any, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        stage = Stage(self._job.stage)

        def loss(level):
            return stage.loss(params, batch, key, between=tuple(level), dropout=False)[0]

        with placing(sharding.activations(self._mesh)):
            return jax.lax.map(loss, jnp.asarray(LEVELS))
