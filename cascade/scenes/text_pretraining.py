"""Pretraining of a small T5 encoder on captions of drawn scenes (after Raffel et al. 2020).

A diffusion model asks of its text encoder what a bag of words does not give: at the word "circle",
which colour, and whether it is the one above. Three text-to-text tasks, mixed, ask for it:

    description       a whole caption -> all that it says of the thing at one of its nouns
    retelling         a whole caption -> itself, or another caption of the same scene
    span corruption   one or two captions of a scene, spans masked -> the masked spans

In a description the decoder is shown the encoder's output at that noun alone; in the others a
random share of the outputs is hidden from it. Without that the decoder reads "red" at "red", and
nothing ever asks "circle" to know it. The decoder is thrown away.

Beside the decoder a linear map reads the words of the target, in no order, from the mean of what is
visible: a diffusion model's attention has linear keys, and finds nothing that is said otherwise.

A thousand steps suffice for looks, and two thousand for places, because the encoder's heads begin
by looking at the words behind or ahead (see models/t5.py): from T5's own initial values, 2500 steps
left the colour half unreadable at the noun.
"""

import dataclasses
import functools
import io
import itertools
import pathlib
import string
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cascade import ranges
from cascade.devices import sharding
from cascade.models.t5 import T5Config, T5Decoder, T5EncoderModel
from cascade.scenes.captions import Caption, captions, mentions
from cascade.scenes.spec import Split, generator, scene_at
from cascade.storage import paths
from cascade.storage.paths import Path
from cascade.text.t5 import write_folder
from cascade.text.tokenizer import EOS_ID, PAD_ID, Tokenizer
from cascade.training.job import Job, Running

