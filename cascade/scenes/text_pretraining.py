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
import io
import json
import pathlib
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import sentencepiece
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cascade.config import to_json
from cascade.errors import UserError
from cascade.models.t5 import T5Config, T5Decoder, T5EncoderModel
from cascade.scenes.captions import Caption, captions, mentions
from cascade.scenes.spec import generator, scene_at
from cascade.storage import paths
from cascade.storage.paths import Path
from cascade.text.t5 import write_folder
from cascade.text.tokenizer import EOS_ID, PAD_ID, Tokenizer

SENTINELS = 100  # the last ids of the vocabulary, counted down from the end as in T5
_FEWEST_IDS = 256 + 100 + SENTINELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPretraining:
    """What `cascade train` needs to make a text encoder.

    encoder: sizes; its vocab_size counts the SentencePiece pieces and SENTINELS more.
    examples: how many in all; each step takes batch_size of them.
    described, retold: the shares of examples with these tasks; the rest are corrupted.
    hidden: up to this share of the encoder's outputs (uniformly) is hidden from the decoder.
    corrupted: the share of tokens masked, in spans of mean_span tokens on average.
    length: tokens; what is longer is cut.
    learning_rate: reached after warmup_steps, then falls to zero along a cosine.
    vocabulary_captions: captions that the SentencePiece vocabulary is trained on.
    """

    encoder: T5Config
    examples: int
    batch_size: int = 64
    described: float = 0.5
    retold: float = 0.4
    hidden: float = 0.8
    corrupted: float = 0.25
    mean_span: float = 1.5
    length: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    vocabulary_captions: int = 20_000
    log_every_steps: int = 50
    save_every_steps: int = 250
    seed: int = 0

    def __post_init__(self):
        free = ("seed", "warmup_steps")
        every = ("log_every_steps", "save_every_steps")
        for name in ("examples", "batch_size", "length", "vocabulary_captions", *every, *free):
            if (value := getattr(self, name)) < (least := int(name not in free)):
                raise ValueError(f"TextPretraining.{name} must be at least {least}, got {value}")
        if self.encoder.vocab_size < _FEWEST_IDS:
            raise ValueError(
                "TextPretraining.encoder.vocab_size must leave room for 256 bytes, characters and "
                f"{SENTINELS} sentinels: at least {_FEWEST_IDS}, got {self.encoder.vocab_size}"
            )
        if not 0 < self.corrupted < 1 or self.mean_span < 1:
            raise ValueError(
                "TextPretraining.corrupted must lie in (0, 1) and mean_span be at least 1, got "
                f"{self.corrupted} and {self.mean_span}"
            )

        if min(self.described, self.retold) < 0 or self.described + self.retold > 1:
            raise ValueError(
                "TextPretraining.described and retold are shares of the examples, at most 1 "
                f"together, got {self.described} and {self.retold}"
            )

    @property
    def steps(self) -> int:
        return -(-self.examples // self.batch_size)


def pretrain(config: TextPretraining, workdir: str | Path, *, until: int | None = None) -> None:
    """Pretrain in `workdir`, from its saved state if it has one, and write WORKDIR/text_encoder.

    workdir: a folder here, or gs://BUCKET/NAME or s3://BUCKET/NAME.
    until: stop, with the state saved, after this many steps instead of config.steps; the same call
    again goes on from there, to the same parameters as if it had not stopped.
    """
    from tqdm import tqdm

    workdir = paths.path(workdir)
    paths.make_folder(workdir)
    _check_config(config, workdir / "config.json")
    spiece = _vocabulary(config, workdir / "spiece.model")
    tokenizer = Tokenizer(spiece, config.encoder.n_positions)
    optimizer = _optimizer(config)
    state = _restored(_initial_state(config, optimizer), workdir / "state.safetensors")
    train_step = jax.jit(_train_step(config, optimizer), donate_argnums=0)
    step, last = int(state["step"]), config.steps if until is None else min(config.steps, until)
    log = _Log(config, workdir, step)
    bar = tqdm(
        total=config.examples, initial=step * config.batch_size, unit="ex", desc="text encoder"
    )
    with bar:
        for batch in _ahead(batches(config, tokenizer, step, last)):
            state, loss = train_step(state, batch)
            step += 1
            log.add(loss)
            bar.update(config.batch_size)
            if step % config.log_every_steps == 0 or step == last:
                bar.set_postfix(loss=f"{log.write(step):.4f}")
            if step % config.save_every_steps == 0 or step == last:
                _save(state, workdir / "state.safetensors")
    if step == config.steps:
        params = jax.device_get(state["params"]["encoder"])
        with tempfile.TemporaryDirectory() as made:
            write_folder(pathlib.Path(made), config.encoder, params, spiece)
            paths.copy_folder(pathlib.Path(made), workdir / "text_encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """Ids without end of sequence.

    visible: whether the decoder is shown the encoder's output there (one more, for the end).
    """

    source: Int[np.ndarray, " l"]
    target: Int[np.ndarray, " m"]
    visible: Bool[np.ndarray, " l+1"]


def example(config: TextPretraining, tokenizer: Tokenizer, index: int) -> Example:
    """Number `index` of the endless list that config.seed names."""
    rng = generator(config.seed, index, "train", purpose=2)
    task = rng.random()
    if task < config.described:
        scene = scene_at(config.seed, index, "train", min_objects=2)  # one alone stands nowhere
        return description(config, tokenizer, captions(scene, rng, 1)[0], rng)
    scene = scene_at(config.seed, index, "train")
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
    config: TextPretraining, tokenizer: Tokenizer, start: int, stop: int
) -> Iterator[dict[str, np.ndarray]]:
    """Steps start to stop - 1: `inputs`, `visible`, `targets`, all [b, l]; padded PAD_ID and False.

    Examples of about the same length share a batch, and batches have one of a few widths: they are
    made in groups of _GROUP, sorted by length, and dealt out in random order.
    """
    for group in range(start // _GROUP, -(-stop // _GROUP)):
        made = _group(config, tokenizer, group)
        yield from made[max(start - group * _GROUP, 0) : stop - group * _GROUP]


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


State = dict[str, Any]

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
    return {"inputs": inputs, "visible": visible, "targets": targets}


def _thrown(rng: np.random.Generator, balls: int, bins: int) -> np.ndarray:
    """How many of `balls` fall in each of `bins`, all outcomes (not all throws) equally likely."""
    bars = np.sort(rng.choice(balls + bins - 1, bins - 1, replace=False))
    return np.diff(bars, prepend=-1, append=balls + bins - 1) - 1


def _vocabulary(config: TextPretraining, path: Path) -> bytes:
    if not path.exists():
        model = train_vocabulary(_vocabulary_texts(config), config.encoder.vocab_size - SENTINELS)
        _write(path, model)
    return path.read_bytes()


def _vocabulary_texts(config: TextPretraining) -> Iterator[str]:
    for index in range(config.vocabulary_captions):
        rng = generator(config.seed, index, "train", purpose=3)
        yield captions(scene_at(config.seed, index, "train"), rng, 1)[0].text
    words = _COMMON_WORDS.split()
    rng = np.random.Generator(np.random.PCG64(config.seed))
    for _ in range(max(config.vocabulary_captions // 4, 50)):
        yield " ".join(words[int(rng.random() * len(words))] for _ in range(10))


def _initial_state(config: TextPretraining, optimizer: optax.GradientTransformation) -> State:
    k_encoder, k_decoder = jax.random.split(jax.random.key(config.seed))
    params = {
        "encoder": nnx.to_pure_dict(nnx.state(T5EncoderModel(config.encoder, nnx.Rngs(k_encoder)))),
        "decoder": nnx.to_pure_dict(nnx.state(T5Decoder(config.encoder, nnx.Rngs(k_decoder)))),
        "words": jnp.zeros((config.encoder.d_model, config.encoder.vocab_size)),
    }
    return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def _optimizer(config: TextPretraining) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup_steps, config.steps // 2), config.steps
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay),
        # An Adam step has one size for all; these few numbers start near 0 and must reach about 5,
        # or no head can look at a neighbour.
        optax.masked(optax.scale(20.0), _position_tables),
    )


def _position_tables(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "relative_attention_bias", params
    )


def _train_step(
    config: TextPretraining, optimizer: optax.GradientTransformation
) -> Callable[[State, dict[str, Array]], tuple[State, Array]]:
    """(state, batch) -> the next state, the decoder's loss."""
    predict = _logits(config.encoder)

    def loss_of(params, batch):
        targets, mask = batch["targets"], batch["targets"] != PAD_ID
        words, in_order = predict(params, batch)
        decoded = optax.softmax_cross_entropy_with_integer_labels(in_order, targets)
        read = -jnp.take_along_axis(jax.nn.log_softmax(words), targets, axis=-1)
        return jnp.mean(decoded + read, where=mask), jnp.mean(decoded, where=mask)

    def train_step(state, batch):
        gradients, loss = jax.grad(loss_of, has_aux=True)(state["params"], batch)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}, loss

    return train_step


def _logits(
    config: T5Config,
) -> Callable[[dict, dict[str, Array]], tuple[Float[Array, "b v"], Float[Array, "b m v"]]]:
    """(params, batch) -> logits of the target's words, read linearly; and of every token of the
    target given the ones before it.
    """
    encoder_def = nnx.graphdef(nnx.eval_shape(lambda: T5EncoderModel(config, nnx.Rngs(0))))
    decoder_def = nnx.graphdef(nnx.eval_shape(lambda: T5Decoder(config, nnx.Rngs(0))))

    def predict(params, batch):
        encoder = nnx.merge(encoder_def, params["encoder"])
        decoder = nnx.merge(decoder_def, params["decoder"])
        inputs, targets, visible = batch["inputs"], batch["targets"], batch["visible"]
        encoded = encoder(inputs, inputs != PAD_ID)
        words = jnp.mean(encoded, axis=1, where=visible[:, :, None]) @ params["words"]
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        return words, decoder(encoder.shared[...][shifted], encoded, visible)

    return predict


def _check_config(config: TextPretraining, path: Path) -> None:
    """Refuse to continue another run's folder; remember the config in a new one."""
    if (path.parent / "checkpoints").exists():
        raise UserError(f"{path.parent}: holds a stage's run; name another --workdir")
    current = to_json(config)
    saved = json.loads(path.read_text()) if path.exists() else current
    fixed = current.keys() - {"log_every_steps", "save_every_steps"}
    if differing := sorted(k for k in fixed if saved.get(k) != current[k]):
        raise UserError(
            f"{path.parent}: holds a run with another config ({', '.join(differing)}); use that "
            "one, or a new --workdir"
        )
    _write(path, json.dumps(current, indent=2).encode())


def _save(state: State, path: Path) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    _write(path, safetensors.numpy.save(named))


def _restored(state: State, path: Path) -> State:
    """The saved state, in the structure of `state`; `state` itself when there is none."""
    if not path.exists():
        return state
    with paths.reading(path) as file:
        saved = safetensors.numpy.load_file(file)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(saved[jax.tree_util.keystr(path)]), state
    )


