"""Where the text of a stage's batches comes from: the frozen encoder, or a store of embeddings.

Both give data workers a function of captions, and make of its arrays, once they are on the devices,
`text` float32 [b, l, d] and `text_mask` bool [b, l]:

    Online   captions -> tokens                  -> the encoder, on the devices
    Stored   captions -> rows of the store, int8 -> float32, on the devices; no encoder
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cascade.data import Source
from cascade.data.source import BadRecord
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.text import T5Encoder, TextEmbedding, Tokenizer, Tokens, t5
from cascade.text.store import Store, open_store, restored, rounded
from cascade.text.store_making import encoded
from cascade.training.job import Batches
from cascade.training.step import step_key

if TYPE_CHECKING:
    from cascade.training.stage_training import StageTraining

CHECKED = 1000
"""So many captions of the data, spread over it, are looked for before a run begins."""


class Online:
    """Text by the frozen encoder, on the mesh of the training."""

    def __init__(self, job: StageTraining, mesh: Mesh):
        self._encoder = load_encoder(job, mesh)
        self.reader = self._encoder.tokenizer
        placed = sharding.batch_sharding(mesh)
        self._embed = jax.jit(make_embedder(job, self._encoder), out_shardings=placed)

    def completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of this process, before it is on the devices."""
        return batch

    def embedded(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A batch on the devices with `text` and `text_mask` in place of tokens."""
        ids, mask = batch.pop("tokens"), batch.pop("token_mask")
        return batch | self._embed(self._encoder.params, ids, mask, np.int32(step))

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed texts, as a TextEncoder does."""
        return self._encoder(texts)


class Stored:
    """Text from a store. The encoder is loaded only to embed what is not there, where that is
    asked for."""

    def __init__(self, job: StageTraining, source: Source, mesh: Mesh):
        """Raises UserError where the store is none of the job's encoder, or lacks a caption."""
        self.store = open_store(
            str(job.embeddings), part=jax.process_index(), parts=jax.process_count()
        )
        check_made_by(self.store, job)
        self._tokens = min(job.text_tokens, self.store.config.window)
        self._encoder: T5Encoder | None = None
        if job.embeddings_missing == "encode":
            # Each process embeds its own rows, on a mesh of its own devices, so that none waits.
            local = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), jax.local_devices())
            self._encoder = load_encoder(job, local)
            self._encode = functools.partial(
                encoded,
                self._encoder,
                rows=sharding.batch_parts(local),
                place=functools.partial(jax.device_put, device=sharding.batch_sharding(local)),
            )
        else:
            _check_captions(self.store, source)
        tokenizer = None if self._encoder is None else self._encoder.tokenizer
        self.reader = StoreReader(store=self.store, tokens=self._tokens, tokenizer=tokenizer)
        placed = sharding.batch_sharding(mesh)
        self._restore = jax.jit(self._restorer(job), out_shardings=placed)

    def completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of this process, before it is on the devices, with what the store lacks."""
        if self._encoder is None:
            return batch
        found, ids, mask = (batch.pop(name) for name in ("text_found", "tokens", "token_mask"))
        if found.all():
            return batch
        read = {name: np.array(batch[name]) for name in _READ if name in batch}
        missing = np.flatnonzero(~found)
        for i, value in self._encode(Tokens(ids=ids[missing], mask=mask[missing])):
            row, n = missing[i], len(value)
            values, scales = rounded(value, self.store.config.dtype)
            read["text"][row, :n], read["text_mask"][row, :n] = values, True
            if scales is not None:
                read["text_scale"][row, :n] = scales
        return batch | read

    def embedded(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A batch on the devices with `text` float32 and `text_mask` in place of what was read."""
        read = {name: batch.pop(name) for name in _READ if name in batch}
        return batch | self._restore(read, np.int32(step))

    @property
    def encodes(self) -> bool:
        """Whether texts that are not there can be embedded too."""
        return self._encoder is not None

    def present(self, prompts: Sequence[str]) -> list[str]:
        """Leave out the prompts that cannot be embedded, with a warning that names one of them."""
        left = [] if self._encoder else [text for text in prompts if text not in self.store]
        if left and jax.process_index() == 0:
            print(
                f"warning: previews leave out {len(left)} prompts that {self.store.name} lacks, "
                f"such as {left[0]!r:.100}; `cascade data embed --prompts FILE` embeds them too",
                file=sys.stderr,
            )
        return [text for text in prompts if text not in left]

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed texts, as a TextEncoder does; float32. Raises Missing for one that cannot be."""
        read = self.completed(self.reader(texts))
        values = restored(read["text"], read.get("text_scale"))
        return TextEmbedding(values=jnp.asarray(values), mask=jnp.asarray(read["text_mask"]))

    def _restorer(self, job: StageTraining) -> Any:
        """A pure (arrays of the store's dtype, step) -> the text of a batch."""
        text = job.stage.text
        prompt = None if text is None else text.null_prompt
        null = None if prompt is None else self([prompt])

        def restore(read, step):
            values, mask = restored(read["text"], read.get("text_scale")), read["text_mask"]
            if null is not None and text is not None:
                drop = dropped(job, step, text.dropout, len(mask))
                values = jnp.where(drop[:, None, None], null.values, values)
                mask = jnp.where(drop[:, None], null.mask, mask)
            return {"text": values, "text_mask": mask}

        return restore


_READ = ("text", "text_mask", "text_scale")
"""What a store gives of a batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreReader:
    """What a data worker knows of captions: captions -> arrays, as `Store.read` gives them."""

    store: Store
    """The store, of which every worker maps what it needs."""
    tokens: int
    """The length in tokens that captions are padded to."""
    tokenizer: Tokenizer | None
    """Gives `tokens` and `token_mask` besides, of captions that the store may lack; None refuses
    these."""

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        if self.tokenizer is None:
            return self.store.read(captions, self.tokens)
        tokens = self.tokenizer(captions)
        read = self.store.read(captions, self.tokens, others=True)
        return read | {"tokens": tokens.ids, "token_mask": tokens.mask}


class StoredBatches:
    """Batches whose state says of which store they are."""

    def __init__(self, batches: Batches, store: Store):
        self._batches, self._store, self._digest = batches, store, store.digest

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {**self._batches.get_state(), "embeddings": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there; another store than the run had is told of."""
        had = state.get("embeddings", self._digest)
        if had != self._digest and jax.process_index() == 0:
            print(
                f"embeddings {self._store.name}: the run goes on with another store (SHA-256 "
                f"{had:.12} before, {self._digest:.12} now)",
                file=sys.stderr,
            )
        self._batches.set_state(state)


def load_encoder(job: StageTraining, mesh: Mesh) -> T5Encoder:
    """The frozen text encoder of a stage that reads text, on a mesh. Raises UserError where it is
    not there, or of another width than the stage's."""
    encoder = T5Encoder.load(
        job.text_encoder,
        job.text_tokens,
        captions=job.captions,
        int8=job.text_int8,
        shardings=functools.partial(sharding.shardings, mesh=mesh),
    )
    _check_width(job, encoder.width)
    return encoder


def make_embedder(job: StageTraining, encoder: T5Encoder) -> Any:
    """A pure (encoder.params, token ids, token mask, step) -> the text of a batch.

    Where no text is the embedding of a prompt, that stands in the place of a share of the captions,
    drawn from the job's seed and the step.
    """
    text = job.stage.text
    prompt = None if text is None else text.null_prompt
    null = None if prompt is None else encoder.tokenize([prompt])

    def embed(params, ids, mask, step):
        if null is not None and text is not None:
            drop = dropped(job, step, text.dropout, len(ids))[:, None]
            ids, mask = jnp.where(drop, null.ids, ids), jnp.where(drop, null.mask, mask)
        embedded = encoder.apply(params, ids, mask)
        return {"text": embedded.values, "text_mask": embedded.mask}

    return embed


def dropped(job: StageTraining, step: Any, share: float, b: int) -> Any:
    """Which examples of a step have the prompt of no text in place of their own: bool [b]."""
    # The loss has split the step's key in five; this is the sixth.
    key = jax.random.fold_in(step_key(job, step), 5)
    return jax.random.bernoulli(key, share, (b,))


def check_made_by(store: Store, job: StageTraining) -> None:
    """UserError unless the store holds what the job's encoder says of texts that are read as the
    job reads them.

    Where that encoder is not on this machine, its name is compared alone.
    """
    made, here = store.config, t5.digest_here(job.text_encoder)
    if here != made.encoder_digest and (here or job.text_encoder != made.text_encoder):
        own = "which is not on this machine" if here is None else f"SHA-256 {here:.12}"
        raise UserError(
            f"embeddings {store.name}: were made by the text encoder {made.text_encoder} (SHA-256 "
            f"{made.encoder_digest:.12}), and text_encoder is {job.text_encoder} ({own}); embed "
            "the captions by that one, or set text_encoder to the other"
        )
    for name in ("captions", "text_int8"):
        if (there := getattr(made, name)) != (own := getattr(job, name)):
            raise UserError(
                f"embeddings {store.name}: were made with {name}={there}, and the config has "
                f"{name}={own}; make the two equal"
            )
    tokens = min(job.text_tokens, made.window)
    if not made.reads_as(tokens):
        raise UserError(
            f"embeddings {store.name}: are of texts cut to {made.max_tokens} tokens, the longest "
            f"of {made.longest}, and text_tokens={job.text_tokens} would cut them elsewhere; set "
            f"text_tokens to {made.max_tokens}"
        )
    _check_width(job, made.width)


def _check_width(job: StageTraining, width: int) -> None:
    if job.stage.text is not None:
        try:
            job.stage.text.check_encoder(width, job.text_encoder, job.stage.name)
        except ValueError as e:
            raise UserError(str(e)) from None


def _check_captions(store: Store, source: Source) -> None:
    """Raise Missing where the store lacks one of some captions, spread over the data."""
    count = min(CHECKED, len(source))
    for i in range(count):
        try:
            texts = source.captions_of(i * len(source) // count)
        except BadRecord:
            continue  # the run will say so, in its time
        if missing := [text for text in texts if text not in store]:
            store.read(missing[:1], store.config.max_tokens)