SENTINELS = 100  # the last ids of the vocabulary, counted down from the end as in T5
_FEWEST_IDS = 256 + 100 + SENTINELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPretraining(Job):
    """Make a text encoder: a job whose examples are captions. It ends in WORKDIR/text_encoder."""

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
    described: float = 0.5
    """Share of the examples that are descriptions, in [0, 1]."""
    retold: float = 0.4
    """Share of the examples that are retellings; the rest are corrupted."""
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
                "TextPretraining.encoder.vocab_size must leave room for 256 bytes, characters and "
                f"{SENTINELS} sentinels: at least {_FEWEST_IDS}, got {self.encoder.vocab_size}"
            )
        ranges.real(self, 0, 1, "described", "retold", "hidden", "corrupted", "weight_decay")
        ranges.real(self, 0, 1e3, "mean_span")
        ranges.real(self, 0, 1e30, "learning_rate")
        if not 0 < self.corrupted < 1 or self.mean_span < 1:
            raise ValueError(
                "TextPretraining.corrupted must lie in (0, 1) and mean_span be at least 1, got "
                f"{self.corrupted} and {self.mean_span}"
            )

        if self.minutes is not None:
            raise ValueError(
                "TextPretraining.minutes must be None, since its rate follows the number of steps, "
                f"got {self.minutes}"
            )
        if min(self.described, self.retold) < 0 or self.described + self.retold > 1:
            raise ValueError(
                "TextPretraining.described and retold are shares of the examples, at most 1 "
                f"together, got {self.described} and {self.retold}"
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

    def open(self, mesh, workdir):
        return _RunningTextEncoder(self, mesh, workdir)


class _RunningTextEncoder(Running):
    """Captions, and the vocabulary that the run has made of them."""

    def __init__(self, job: TextPretraining, mesh: Mesh, workdir: Path):
        self._job, self._mesh, self._workdir = job, mesh, workdir
        self._spiece = _vocabulary(job, workdir / "spiece.model")
        self._tokenizer = Tokenizer(self._spiece, job.encoder.n_positions)
        rows = sharding.process_rows(mesh, job.batch_size)
        self.batches = TextBatches(job, self._tokenizer, rows)

    def prepare(self, batch, step):
        return sharding.shard_batch(batch, self._mesh)

    def preview(self, params, batch, file):
        """Plot which share of held-out targets' tokens each task gets right."""
        params = sharding.fetch(params)
        if jax.process_index() == 0:
            file.parent.mkdir(exist_ok=True)
            _plot_shares(shares_right(self._job, self._tokenizer, params), file)

    def finish(self, params):
        params = jax.device_get(sharding.fetch(params["encoder"]))
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory() as made:
                write_folder(pathlib.Path(made), self._job.encoder, params, self._spiece)
                paths.copy_folder(pathlib.Path(made), self._workdir / "text_encoder")


class TextBatches:
    """`batches` without an end, each made in the background while the one before is in use."""

    def __init__(self, job: TextPretraining, tokenizer: Tokenizer, rows: Int[np.ndarray, " rows"]):
        """rows: of each batch, those that this process is to hold."""
        self._job, self._tokenizer, self._rows = job, tokenizer, rows
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
        self._made = batches(self._job, self._tokenizer, self._step)
        self._next = self._pool.submit(next, self._made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """What the encoder reads and the decoder is to write, as ids without end of sequence."""

    source: Int[np.ndarray, " l"]
    """Ids of the text that the encoder reads."""
    target: Int[np.ndarray, " m"]
    """Ids of the text that the decoder is to write."""
    visible: Bool[np.ndarray, " l+1"]
    """Whether the decoder is shown the encoder's output there; the last is the end of sequence."""


def example(
    config: TextPretraining, tokenizer: Tokenizer, index: int, split: Split = "train"
) -> Example:
    """Number `index` of the endless list that config.seed and the split name."""
    rng = generator(config.seed, index, split, purpose=2)
    task = rng.random()
    if task < config.described:
        scene = scene_at(config.seed, index, split, min_objects=2)  # one alone stands nowhere
        return description(config, tokenizer, captions(scene, rng, 1)[0], rng)
    scene = scene_at(config.seed, index, split)
    if task < config.described + config.retold:
        texts = [c.text for c in captions(scene, rng, 2)]
        source = tokenizer.pieces(texts[0])
        target = tokenizer.pieces(texts[int(rng.random() * 2)])
    else:
        text = " . ".join(c.text for c in captions(scene, rng, 1 + int(rng.random() * 2)))
        source, target = span_corruption(
            np.asarray(tokenizer.pieces(text)),
            rng,
            corrupted=config.corrupted,
            mean_span=config.mean_span,
            first_sentinel=config.encoder.vocab_size - 1,
        )
    source, target = source[: config.length - 1], target[: config.length - 1]
    visible = rng.random(len(source) + 1) >= config.hidden * rng.random()
    return Example(
        source=np.asarray(source), target=np.asarray(target), visible=visible | ~visible.any()
    )


def description(
    config: TextPretraining, tokenizer: Tokenizer, caption: Caption, rng: np.random.Generator
) -> Example:
    """One noun of a caption -> what the caption says of its thing, that noun alone visible."""
    nouns = mentions(caption)
    start, said = nouns[int(rng.random() * len(nouns))]
    # Pieces never cross a space: those of a beginning are the beginning of the pieces.
    first = len(tokenizer.pieces(caption.text[:start].rstrip()))
    source, target = (tokenizer.pieces(t)[: config.length - 1] for t in (caption.text, said))
    visible = np.arange(len(source) + 1) == first
    return Example(
        source=np.asarray(source),
        target=np.asarray(target),
        visible=visible | ~visible.any(),  # all, if the noun was cut off
    )


def batches(
    config: TextPretraining, tokenizer: Tokenizer, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Steps from `start` on: `inputs`, `visible`, `targets`, all [b, l]; padded PAD_ID and False.
    `told` [b] has in every row how many tokens all targets of the batch have.

    Examples of about the same length share a batch, and batches have one of a few widths: they are
    made in groups of _GROUP, sorted by length, and dealt out in random order.
    """
    for group in itertools.count(start // _GROUP):
        yield from _group(config, tokenizer, group)[max(start - group * _GROUP, 0) :]


def shares_right(
    config: TextPretraining, tokenizer: Tokenizer, params: Any, examples: int = 128
) -> dict[str, float]:
    """Share of the targets' tokens that the decoder, given those before, finds right, by task.

    Of held-out examples: those of the split "seen". Tasks that the config leaves out are left out.
    """
    found = {}
    predict = jax.jit(functools.partial(logits, config.encoder))
    wanted = {"description": config.described, "retelling": config.retold}
    wanted["span corruption"] = 1 - config.described - config.retold
    alone = {"described": 0.0, "retold": 0.0}
    for task, share in wanted.items():
        if share <= 0:
            continue
        field = {"description": "described", "retelling": "retold"}.get(task)
        only = dataclasses.replace(config, **(alone | ({field: 1.0} if field else {})))
        batch = _padded([example(only, tokenizer, i, "seen") for i in range(examples)])
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


def train_vocabulary(texts: Iterator[str], pieces: int) -> bytes:
    """A SentencePiece unigram model with T5's ids: 0 padding, 1 end of sequence, 2 unknown.

    Letter case is folded. Characters that the texts do not have are spelled in bytes, so that no
    two words become one. Deterministic.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        required_chars=string.ascii_lowercase + string.digits + string.punctuation,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


_GROUP = 32  # batches
_WIDTH = 16  # row widths are multiples of this: each width is one more compilation


def _group(
    config: TextPretraining, tokenizer: Tokenizer, group: int
) -> list[dict[str, np.ndarray]]:
    size = _GROUP * config.batch_size
    made = [example(config, tokenizer, i) for i in range(group * size, (group + 1) * size)]
    made.sort(key=lambda e: max(len(e.source), len(e.target)))
    order = generator(config.seed, group, "train", purpose=4).permutation(_GROUP)
    return [_padded(made[i * config.batch_size : (i + 1) * config.batch_size]) for i in order]


def _padded(examples: list[Example]) -> dict[str, np.ndarray]:
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


def _vocabulary(config: TextPretraining, path: Path) -> bytes:
    """What the run has, or the first process makes for all."""
    if jax.process_index() == 0 and not path.exists():
        model = train_vocabulary(_vocabulary_texts(config), config.encoder.vocab_size - SENTINELS)
        paths.make_folder(path.parent)
        with paths.writing(path) as file:
            file.write_bytes(model)
    multihost_utils.sync_global_devices("the vocabulary was made")
    return path.read_bytes()


def _vocabulary_texts(config: TextPretraining) -> Iterator[str]:
    for index in range(config.vocabulary_captions):
        rng = generator(config.seed, index, "train", purpose=3)
        yield captions(scene_at(config.seed, index, "train"), rng, 1)[0].text
    words = _COMMON_WORDS.split()
    rng = np.random.Generator(np.random.PCG64(config.seed))
    for _ in range(max(config.vocabulary_captions // 4, 50)):
        yield " ".join(words[int(rng.random() * len(words))] for _ in range(10))


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


def _plot_shares(shares: Mapping[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(shares), [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f%%")
    axes.set(ylabel="tokens right on held-out captions", ylim=(0, 105))
    with paths.writing(path) as file:
        figure.savefig(file, dpi=120, format="png")


# Words that captions lack and prompts may have: the vocabulary gets pieces for them.
_COMMON_WORDS = """
a an the this that these those some any no not and or but with without of in on at by to from for
near far over under above below beside behind before after between among around across through
into onto out up down off left right top bottom middle center centre front back corner edge side
inside outside next facing toward i you he she it we they his her its their my your our who what
where when why how which all each every both few many much more most other another same different
such only very too so as than like just also again one two three four five six seven eight nine
ten hundred thousand first second third last half double single pair is are was were be been being
has have had do does did can could will would should may might must make makes made draw drawn
paint painted painting show shows showing stand stands standing sit sits sitting lie lies lying
run runs running walk walking fly flies flying jump jumping swim swimming ride riding hold holding
wear wearing eat eating drink drinking play playing look looking sleep sleeping smile smiling
dance dancing sing hang hanging float floating fall falling rise rising glow glowing burn burning
open closed broken empty full picture photo photograph image drawing sketch art illustration
poster portrait logo icon symbol sign pattern style watercolor oil pencil ink pixel cartoon
realistic abstract modern vintage minimal detailed simple red orange yellow lime green cyan blue
purple pink brown black white gray grey navy mint lavender gold golden silver bronze teal
turquoise violet magenta maroon beige ivory crimson scarlet indigo olive tan peach coral dark
light bright pale deep vivid soft pastel neon colorful colored transparent shiny matte warm cool
circle square triangle star ring cross heart diamond shape shapes line lines dot dots stripe
stripes striped dotted checkered check checks plain spot spots spotted round oval rectangle
pentagon hexagon cube sphere ball cone cylinder pyramid disc disk box block arrow spiral wave
curve grid plus big small large little tiny huge tall short long wide narrow thin thick fat high
low flat giant medium size new old young good bad beautiful pretty cute happy sad angry scary
funny strange fast slow hot cold wet dry clean dirty heavy soft hard smooth rough sharp sweet
fresh wild quiet loud rich poor man woman boy girl child baby people person king queen doctor
soldier astronaut robot monster ghost witch face head hair eye eyes ear nose mouth hand arm leg
foot body cat dog horse cow pig sheep goat bird fish duck chicken rabbit mouse bear lion tiger
elephant monkey fox wolf deer frog snake turtle owl eagle penguin whale shark dolphin bee
butterfly spider ant dragon dinosaur panda tree flower rose grass leaf leaves plant forest garden
park field mountain hill river lake sea ocean beach island desert cave rock stone sand snow ice
rain cloud clouds sky sun moon star stars night day morning evening sunset sunrise storm wind fire
water smoke light shadow rainbow space planet earth world galaxy house home building castle tower
bridge road street city town village church school shop market farm room kitchen bed table chair
desk door window wall floor roof stairs lamp clock mirror car truck bus train bicycle bike boat
ship plane airplane rocket wheel apple banana orange lemon grape cherry strawberry bread cake
pizza cheese egg coffee tea cup glass bottle plate bowl spoon fork knife book paper pen pencil
phone computer camera guitar piano drum hat shirt dress shoe shoes coat bag umbrella glasses crown
sword shield flag balloon kite toy gift candle key wood wooden metal steel iron brick plastic
paper leather fabric background foreground surface scene view object objects thing things color
colors colour colours
"""
