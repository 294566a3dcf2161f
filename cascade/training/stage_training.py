"""The job of one stage: captioned pictures in, a denoiser out.

dataset -> data -> conditions -> stage.loss -> train_step -> checkpoint
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from cascade import images
from cascade.data import Batches, Data, Degradation, Source, batches
from cascade.data.held_out import divided
from cascade.data.pipeline import TokenizeFn
from cascade.data.source import BadRecord, Example
from cascade.data.transforms import check_resolutions
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.models import placing
from cascade.runner.model_folder import open_model
from cascade.stage import Stage, StageConfig
from cascade.storage import paths
from cascade.text import DEFAULT_MAX_TOKENS
from cascade.text.captions import Captions
from cascade.text.embedding import no_encoder
from cascade.training import preview
from cascade.training.job import Job, Optimizer, Running
from cascade.training.text_input import Online, Stored, StoredBatches
from cascade.training.trainable import LoRA


@dataclass(frozen=True, kw_only=True)
class StageJob(Job):
    """The job of one stage, whatever it learns from; subclasses say that, by `open`."""

    stage: StageConfig
    """What is trained."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The update rule."""
    init: str | None = None
    """A model, as `cascade sample --model` names it, whose stage of the same name gives the first
    weights; None is fresh ones. Where something is frozen it must stay where it is."""

    def __post_init__(self):
        super().__post_init__()
        # Fresh ones cannot be made again elsewhere: their random numbers are the hardware's.
        if self.trainable.freezes and self.init is None:
            raise ValueError(
                f"{type(self).__name__}.trainable must be Weights() without an init that has what "
                f"is frozen, got {self.trainable}"
            )
        if not self.stage.space.trainable:
            raise ValueError(
                f"{type(self).__name__}.stage {self.stage.name} diffuses in "
                f"{type(self.stage.space).__name__}: such a stage is drawn from, not trained"
            )

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def fixed(self) -> dict[str, Any]:
        fixed = {"stage": self.stage, **super().fixed, "optimizer.name": self.optimizer.name}
        return fixed | ({"init": self.init} if self.trainable.freezes else {})

    @property
    def frozen_dtype(self) -> str:
        return self.stage.network.compute_dtype

    @property
    def reading(self) -> Reading | None:
        """How its texts are read, which `cascade export` writes down; None if it has none."""
        return None

    @property
    def vocabulary(self) -> Sequence[str]:
        """All the words that its texts can have, if that is a closed list."""
        return ()

    def fresh(self, key):
        return Stage(self.stage).init(key)

    def start(self, shardings=None):
        if self.init is None:
            return None
        model, stage = open_model(self.init), self.stage
        own = {s.name: s for s in model.stages}.get(stage.name)
        if own is None:
            known = ", ".join(s.name for s in model.stages)
            raise UserError(f"init={self.init}: has no stage {stage.name}, only {known}")
        free: Any = {f: getattr(stage.network, f) for f in ("compute_dtype", "remat")}
        if dataclasses.replace(own.network, **free) != stage.network:
            raise UserError(
                f"init={self.init}: the network of its {stage.name} is not that of the config"
            )
        dtype = self.frozen_dtype if isinstance(self.trainable, LoRA) else "float32"
        return model.read(stage, shardings, dtype=dtype)

    def loss(self, params, batch, key, part=None):
        return Stage(self.stage).loss(params, batch, key, part)

    def batch_shapes(self, tokens, b=None):
        return self.stage.batch_shapes(b or self.batch_size, tokens)

    def transformation(self, steps=None):
        return self.optimizer.build(self.batch_size, self.steps if steps is None else steps)

    def with_remat(self, policy):
        network: Any = dataclasses.replace(self.stage.network, remat=policy)
        return dataclasses.replace(self, stage=dataclasses.replace(self.stage, network=network))


class Reading(NamedTuple):
    """How a stage reads texts: by which encoder, of how many tokens, and what is done to them."""

    text_encoder: str
    max_tokens: int
    captions: Captions


