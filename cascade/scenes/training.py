"""The job of a stage that learns scenes drawn where it learns: a GPU then waits for no worker.

What `StageTraining` does, but for the pictures: workers send what scenes hold and their captions, a
few hundred bytes each, and the device draws them (device.py), crops them and makes them small.
"""

from __future__ import annotations

import collections
import functools
import multiprocessing
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from cascade.data.pipeline import TokenizeFn, text_arrays
from cascade.devices import sharding
from cascade.scenes import device
from cascade.scenes.dataset import ScenesData
from cascade.training.stage_training import RunningStage, StageTraining
from cascade.training.step import step_key


@dataclass(frozen=True, kw_only=True)
class ScenesTraining(StageTraining):
    """Train one stage of a cascade on scenes that the device draws.

    Examples come in the order of their numbers; workers are processes that make captions.
    """

    data: ScenesData
    """The scenes."""

    def __post_init__(self):
        super().__post_init__()
        if self.validation:
            raise ValueError(
                "ScenesTraining.validation must be 0, as no scene is drawn twice, got "
                f"{self.validation}"
            )
        if self.degradation is not None:
            raise ValueError(
                "ScenesTraining.degradation must be None, since low-resolution pictures are means "
                f"over blocks here, got {self.degradation}"
            )

    def open(self, mesh, workdir):
        return _RunningScenes(self, mesh)


class _RunningScenes(RunningStage):
    def __init__(self, job: ScenesTraining, mesh: Mesh):
        self._scenes = job
        super().__init__(job, mesh)
        placed = sharding.batch_sharding(mesh)
        self._drawn = jax.jit(functools.partial(drawn, job), out_shardings=placed)

    def read(self, source, tokenizer, rows):
        return Scenes(self._scenes, tokenizer, rows)

    def skipped(self):
        return []

    def prepare(self, batch, step):
        batch = sharding.shard_batch(self.completed(batch), self._mesh)
        scenes = device.Layouts(*(batch.pop(name) for name in device.Layouts._fields))
        pictures = self._drawn(scenes, batch.pop("corner"), np.int32(step))
        return self.embedded(batch | pictures, step)


def drawn(
    job: ScenesTraining, scenes: device.Layouts, corner: Int[jax.Array, "b 2"], step: Any
) -> dict[str, jax.Array]:
    """The pictures of a batch, as `data.batches` has them: `image`, and `lowres` if it is learned.

    corner: the first pixel of what each example shows of its scene, in a picture of the whole.
    """
    side, low = job.stage.resolution, job.stage.lowres_resolution
    size = job.crop or side
    factor = 1 if low is None else side // low
    # The loss has split the step's key in five, the embedder has the sixth.
    key = jax.random.fold_in(step_key(job, step), 6)
    free = (side - size) // factor
    corner = corner + factor * jax.random.randint(key, corner.shape, 0, free + 1)
    image = device.draw(scenes, side * job.data.closeup, corner, size)
    if low is None:
        return {"image": image}
    return {"image": image, "lowres": device.block_means(image, factor)}


class Scenes:
    """`example_batch` for one batch after the other, without an end, some of them made ahead."""

    def __init__(
        self, job: ScenesTraining, tokenizer: TokenizeFn | None, rows: Int[np.ndarray, " rows"]
    ):
        """rows: of each batch, those that this process is to hold."""
        self._made = functools.partial(example_batch, job.data, job.stage.resolution, tokenizer)
        self._rows, self._batch_size, self._step = rows, job.batch_size, 0
        self._ahead, self._futures = 2 * max(1, job.workers), collections.deque[Future]()
        self._pool: Executor = ThreadPoolExecutor(1)
        if job.workers:
            # Forked, a process would hold JAX's locks as they happened to be.
            spawned = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(job.workers, spawned)

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._futures) <= self._ahead:
            first = (self._step + len(self._futures)) * self._batch_size
            self._futures.append(self._pool.submit(self._made, first + self._rows))
        self._step += 1
        return self._futures.popleft().result()

    def get_state(self) -> dict[str, int]:
        return {"examples": self._step * self._batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        if not 0 <= state["examples"] < 2**62:
            raise ValueError("examples must be 0 or more")
        self._step = state["examples"] // self._batch_size
        self._futures.clear()


def example_batch(
    data: ScenesData,
    resolution: int,
    tokenizer: TokenizeFn | None,
    numbers: Int[np.ndarray, " b"],
) -> dict[str, np.ndarray]:
    """The scenes of those numbers, as `device.Layouts` has them, with `corner` int32 [b, 2], and
    their captions as `text_arrays` has them."""
    indices = [int(number) % data.size for number in numbers]
    scenes, captions = zip(*map(data.scene, indices), strict=True)
    corners = [data.corner(i, scene, resolution) for i, scene in zip(indices, scenes, strict=True)]
    batch = device.layouts(scenes)._asdict() | {"corner": np.array(corners, np.int32)}
    return batch | text_arrays(tokenizer, [caption.text for caption in captions])
