"""A job: something that learns, as a config file returns it.

A job says what learns (`fresh`, `loss`), from what (`open`), and for how long; `fit` (loop.py) does
the rest alike for all: mesh, microbatches, averages, checkpoints and resuming, figures, previews,
stopping, updates that are not finite. Stages and text encoders are jobs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from cascade.devices import sharding
from cascade.diffusion.loss import Part
from cascade.models.layers import Remat
from cascade.storage.paths import Path
from cascade.training import ema
from cascade.training.trainable import Trainable, Weights


@runtime_checkable
class Batches(Protocol):
    """Endless batches: nested dicts of NumPy arrays, of which this process holds its own rows."""

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, int]:
        """Where the data stands, as JSON values, for all processes alike."""
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from there."""
        ...


class Running:
    """What a job needs while it runs besides its weights: data, and whatever is frozen."""

    batches: Batches
    validate_every_images: int = 0
    """Examples from one `validate` to the next; 0 is never."""

    def validate(self, params: Any) -> dict[str, float]:
        """Figures of the averaged weights on what is held out, for the next row of metrics.jsonl;
        all processes call it."""
        return {}

    evaluate_every_images: int = 0
    """Examples from one evaluation of the averaged weights to the next; 0 is never."""

    def skipped(self) -> list[tuple[str, str]]:
        """The key of each record of the data that turned out to be unreadable since this was last
        asked, and the reason in a few words."""
        return []

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A batch of `batches` -> what the loss takes, on all devices."""
        raise NotImplementedError

    def preview(self, params: Any, batch: dict[str, Any], file: Path) -> None:
        """Draw what the averaged weights can do by now into a PNG file; all processes call it.

        batch: of the last step, as `prepare` made it. It may draw nothing.
        """

    def finish(self, params: Any) -> None:
        """Called with the averaged weights when all examples have been seen, by all processes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides a run's result; subclasses say what learns."""

    images: int
    """Training examples in all, repetitions counted."""
    batch_size: int
    """Examples a step, over all devices and microbatches."""
    microbatches: int = 1
    """Parts of a batch whose gradients are averaged, for less memory and the same result."""
    trainable: Trainable = field(default_factory=Weights)
    """Which of the weights learn."""
    ema_decay: float = 0.9999
    """What the average of the weights keeps of itself at each step, in [0, 1), reached gradually
    as (1 + step) / (10 + step)."""
    ema_profiles: tuple[float, ...] = ()
    """Relative widths (sigma_rel of `training.ema`) of averages kept besides, each costing the
    memory of the weights; from the snapshots of two, such as .05 and .1 (Karras et al. 2024),
    `cascade export --ema` makes any other."""
    ema_snapshot_images: int = 1_000_000
    """Examples from one snapshot of the ema_profiles, ema/STEP_WIDTH.safetensors, to the next."""
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)
    """Devices along each axis."""
    seed: int = 0
    """Names the run's random numbers: first weights, noise, order of the data."""
    workers: int = 0
    """Processes of each host that prepare data; 0 uses threads of the one that trains."""
    log_every_images: int = 10_000
    """Examples from one row of metrics.jsonl to the next."""
    save_every_images: int = 100_000
    """Examples from one checkpoint to the next."""
    preview_every_images: int = 100_000
    """Examples from one preview to the next; 0 is never."""
    keep: int = 3
    """Newest checkpoints kept."""
    minutes: float | None = None
    """End after so many minutes of training in this process, compilation included, if that is
    before `images`; the rate cools down in time. None is never."""
    skip_limit: int = 20
    """Updates that are not finite are left out; after so many in a row training stops."""
    wandb: str | None = None
    """A Weights & Biases project that is sent the figures too."""
    profile_steps: int = 0
    """So many steps after the first three are traced into WORKDIR/profile (jax.profiler)."""

    def __post_init__(self):
        every = ("log_every_images", "save_every_images", "ema_snapshot_images")
        counts = ("images", "batch_size", "microbatches", "keep", "skip_limit")
        free = ("seed", "workers", "preview_every_images", "profile_steps")
        for name in (*counts, *every, *free):
            self.at_least(name, int(name not in free))
        if self.seed >= 2**32:
            raise ValueError(f"{self._kind}.seed must be below 2^32, got {self.seed}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"{self._kind}.batch_size must be a multiple of microbatches={self.microbatches}, "
                f"got {self.batch_size}"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"{self._kind}.minutes must be above 0, got {self.minutes}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"{self._kind}.ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.trainable.freezes and self.ema_profiles:
            raise ValueError(
                f"{self._kind}.ema_profiles must be () unless trainable is Weights(), whose "
                f"averages they are, got {self.ema_profiles}"
            )
        for width in self.ema_profiles:
            ema.gamma_from_sigma_rel(width)

    def at_least(self, name: str, least: int) -> None:
        """Raise ValueError unless that field is so large."""
        if (value := getattr(self, name)) < least:
            raise ValueError(f"{self._kind}.{name} must be at least {least}, got {value}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, the last one completing `images`."""
        return -(-self.images // self.batch_size)

    @property
    def name(self) -> str:
        """What is trained, for the progress bar and the plot."""
        raise NotImplementedError

    @property
    def fixed(self) -> dict[str, Any]:
        """Values that a run cannot change when it goes on, by the names to tell of them."""
        return {
            "trainable": self.trainable,
            "batch_size": self.batch_size,  # a step is so many examples
            "ema_profiles": self.ema_profiles,
        }

    @property
    def frozen_dtype(self) -> str:
        """Type that frozen parameters are kept in."""
        return "float32"

    def fresh(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters, as nested dicts of arrays."""
        raise NotImplementedError

    def start(self, shardings: Any = None) -> Any:
        """The weights to begin from, in float32 or if something is frozen in `frozen_dtype`; None
        is fresh ones.

        shardings: parameters as ShapeDtypeStructs -> where each is put.
        """
        return None

    def loss(
        self, params: Any, batch: Mapping[str, Any], key: Key[Array, ""], part: Part | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(what is minimized, scalars worth logging, "loss" among them), a pure function.

        part: (i, n) if the batch is rows i, i + n, ... of one n times as large.
        """
        raise NotImplementedError

    def batch_shapes(self, tokens: int, b: int | None = None) -> dict[str, Any]:
        """What the loss takes, as ShapeDtypeStructs: b examples, texts of so many tokens."""
        raise NotImplementedError

    def transformation(self, steps: Any = None) -> optax.GradientTransformation:
        """The update rule, its learning rate included.

        steps: of the run; None is the job's own number. Where minutes end it that is an array,
        which may change from one step to the next.
        """
        raise NotImplementedError

    def with_remat(self, policy: Remat) -> Job:
        """The job whose network keeps that for its backward pass; itself if it has no choice."""
        return self

    @property
    def even(self) -> bool:
        """Whether all batches have one shape, so that FLOPs a second are a figure of the run."""
        return True

    def open(self, mesh: Mesh, workdir: Path) -> Running:
        """Load what the run needs. Raises UserError for all that may be wrong with the config, and
        writes nothing but what `workdir` must remember for the run to go on."""
        raise NotImplementedError

    @property
    def _kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The update rule and its learning rate over the run."""

    name: Literal["adamw", "adam", "adafactor"] = "adam"
    """The rule. Adafactor is optax's default, whose rate is relative to each parameter's size (the
    base model of Saharia et al. 2022)."""
    learning_rate: float = 1e-4
    """The rate once it has risen, above 0."""
    warmup_images: int = 0
    """Examples over which the rate rises linearly; 0 is none."""
    cooldown_images: int = 0
    """Examples over which it falls linearly to zero, the last of the run; 0 is none."""
    clip: float = 1.0
    """Largest global norm of a gradient, above 0."""
    weight_decay: float = 0.0
    """Decay of adamw, on matrices and convolutions only; 0 is none."""
    b1: float = 0.9
    """What Adam's first moment keeps of itself, in [0, 1)."""
    b2: float = 0.999
    """What Adam's second moment keeps of itself, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment, above 0."""

    def __post_init__(self):
        for name in ("learning_rate", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_images", "cooldown_images", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Optimizer.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Optimizer.{name} must be in [0, 1), got {getattr(self, name)}")

    def build(self, batch_size: int, steps: Any) -> optax.GradientTransformation:
        """The optax chain: clip by global norm, the rule, the rate by step."""
        rate = functools.partial(self.rate, batch_size=batch_size, steps=steps)
        if self.name == "adafactor":
            rule = optax.adafactor(rate)
        elif self.name == "adam":
            rule = optax.adam(rate, b1=self.b1, b2=self.b2, eps=self.eps)
        else:
            decay = {"weight_decay": self.weight_decay, "mask": _has_fan_in}
            rule = optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, **decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), rule)

    def rate(self, step: Any, *, batch_size: int, steps: Any) -> jax.Array:
        """The rate of the step with this number, counted from 0, of a run of so many steps."""
        rise = jnp.minimum(1.0, (step + 1) / max(1, self.warmup_images // batch_size))
        if not (cooldown := self.cooldown_images // batch_size):
            return self.learning_rate * rise  # the same program however long the run is
        return self.learning_rate * jnp.clip((steps - step) / cooldown, 0.0, rise)


def _has_fan_in(params: Any) -> Any:
    """Weight decay is for matrices and convolutions, not for biases and norms."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
