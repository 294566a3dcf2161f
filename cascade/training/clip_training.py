"""Training a CLIP: pictures and their captions come to the same place (Radford et al. 2021).

    logits = exp(s) z_image z_text^T     z of length 1, the whole batch, s learned, exp(s) <= 100
    loss   = (cross entropy of the rows + of the columns) / 2

Where captions of a batch are equal, each belongs to all their pictures alike (Yang et al. 2022,
"UniCL", eq. 4). A run learns a tokenizer of its captions first, and ends in WORKDIR/clip, a folder
as transformers writes it, which `published.clip.load` opens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cascade import images
from cascade.data import Data, Source, batches
from cascade.data.held_out import divided
from cascade.data.source import BadRecord, Example
from cascade.devices import sharding
from cascade.models import CLIPConfig, Network
from cascade.published import clip as published
from cascade.storage import paths
from cascade.text import clip as text_clip
from cascade.text.tokenizer import Tokens
from cascade.training.job import Job, Optimizer, Running

OF = 100
"""A held-out picture is to find its caption among so many different ones."""
LARGEST = float(np.log(100))
"""The largest logit scale; a larger one would not be stable."""


@dataclass(frozen=True, kw_only=True)
class CLIPTraining(Job):
    """Train a CLIP on captioned pictures. It ends in WORKDIR/clip."""

    clip: CLIPConfig
    """The sizes of both towers. text.vocab_size has 514 ids for letters and ends, and more for what
    is learned; text.eos_token_id must be 2."""
    data: Data
    """The captioned pictures."""
    validation: float = 0.05
    """Share of the pictures that is never trained on, chosen by their names, in [0, 1);
    metrics.jsonl tells how many of them find their caption among 100 different ones, and the other
    way round."""
    validate_every_images: int = 10_000
    """Examples from one look at what is held out to the next."""
    vocabulary_captions: int = 20_000
    """The tokenizer is learned of so many captions, the first ones."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The update rule."""
    most_bad: float = 0.25
    """The share of the data that may be left out because it cannot be read."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("validate_every_images", "vocabulary_captions"):
            self.at_least(name, 1)
        if not 0 <= self.validation < 1 or not 0 <= self.most_bad <= 1:
            raise ValueError(
                f"{self._kind}.validation must lie in [0, 1) and most_bad in [0, 1], got "
                f"{self.validation} and {self.most_bad}"
            )
        if self.microbatches != 1:
            raise ValueError(
                f"{self._kind}.microbatches must be 1, since a picture is compared with the whole "
                f"batch, got {self.microbatches}"
            )
        text = self.clip.text
        if text.vocab_size < 515 or text.eos_token_id != 2:
            raise ValueError(
                f"{self._kind}.clip.text: vocab_size must be 515 or more and eos_token_id 2, got "
                f"{text.vocab_size} and {text.eos_token_id}"
            )

    @property
    def name(self) -> str:
        return "clip"

    @property
    def fixed(self) -> dict[str, Any]:
        own = ("clip", "validation", "vocabulary_captions")
        return super().fixed | {name: getattr(self, name) for name in own}

    def fresh(self, key):
        return Network(self.clip).init(key)

    def loss(self, params, batch, key, part=None):
        """batch: image uint8 [b, s, s, 3], tokens int32 [b, l]."""
        module = Network(self.clip).bind(params)
        image = module.image(published.normalised(batch["image"]))
        text = module.text(batch["tokens"])
        scale = jnp.exp(jnp.minimum(params["logit_scale"], LARGEST))
        found = loss(scale * image @ text.T, same(batch["tokens"]))
        return found, {"loss": found, "temperature": 1 / scale}

    def batch_shapes(self, tokens, b=None):
        b, side = b or self.batch_size, self.clip.vision.image_size
        return {
            "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((b, tokens), jnp.int32),
        }

    def transformation(self, steps=None):
        return self.optimizer.build(self.batch_size, self.steps if steps is None else steps)

    def open(self, mesh, workdir):
        return _RunningCLIP(self, mesh, workdir)


def same(tokens: Int[Array, "b l"]) -> Float[Array, "b b"]:
    """Which text belongs to which picture: rows of ones over equal texts, divided by their sums."""
    equal = (tokens[:, None] == tokens[None]).all(axis=-1).astype(jnp.float32)
    return equal / equal.sum(axis=1, keepdims=True)


def loss(logits: Float[Array, "b b"], belongs: Float[Array, "b b"]) -> Float[Array, ""]:
    """The symmetric cross entropy; rows of logits are pictures, columns texts."""
    rows, columns = (jax.nn.log_softmax(logits, axis=axis) for axis in (1, 0))
    return -(belongs * (rows + columns)).sum() / (2 * len(logits))


class _RunningCLIP(Running):
    """Pictures with their captions' ids, and the tokenizer that the run has learned."""

    def __init__(self, job: CLIPTraining, mesh: Mesh, workdir: paths.Path):
        self._job, self._mesh, self._workdir = job, mesh, workdir
        source, self._held_out = job.data.open(job.clip.vision.image_size), None
        if job.validation:
            source, self._held_out = divided(source, job.validation)
            self.validate_every_images = job.validate_every_images
        self._own = tempfile.TemporaryDirectory(prefix="cascade-")
        self._tokenizer_files = _tokenizer(job, source, workdir, pathlib.Path(self._own.name))
        self._tokenizer = text_clip.read_tokenizer(self._tokenizer_files, job.clip.text.vocab_size)
        self.batches = self._read = batches(
            source,
            batch_size=job.batch_size,
            seed=job.seed,
            tokenizer=self._ids,
            rows=sharding.process_rows(mesh, job.batch_size),
            workers=0,
            most_bad=job.most_bad,
        )

    def _ids(self, texts: Sequence[str]) -> Tokens:
        length = self._job.clip.text.max_position_embeddings
        return text_clip.tokenize(self._tokenizer, texts, length)

    def skipped(self):
        records, self._read.bad_records = self._read.bad_records, []
        return records

    def prepare(self, batch, step):
        batch = {name: batch[name] for name in ("image", "tokens")}
        return sharding.shard_batch(batch, self._mesh)

    def validate(self, params):
        """How many held-out pictures find their caption among OF, and captions their picture."""
        params, sets = sharding.fetch(params), self._sets
        if jax.process_index() != 0 or not sets:
            return {}
        found = [retrieved(*self._embedded(params, some)) for some in sets]
        pictures, captions = (float(np.mean(shares)) for shares in zip(*found, strict=True))
        return {"validation/caption_found": pictures, "validation/picture_found": captions}

    @functools.cached_property
    def _sets(self) -> list[list[Example]]:
        """Held-out examples, OF at a time, whose captions all differ; at most ten such sets."""
        held_out = self._held_out
        if held_out is None:
            return []
        sets: list[dict[str, Example]] = [{}]
        for index in range(min(len(held_out), 20 * OF)):
            with contextlib.suppress(BadRecord):
                example = held_out[index]
                sets[-1].setdefault(example["caption"], example)
            if len(sets[-1]) == OF:
                sets.append({})
            if len(sets) > 10:
                break
        whole = [list(some.values()) for some in sets if len(some) == OF]
        return whole or [list(sets[0].values())]

    def _embedded(self, params: Any, examples: Sequence[Example]) -> tuple[Any, Any]:
        pictures = jnp.asarray(np.stack([example["image"] for example in examples]))
        ids = jnp.asarray(self._ids([example["caption"] for example in examples]).ids)
        return jax.device_get(_embedded(self._job.clip, params, pictures, ids))

    def preview(self, params, batch, file):
        """Held-out pictures, each with the caption of all of them that is nearest to it."""
        params, sets = sharding.fetch(params), self._sets
        if jax.process_index() != 0 or not sets:
            return
        shown = sets[0]
        picture, text = self._embedded(params, shown)
        nearest = (picture @ text.T).argmax(axis=1)[:24]
        said = [
            f"{'right' if n == i else 'WRONG'}: {shown[n]['caption']}"
            for i, n in enumerate(nearest)
        ]
        cells = images.captioned([example["image"] for example in shown[:24]], said)
        file.parent.mkdir(exist_ok=True)
        images.save_png(file, images.grid(cells, columns=6, gap=8))

    def finish(self, params):
        params = jax.device_get(sharding.fetch(params))
        if jax.process_index() == 0:
            text = dataclasses.replace(
                self._job.clip.text, eos_token_id=self._tokenizer.eos_token_id
            )
            config = dataclasses.replace(self._job.clip, text=text)
            with tempfile.TemporaryDirectory() as made:
                folder = pathlib.Path(made)
                published.write(folder, config, params, self._tokenizer_files)
                paths.copy_folder(folder, self._workdir / "clip")