@dataclass(frozen=True, kw_only=True)
class StageTraining(StageJob):
    """Train one stage of a cascade on captioned pictures.

    What says how texts are read is without effect for a stage that has no condition on a text.
    """

    data: Data
    """The captioned pictures."""
    text_encoder: str = "scenes"
    """The frozen text encoder: the one that ships, a folder, or a name on the hub."""
    text_tokens: int = DEFAULT_MAX_TOKENS
    """Length that captions are padded or cut to, unless the text encoder's own window is shorter
    (the paper states none)."""
    captions: Captions = "verbatim"
    """What is done to captions first, see `cascade.text`; DeepFloyd IF has 77 tokens of "clean"
    ones."""
    text_int8: bool = False
    """Keep the text encoder's matrices in int8."""
    embeddings: str | None = None
    """A store of all captions' embeddings by this text encoder (`cascade data embed`), which is
    then not loaded; None embeds captions as they come."""
    embeddings_missing: Literal["refuse", "encode"] = "refuse"
    """What is done about a caption that the store lacks: the run ends, or the text encoder is
    loaded and embeds it."""
    crop: int | None = None
    """Side in pixels of the aligned crops that a super-resolution stage trains on; None is the
    whole picture."""
    degradation: Degradation | None = None
    """How low-resolution pictures are degraded; None is plain means over blocks."""
    most_bad: float = 0.25
    """The share of the data that may be left out: another example stands in for each one that
    cannot be read, WORKDIR/skipped.jsonl lists them, and the run ends where there are more."""
    validation: float = 0.0
    """Share of the pictures that is never trained on, chosen by their names, in [0, 1); its loss
    with the averaged weights is in metrics.jsonl and loss.png, over all noise levels and over each
    quarter of them. The same pictures meet the same noise each time."""
    validate_every_images: int = 100_000
    """Examples from one look at what is held out to the next."""
    validation_images: int = 1000
    """So many pictures of what is held out are looked at, in whole batches."""
    eval_every_images: int = 0
    """Examples from one evaluation of what the averaged weights draw to the next; 0 is never. Each
    draws eval_pictures, for metrics.jsonl and loss.png: FD-proxy to the true pictures, on scenes
    the share of facts right, and what the two fields below ask for."""
    eval_pictures: int = 64
    """So many pictures are drawn in an evaluation: of what is held out if anything is, on scenes
    of scenes that training never has, else of the first of the data. With so few, figures are good
    for comparing the weights of one run."""
    eval_clip: str | None = None
    """A CLIP that scores evaluated pictures by their captions: a folder, or a name on the hub."""
    eval_inception: str | None = None
    """Inception's weights (safetensors), by which the distance to the true pictures is too."""
    preview_captions: int = 0
    """So many captions of the data, the first that differ, are drawn in previews of a base stage
    too, before preview_prompts; 0 is none."""
    preview_prompts: tuple[str, ...] = ()
    """What previews of a base stage draw; super-resolution enlarges four of the batch."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("text_tokens", "validate_every_images", "validation_images"):
            self.at_least(name, 1)
        self.at_least("eval_pictures", 2)
        for name in ("preview_captions", "eval_every_images"):
            self.at_least(name, 0)
        if not 0 <= self.validation < 1:
            raise ValueError(
                f"{self._kind}.validation must be a share in [0, 1), got {self.validation}"
            )
        if not 0 <= self.most_bad <= 1:
            raise ValueError(f"StageTraining.most_bad must be in [0, 1], got {self.most_bad}")
        check_resolutions(
            self.stage.resolution,
            self.stage.lowres_resolution,
            self.crop,
            self.degradation,
            prefix="StageTraining.",
        )
        self.stage.check_sides(self.crop)

    @property
    def reading(self) -> Reading | None:
        if self.stage.text is None:
            return None
        return Reading(self.text_encoder, self.text_tokens, self.captions)

    @property
    def vocabulary(self) -> Sequence[str]:
        return self.data.vocabulary

    @property
    def fixed(self) -> dict[str, Any]:
        # Pictures that were trained on would be held out, or the other way round.
        return {**super().fixed, "validation": self.validation}

    def batch_shapes(self, tokens, b=None):
        return self.stage.batch_shapes(b or self.batch_size, tokens, self.crop)

    def open(self, mesh: Mesh, workdir: paths.Path) -> Running:
        return RunningStage(self, mesh)


class RunningStage(Running):
    """Pictures, and their captions if the stage reads text, as `text_input` makes embeddings of
    them on the devices."""

    def __init__(self, job: StageTraining, mesh: Mesh):
        self._job, self._mesh = job, mesh
        source = job.data.open(job.stage.resolution)  # before an encoder of many GB
        held_out = None
        if job.validation:
            source, held_out = divided(source, job.validation)
        self._examples = source if held_out is None else held_out
        if job.eval_every_images and len(self.examples(2)) < 2:
            raise UserError(
                f"eval_every_images={job.eval_every_images}: of what is evaluated fewer than two "
                "pictures can be read; give more data or a larger validation, or set it to 0"
            )
        self._text: Online | Stored | None = None
        if job.stage.text is not None:
            stored = job.embeddings is not None
            self._text = Stored(job, source, mesh) if stored else Online(job, mesh)
        reader = None if self._text is None else self._text.reader
        read = self.read(source, reader, sharding.process_rows(mesh, job.batch_size))
        self._read = self.batches = read
        self.evaluate_every_images = job.eval_every_images
        drawn = job.preview_every_images and job.stage.lowres is None
        own = first_captions(source, job.preview_captions) if drawn else []
        self._prompts = [*own, *job.preview_prompts]
        if isinstance(self._text, Stored):
            self.batches = StoredBatches(read, self._text.store)
            if job.preview_every_images and job.stage.lowres is None:
                self._prompts = self._text.present(self._prompts)
        self._held_out: HeldOut | None = None
        if held_out is not None:
            self.validate_every_images = job.validate_every_images
            self._held_out = HeldOut(job, held_out, reader, mesh)

    def read(
        self, source: Source, tokenizer: TokenizeFn | None, rows: Int[np.ndarray, " rows"]
    ) -> Batches:
        """The job's data, captions by the tokenizer. rows: of each batch, those of this process."""
        job = self._job
        return batches(
            source,
            lowres_resolution=job.stage.lowres_resolution,
            crop=job.crop,
            degradation=job.degradation,
            batch_size=job.batch_size,
            seed=job.seed,
            tokenizer=tokenizer,
            rows=rows,
            workers=job.workers,
            most_bad=job.most_bad,
        )

    def validate(self, params):
        return {} if self._held_out is None else self._held_out.losses(params, self.prepare)

    @property
    def embeds_all(self) -> bool:
        """Whether any text can be embedded, and not those of a store alone."""
        return not isinstance(self._text, Stored) or self._text.encodes

    def examples(self, count: int) -> list[Example]:
        """The first `count` examples, or fewer, of what is held out, or else of the data."""
        found = []
        for index in range(min(len(self._examples), 2 * count + 100)):
            with contextlib.suppress(BadRecord):  # the run says so, in its time
                found.append(self._examples[index])
            if len(found) == count:
                break
        return found

    def draw(self, params: Any, examples: Sequence[Example]) -> UInt8[np.ndarray, "n s s 3"] | None:
        """Draw what examples say, super-resolution from their small pictures, as `preview.of` does;
        all processes call it."""
        return preview.of(Stage(self._job.stage), params, examples, self._text or no_encoder)

    def skipped(self):
        records, self._read.bad_records = self._read.bad_records, []
        return records

    def prepare(self, batch, step):
        return self.embedded(sharding.shard_batch(self.completed(batch), self._mesh), step)

    def completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of this process's rows, before it is on the devices."""
        return batch if self._text is None else self._text.completed(batch)

    def embedded(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A batch on the devices with its captions' embeddings in place of what was read."""
        return batch if self._text is None else self._text.embedded(batch, step)

    def preview(self, params, batch, file):
        embed = self._text or no_encoder
        sheet = preview.draw(Stage(self._job.stage), params, batch, self._prompts, embed)
        if sheet is not None:
            file.parent.mkdir(exist_ok=True)
            images.save_png(file, sheet)


def first_captions(source: Source, count: int) -> list[str]:
    """The first captions that differ, at most so many; a thousand examples are looked at."""
    found: dict[str, None] = {}
    for index in range(min(len(source), 1000) if count else 0):
        with contextlib.suppress(BadRecord):  # the run will say so, in its time
            found.setdefault(source.captions_of(index)[0])
        if len(found) == count:
            break
    return list(found)


LEVELS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""The quarters of the times of noise: at 0 is the picture itself, and at 1 all noise."""


class HeldOut:
    """The loss of pictures that are not trained on, by noise level."""

    def __init__(
        self, job: StageTraining, source: Source, tokenizer: TokenizeFn | None, mesh: Mesh
    ):
        self._job, self._source, self._tokenizer, self._mesh = job, source, tokenizer, mesh
        self._losses = jax.jit(self._by_level, out_shardings=sharding.replicated(mesh))

    def losses(self, params: Any, prepared: Callable[..., dict[str, Any]]) -> dict[str, float]:
        """{"validation/loss": over all levels, "validation/loss_0.00-0.25": over a quarter, ...}.

        prepared: (batch, step) -> that on the devices with its texts embedded. The same pictures
        meet the same noise each time.
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
            batch = prepared(next(found), step)
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