def _write(path: Path, contents: bytes) -> None:
    """All or nothing: an interrupted run leaves the old file."""
    with paths.writing(path) as file:
        file.write_bytes(contents)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made in the background while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, items, end)
        while (current := item.result()) is not end:
            item = pool.submit(next, items, end)
            yield current


class _Log:
    """metrics.jsonl and loss.png; rows after `step`, of a run that was cut off, are dropped."""

    def __init__(self, config: TextPretraining, workdir: Path, step: int):
        self._config, self._since, self._pending = config, (time.perf_counter(), step), []
        self._path, self._plot = workdir / "metrics.jsonl", workdir / "loss.png"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._rows = [row for row in map(_parsed, lines) if row and row["step"] <= step]
        self._write_rows()

    def add(self, loss: Array) -> None:
        self._pending.append(loss)

    def write(self, step: int) -> float:
        loss, self._pending = float(np.mean(jax.device_get(self._pending))), []
        if not np.isfinite(loss):
            raise UserError(
                f"training diverged: the loss is {loss} at step {step}; lower learning_rate"
            )
        now, (then, before) = time.perf_counter(), self._since
        self._since = (now, step)
        rate = (step - before) * self._config.batch_size / (now - then)
        self._rows.append({"step": step, "loss": loss, "examples_per_second": round(rate, 1)})
        self._write_rows()
        self._draw()
        return loss

    def _write_rows(self) -> None:
        # Whole each time: object storage cannot append, and the rows are few.
        _write(self._path, "".join(json.dumps(row) + "\n" for row in self._rows).encode())

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["step"] for r in self._rows], [r["loss"] for r in self._rows])
        axes.set(xlabel="steps", ylabel="cross-entropy of masked tokens (nats)", yscale="log")
        axes.grid(alpha=0.3)
        with paths.writing(self._plot) as file:
            figure.savefig(file, dpi=120, format="png")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # half a line, as older runs left it when they were killed
        return None


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