def retrieved(
    pictures: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> tuple[float, float]:
    """The share of pictures whose own text is the nearest, and of texts whose own picture is."""
    near, own = pictures @ texts.T, np.arange(len(pictures))
    return float((near.argmax(1) == own).mean()), float((near.argmax(0) == own).mean())


@functools.partial(jax.jit, static_argnums=0)
def _embedded(config: CLIPConfig, params: Any, pictures: Array, ids: Array) -> tuple[Array, Array]:
    module = Network(config).bind(params)
    return module.image(published.normalised(pictures)), module.text(ids)


_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def _tokenizer(
    job: CLIPTraining, source: Source, workdir: paths.Path, own: pathlib.Path
) -> pathlib.Path:
    """The run's tokenizer: learned by the first process, and kept in WORKDIR/tokenizer."""
    kept = workdir / "tokenizer"
    if not (kept / _FILES[0]).exists() and jax.process_index() == 0:
        merges = job.clip.text.vocab_size - 514
        text_clip.write_tokenizer(own / "made", _captions(source, job.vocabulary_captions), merges)
        paths.make_folder(kept)
        for name in reversed(_FILES):  # vocab.json, which says that all are there, is the last
            with paths.writing(kept / name) as file:
                shutil.copyfile(own / "made" / name, file)
    multihost_utils.sync_global_devices("the tokenizer is learned")
    return paths.local_copy(kept)


def _captions(source: Source, count: int) -> Iterator[str]:
    for index in range(min(len(source), count)):
        with contextlib.suppress(BadRecord):
            yield from itertools.islice(source.captions_of(index), 5)
