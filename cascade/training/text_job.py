"""Making a small T5 encoder of captions alone (after Raffel et al. 2020).

Two text-to-text tasks, mixed; a job may have more:

    retelling         a caption -> itself, or another caption of the same picture
    span corruption   one or two captions of a picture, spans masked -> the masked spans

A random share of the encoder's outputs is hidden from the decoder: otherwise the decoder reads
"red" at "red", and nothing ever asks "circle" to know it. The decoder is thrown away.

Beside the decoder a linear map reads the words of the target, in no order, from the mean of what is
visible: a diffusion model's attention has linear keys, and finds nothing that is said otherwise.

The encoder's heads begin by looking at the words behind or ahead (see models/t5.py): from T5's own
initial values, 2500 steps left the colour of a thing half unreadable at its noun; with these, a
thousand steps suffice.
"""

import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cascade import ranges
from cascade.devices import sharding
from cascade.models.t5 import T5Config, T5Decoder, T5EncoderModel
from cascade.storage import paths
from cascade.storage.paths import Path
from cascade.text.t5 import write_folder
from cascade.text.tokenizer import EOS_ID, PAD_ID, Tokenizer
from cascade.text.vocabulary import train_vocabulary
from cascade.training.job import Job, Running

SENTINELS = 100  # the last ids of the vocabulary, counted down from the end as in T5
_FEWEST_IDS = 256 + 100 + SENTINELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextJob(Job):
    """Make a text encoder: a job whose examples are captions. It ends in WORKDIR/text_encoder.

    Subclasses say whose captions, by `texts`.
    """

    batch_size: int = 64
    """Captions a step, over all devices and microbatches."""
    ema_decay: float = 0.0
    """What the average of the weights keeps of itself at each step; with 0 it is the weights."""
    log_every_images: int = 3_200
    """Captions from one row of metrics.jsonl to the next."""
    save_every_images: int = 16_000
    """Captions from one checkpoint to the next."""
    preview_every_images: int = 16_000
    """Captions from one preview to the next; 0 is never."""
    encoder: T5Config
    """Sizes; its vocab_size counts the SentencePiece pieces and SENTINELS more."""
    retold: float = 0.4
    """Share of the examples that are retellings, in [0, 1]."""
    hidden: float = 0.8
    """Up to this share of the encoder's outputs (uniformly) is hidden from the decoder."""
    corrupted: float = 0.25
    """Share of tokens masked in span corruption, in (0, 1)."""
    mean_span: float = 1.5
    """Length of the masked spans on average, in tokens, at least 1."""
    length: int = 64
    """Tokens of a text; what is longer is cut."""
    learning_rate: float = 2e-3
    """Reached after warmup_images, then falls to zero along a cosine."""
    warmup_images: int = 12_800
    """Examples over which the rate rises, at most half of all."""
    weight_decay: float = 0.01
    """Decay of adamw."""
    vocabulary_captions: int = 20_000
    """Captions that the SentencePiece vocabulary is trained on."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "vocabulary_captions"):
            self.at_least(name, 1)
        self.at_least("warmup_images", 0)
        if self.encoder.vocab_size < _FEWEST_IDS:
            raise ValueError(
                f"{self._kind}.encoder.vocab_size must leave room for 256 bytes, characters and "
                f"{SENTINELS} sentinels: at least {_FEWEST_IDS}, got {self.encoder.vocab_size}"
            )
        ranges.real(self, 0, 1, "retold", "hidden", "corrupted", "weight_decay")
        ranges.real(self, 0, 1e3, "mean_span")
        ranges.real(self, 0, 1e30, "learning_rate")
        if not 0 < self.corrupted < 1 or self.mean_span < 1:
            raise ValueError(
                f"{self._kind}.corrupted must lie in (0, 1) and mean_span be at least 1, got "
                f"{self.corrupted} and {self.mean_span}"
            )
        if self.minutes is not None:
            raise ValueError(
                f"{self._kind}.minutes must be None, since its rate follows the number of steps, "
                f"got {self.minutes}"
            )

    @property
    def name(self) -> str:
        return "text encoder"

    @property
    def even(self) -> bool:
        return False

    @property
    def fixed(self) -> dict[str, Any]:
        free = {f.name for f in dataclasses.fields(Job)} - {"images", "seed"}
        own = [f.name for f in dataclasses.fields(self) if f.name not in free]
        return super().fixed | {name: getattr(self, name) for name in own}

    def fresh(self, key):
        k_encoder, k_decoder = jax.random.split(jax.random.key(self.seed))
        encoder = T5EncoderModel(self.encoder, nnx.Rngs(k_encoder))
        decoder = T5Decoder(self.encoder, nnx.Rngs(k_decoder))
        return {
            "encoder": nnx.to_pure_dict(nnx.state(encoder)),
            "decoder": nnx.to_pure_dict(nnx.state(decoder)),
            "words": jnp.zeros((self.encoder.d_model, self.encoder.vocab_size)),
        }

    def loss(self, params, batch, key, part=None):
        """batch: what `batches` gives, inputs int32 [b, l], visible bool [b, l], targets int32
        [b, m], told int32 [b]."""
        targets, mask = batch["targets"], batch["targets"] != PAD_ID
        words, in_order = logits(self.encoder, params, batch)
        decoded = optax.softmax_cross_entropy_with_integer_labels(in_order, targets)
        read = -jnp.take_along_axis(jax.nn.log_softmax(words), targets, axis=-1)
        # All tokens count alike, those of parts of a batch too, which have not equally many.
        told = batch["told"][0] / (1 if part is None else part[1])
        # The figure to follow is the decoder's: nats a token.
        loss = jnp.sum(decoded, where=mask) / told
        return jnp.sum(decoded + read, where=mask) / told, {"loss": loss}

    def batch_shapes(self, tokens, b=None):
        shape = (b or self.batch_size, tokens)
        ids, seen = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
        told = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        return {"inputs": ids, "visible": seen, "targets": ids, "told": told}

    def transformation(self, steps=None):
        warmup = min(self.warmup_images // self.batch_size, self.steps // 2)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(rate, b2=0.98, weight_decay=self.weight_decay),
            # An Adam step has one size for all; these few numbers start near 0 and must reach about
            # 5, or no head can look at a neighbour.
            optax.masked(optax.scale(20.0), _position_tables),
        )

    def texts(self) -> "Texts":
        """What it learns from. Raises UserError for data that is not there."""
        raise NotImplementedError

    def open(self, mesh, workdir):
        return _RunningTextEncoder(self, mesh, workdir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """What the encoder reads and the decoder is to write, as ids without end of sequence."""

    source: Int[np.ndarray, " l"]
    """Ids of the text that the encoder reads."""
    target: Int[np.ndarray, " m"]
    """Ids of the text that the decoder is to write."""
    visible: Bool[np.ndarray, " l+1"]
    """Whether the decoder is shown the encoder's output there; the last is the end of sequence."""


