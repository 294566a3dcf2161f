"""The job of a classifier of noised pictures: captioned pictures in, p(c | x_t) out."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from cascade import images
from cascade.data import Data, batches
from cascade.devices import sharding
from cascade.diffusion import loss, process
from cascade.errors import UserError
from cascade.models import Network
from cascade.runner.model_folder import open_model
from cascade.tasks.classify import classifier
from cascade.tasks.classify.classifier import ClassifierConfig
from cascade.training.job import Job, Optimizer, Running
from cascade.training.stage_training import LEVELS


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining(Job):
    """Teach a classifier of noised pictures, which ends in WORKDIR/classifier.

    Each picture is noised to a random time of the schedule, and the cross-entropy of its attributes
    taken (Dhariwal & Nichol 2021, sec. 4.1). `accuracy` in metrics.jsonl is the mean of two shares:
    how many of the attributes that are there get more than one half, and how many of those that are
    not get less. Whoever looks away has 0.5. It is also there by quarters of the times of noise.
    """

    classifier: ClassifierConfig
    """The network, and what it tells of."""
    data: Data
    """The captioned pictures; a picture has the attributes whose words stand in its caption."""
    schedule: process.Schedule
    """How log-SNR falls with time: that of the stage which is to be guided."""
    init: str | None = None
    """A model whose first stage has the U-Net of which the classifier is the first half, and gives
    its first weights; None is fresh ones."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The update rule."""
    most_bad: float = 0.25
    """The share of the data that may be left out as unreadable, in [0, 1]."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.most_bad <= 1:
            raise ValueError(f"ClassifierTraining.most_bad must be in [0, 1], got {self.most_bad}")

    @property
    def name(self) -> str:
        return "classifier"

    @property
    def fixed(self) -> dict[str, Any]:
        return super().fixed | {
            "classifier": self.classifier,
            "optimizer.name": self.optimizer.name,
        }

    def fresh(self, key):
        return Network(self.classifier).init(key)

    def start(self, shardings=None):
        if self.init is None:
            return None
        model = open_model(self.init)
        stage, own = model.stages[0], self.classifier.network
        if stage.network != own:
            raise UserError(
                f"init={self.init}: the network of its {stage.name} is not that of the config"
            )
        fresh = Network(self.classifier).init(jax.random.key(self.seed))
        params = begun(fresh, model.read(stage, dtype="float32")["network"])
        return params if shardings is None else jax.device_put(params, shardings(fresh))

    def loss(self, params, batch, key, part=None):
        """batch: image uint8 [b, s, s, 3], labels bool [b, attributes]. Nats a picture."""
        k_time, k_noise = jax.random.split(key)
        x0 = jnp.asarray(images.to_float(batch["image"]))
        t = loss.draw(lambda shape: loss.stratified_times(k_time, shape[0]), x0.shape[:1], part)
        logsnr = self.schedule.logsnr(t)
        eps = loss.draw(lambda shape: jax.random.normal(k_noise, shape), x0.shape, part)
        logits = Network(self.classifier)(params, process.corrupt(x0, eps, logsnr), logsnr)
        there = batch["labels"]
        entropy = optax.sigmoid_binary_cross_entropy(logits, there.astype(jnp.float32))
        value = jnp.mean(jnp.sum(entropy, axis=-1))
        levels = {
            f"accuracy_{low:.2f}-{high:.2f}": accuracy(logits, there, (low <= t) & (t < high))
            for low, high in LEVELS
        }
        return value, {"loss": value, "accuracy": accuracy(logits, there, t >= 0), **levels}

    def batch_shapes(self, tokens, b=None):
        b, side = b or self.batch_size, self.classifier.resolution
        return {
            "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((b, len(self.classifier.attributes)), jnp.bool_),
        }

    def transformation(self, steps=None):
        return self.optimizer.build(self.batch_size, self.steps if steps is None else steps)

    def open(self, mesh, workdir):
        return _RunningClassifier(self, mesh, workdir)


def begun(fresh: Any, given: Any) -> Any:
    """The parameters `fresh`, but those that `given` has, by name and shape, as it has them."""
    if not isinstance(fresh, dict):
        return given if np.shape(given) == np.shape(fresh) else fresh
    given = given if isinstance(given, dict) else {}
    return {name: begun(own, given.get(name)) for name, own in fresh.items()}


def accuracy(
    logits: Float[Array, "b n"], there: Bool[Array, "b n"], rows: Bool[Array, " b"]
) -> Float[Array, ""]:
    """The mean, over the rows told, of the shares right of what is there and of what is not.

    In [0, 1]; 0.5 is what the same answer for all pictures has. A share of nothing counts 0.5.
    """

    def share(right, among):
        among = among & rows[:, None]
        count = jnp.sum(among)
        return jnp.where(count > 0, jnp.sum(right & among) / jnp.maximum(count, 1), 0.5)

    return (share(logits > 0, there) + share(logits <= 0, ~there)) / 2


class _RunningClassifier(Running):
    """Pictures with what their captions state."""

    def __init__(self, job: ClassifierTraining, mesh: Mesh, workdir: Any):
        self._job, self._mesh, self._workdir = job, mesh, workdir
        self.batches = self._read = batches(
            job.data.open(job.classifier.resolution),
            batch_size=job.batch_size,
            seed=job.seed,
            tokenizer=functools.partial(classifier.labels, job.classifier.attributes),
            rows=sharding.process_rows(mesh, job.batch_size),
            workers=job.workers,
            most_bad=job.most_bad,
        )

    def skipped(self):
        records, self._read.bad_records = self._read.bad_records, []
        return records

    def prepare(self, batch, step):
        return sharding.shard_batch(batch, self._mesh)

    def finish(self, params):
        params = jax.device_get(sharding.fetch(params))
        if jax.process_index() == 0:
            classifier.save(self._workdir / "classifier", self._job.classifier, params)