class Texts:
    """Endless lists of examples: those that are learned, and others that show what is known.

    Subclasses give captions, and may add tasks.
    """

    others: str
    """What the examples are that show what is known by now, for the preview."""

    def __init__(self, job: Any):
        """job: the TextJob."""
        self.job = job

    @property
    def tasks(self) -> dict[str, float]:
        """The share of the examples that each task has."""
        return {"retelling": self.job.retold, "span corruption": 1 - self.job.retold}

    def vocabulary(self) -> Iterator[str]:
        """The texts that the vocabulary is made of."""
        raise NotImplementedError

    def captions(
        self, index: int, rng: np.random.Generator, most: int, other: bool
    ) -> Sequence[str]:
        """Captions of one picture, at least one and at most so many, no two alike.

        index: of the example. other: whether it is one of those that are not learned.
        """
        raise NotImplementedError

    def generator(self, number: int, purpose: int, other: bool = False) -> np.random.Generator:
        """The random numbers of an example (purpose 2) or of a group of batches (4)."""
        return np.random.default_rng((self.job.seed, number, purpose, int(other)))

    def skipped(self) -> list[tuple[str, str]]:
        """The (key, reason) of records that could not be read since this was last asked."""
        return []

    def example(
        self, tokenizer: Tokenizer, index: int, task: str | None = None, other: bool = False
    ) -> Example:
        """Example `index` of an endless list that the job's seed names.

        task: None draws one in its share. other: of the list that is not learned.
        """
        rng = self.generator(index, 2, other)
        ends = itertools.accumulate(self.tasks.values())
        drawn = rng.random()
        if task is None:
            found = (name for name, end in zip(self.tasks, ends, strict=True) if drawn < end)
            task = next(found, "span corruption")
        return self.of_task(task, tokenizer, index, rng, other)

    def of_task(
        self, task: str, tokenizer: Tokenizer, index: int, rng: np.random.Generator, other: bool
    ) -> Example:
        """The example of that number as a task has it; `rng` is its own."""
        job = self.job
        if task == "retelling":
            texts = self.captions(index, rng, 2, other)
            source = tokenizer.pieces(texts[0])
            target = tokenizer.pieces(texts[int(rng.random() * len(texts))])
        else:
            texts = self.captions(index, rng, 1 + int(rng.random() * 2), other)
            source, target = span_corruption(
                np.asarray(tokenizer.pieces(" . ".join(texts)), np.int64),
                rng,
                corrupted=job.corrupted,
                mean_span=job.mean_span,
                first_sentinel=job.encoder.vocab_size - 1,
            )
        source, target = source[: job.length - 1], target[: job.length - 1]
        visible = rng.random(len(source) + 1) >= job.hidden * rng.random()
        return Example(
            source=np.asarray(source, np.int64),
            target=np.asarray(target, np.int64),
            visible=visible | ~visible.any(),
        )


class _RunningTextEncoder(Running):
    """Captions, and the vocabulary that the run has made of them."""

    def __init__(self, job: TextJob, mesh: Mesh, workdir: Path):
        self._job, self._mesh, self._workdir = job, mesh, workdir
        self._texts = job.texts()
        self._spiece = _vocabulary(job, self._texts, workdir / "spiece.model")
        self._tokenizer = Tokenizer(self._spiece, job.encoder.n_positions)
        rows = sharding.process_rows(mesh, job.batch_size)
        self.batches = TextBatches(job, self._texts, self._tokenizer, rows)

    def prepare(self, batch, step):
        return sharding.shard_batch(batch, self._mesh)

    def skipped(self):
        return self._texts.skipped()

    def preview(self, params, batch, file):
        """Plot which share of the tokens of other targets each task gets right."""
        params = sharding.fetch(params)
        if jax.process_index() == 0:
            file.parent.mkdir(exist_ok=True)
            shares = shares_right(self._job, self._texts, self._tokenizer, params)
            _plot_shares(shares, f"% of tokens right, of {self._texts.others}", file)

    def finish(self, params):
        params = jax.device_get(sharding.fetch(params["encoder"]))
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory() as made:
                write_folder(pathlib.Path(made), self._job.encoder, params, self._spiece)
                paths.copy_folder(pathlib.Path(made), self._workdir / "text_encoder")


class TextBatches:
    """`batches` without an end, each made in the background while the one before is in use."""

    def __init__(
        self, job: TextJob, texts: Texts, tokenizer: Tokenizer, rows: Int[np.ndarray, " rows"]
    ):
        """rows: of each batch, those that this process is to hold."""
        self._job, self._texts, self._tokenizer, self._rows = job, texts, tokenizer, rows
        self._step, self._pool = 0, ThreadPoolExecutor(1)
        self._start()

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._next.result()
        self._next = self._pool.submit(next, self._made)
        self._step += 1
        return {name: value[self._rows] for name, value in batch.items()}

    def get_state(self) -> dict[str, int]:
        return {"examples": self._step * self._job.batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        if not 0 <= state["examples"] < 2**62:
            raise ValueError("examples must be 0 or more")
        self._step = state["examples"] // self._job.batch_size
        self._start()

    def _start(self) -> None:
        self._made = batches(self._job, self._texts, self._tokenizer, self._step)
        self._next = self._pool.submit(next, self._made)


def batches(
    job: TextJob, texts: Texts, tokenizer: Tokenizer, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Steps from `start` on: `inputs`, `visible`, `targets`, all [b, l]; padded PAD_ID and False.
    `told` [b] has in every row how many tokens all targets of the batch have.

    Examples of about the same length share a batch, and batches have one of a few widths: they are
    made in groups of _GROUP, sorted by length, and dealt out in random order.
    """
    for group in itertools.count(start // _GROUP):
        yield from _group(job, texts, tokenizer, group)[max(start - group * _GROUP, 0) :]


def shares_right(
    job: TextJob, texts: Texts, tokenizer: Tokenizer, params: Any, examples: int = 128
) -> dict[str, float]:
    """Share of the targets' tokens that the decoder, given those before, finds right, by task.

    Of examples that are not learned. Tasks that the job leaves out are left out.
    """
    found = {}
    predict = jax.jit(functools.partial(logits, job.encoder))
    for task, share in texts.tasks.items():
        if share <= 0:
            continue
        batch = padded([texts.example(tokenizer, i, task, other=True) for i in range(examples)])
        _, in_order = predict(params, batch)
        right = np.asarray(in_order).argmax(-1) == batch["targets"]
        found[task] = float(right[batch["targets"] != PAD_ID].mean())
    return found


def span_corruption(
    ids: Int[np.ndarray, " n"],
    rng: np.random.Generator,
    *,
    corrupted: float,
    mean_span: float,
    first_sentinel: int,
) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " m"]]:
    """Replace random spans by sentinels; return (what is left, the spans each after its sentinel).

    About corrupted * n tokens are masked in spans of mean_span tokens on average, never adjacent.
    Sentinels count down from first_sentinel. Splicing the spans back in place of their sentinels
    gives `ids`. Unlike T5's own, spans may lie anywhere, also at the beginning.
    """
    n = len(ids)
    masked = min(max(round(n * corrupted), 1), n - 1)
    if masked < 1:
        return ids, ids[:0]
    spans = min(max(round(masked / mean_span), 1), n - masked + 1, SENTINELS)
    lengths = 1 + _thrown(rng, masked - spans, spans)
    gaps = _thrown(rng, n - masked - (spans - 1), spans + 1)
    gaps[1:-1] += 1
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    source, target, at = [], [], 0
    for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        sentinel = [first_sentinel - k]
        source += [ids[at:start], sentinel]
        target += [sentinel, ids[start : start + length]]
        at = start + length
    source.append(ids[at:])
    return np.concatenate(source).astype(ids.dtype), np.concatenate(target).astype(ids.dtype)


_GROUP = 32  # batches
_WIDTH = 16  # row widths are multiples of this: each width is one more compilation


def _group(
    job: TextJob, texts: Texts, tokenizer: Tokenizer, group: int
) -> list[dict[str, np.ndarray]]:
    size = _GROUP * job.batch_size
    made = [texts.example(tokenizer, i) for i in range(group * size, (group + 1) * size)]
    made.sort(key=lambda e: max(len(e.source), len(e.target)))
    order = texts.generator(group, 4).permutation(_GROUP)
    return [padded(made[i * job.batch_size : (i + 1) * job.batch_size]) for i in order]


def padded(examples: list[Example]) -> dict[str, np.ndarray]:
    """A batch of these examples, as `batches` gives it."""
    longest = 1 + max(max(len(e.source), len(e.target)) for e in examples)
    shape = (len(examples), -(-longest // _WIDTH) * _WIDTH)
    inputs, targets = np.full(shape, PAD_ID, np.int32), np.full(shape, PAD_ID, np.int32)
    visible = np.zeros(shape, bool)
    for row, e in enumerate(examples):
        inputs[row, : len(e.source) + 1] = [*e.source, EOS_ID]
        targets[row, : len(e.target) + 1] = [*e.target, EOS_ID]
        visible[row, : len(e.visible)] = e.visible
    told = np.full(len(examples), (targets != PAD_ID).sum(), np.int32)
    return {"inputs": inputs, "visible": visible, "targets": targets, "told": told}


def _thrown(rng: np.random.Generator, balls: int, bins: int) -> np.ndarray:
    """How many of `balls` fall in each of `bins`, all outcomes (not all throws) equally likely."""
    bars = np.sort(rng.choice(balls + bins - 1, bins - 1, replace=False))
    return np.diff(bars, prepend=-1, append=balls + bins - 1) - 1


def _vocabulary(job: TextJob, texts: Texts, path: Path) -> bytes:
    """What the run has, or the first process makes for all."""
    if jax.process_index() == 0 and not path.exists():
        model = train_vocabulary(texts.vocabulary(), job.encoder.vocab_size - SENTINELS)
        paths.make_folder(path.parent)
        with paths.writing(path) as file:
            file.write_bytes(model)
    multihost_utils.sync_global_devices("the vocabulary was made")
    return path.read_bytes()


def _position_tables(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "relative_attention_bias", params
    )


def logits(
    config: T5Config, params: Any, batch: Mapping[str, Any]
) -> tuple[Float[Array, "b v"], Float[Array, "b m v"]]:
    """Logits of the target's words, read linearly; and of every token of the target given the ones
    before it."""
    encoder_def = nnx.graphdef(nnx.eval_shape(lambda: T5EncoderModel(config, nnx.Rngs(0))))
    decoder_def = nnx.graphdef(nnx.eval_shape(lambda: T5Decoder(config, nnx.Rngs(0))))
    encoder = nnx.merge(encoder_def, params["encoder"])
    decoder = nnx.merge(decoder_def, params["decoder"])
    inputs, targets, visible = batch["inputs"], batch["targets"], batch["visible"]
    encoded = encoder(inputs, inputs != PAD_ID)
    words = jnp.mean(encoded, axis=1, where=visible[:, :, None]) @ params["words"]
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
    return words, decoder(encoder.shared[...][shifted], encoded, visible)


def _plot_shares(shares: Mapping[str, float], label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f%%")
    axes.set(ylim=(0, 105))
    figure.suptitle(label, fontsize="medium")
    with paths.writing(path) as file:
        figure.savefig(file, dpi=120, format="png")
