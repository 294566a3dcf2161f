"""A frozen CLIP text encoder with its tokenizer: what latent diffusion is told of a prompt.

A pipeline's folder holds `text_encoder/` (config.json, safetensors) and `tokenizer/` (vocab.json
and merges.txt, or tokenizer.json, and what else transformers' CLIPTokenizer reads).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from cascade.errors import UserError
from cascade.models import CLIPTextConfig, Network
from cascade.storage import hub, weights
from cascade.storage.network import Published, Shapes, read_config
from cascade.storage.weights import Origin
from cascade.text.embedding import TextEmbedding
from cascade.text.tokenizer import Tokens, checked


class CLIPTextEncoder:
    """CLIP's text encoder: texts in, an embedding of each of their tokens and of padding out.

    It is frozen: it has no training mode, and its parameters belong in no optimizer and no
    checkpoint.
    """

    def __init__(self, config: CLIPTextConfig, params: dict, tokenizer: Any):
        """params: CLIPTextModel's arrays, as nested dicts. tokenizer: a CLIPTokenizer."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        network = Network(config)
        self._jitted = jax.jit(lambda params, ids: network.bind(params)(ids))

    @classmethod
    def load(
        cls, folder: Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> CLIPTextEncoder:
        """Read the encoder from a folder with text_encoder/ and tokenizer/.

        compute_dtype: what it computes in, and the dtype of its parameters.
        Raises UserError saying what is missing, damaged, or of another model.
        """
        network = text_encoder(folder)
        config = dataclasses.replace(network.config, compute_dtype=compute_dtype)
        tokenizer = read_tokenizer(folder / "tokenizer", config.vocab_size)
        return cls(config, network.read(compute_dtype), tokenizer)

    @property
    def width(self) -> int:
        """How many channels an embedding has."""
        return self.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """How many tokens every text is padded or cut to."""
        return self.config.max_position_embeddings

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed texts: values [texts, max_tokens, width], mask [texts, max_tokens]."""
        return self.embed(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into rows of beginning, pieces, end, padding: max_tokens in all.

        A text that is too long keeps its beginning and the end of sequence, and is marked in
        `truncated`. Raises as `checked` does.
        """
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """Embed tokens on the device, by a jitted program that is compiled once per batch size.

        The mask changes no value.
        """
        values = self._jitted(self.params, tokens.ids)
        return TextEmbedding(values=values, mask=jax.numpy.asarray(tokens.mask))


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Tokens:
    """Do what `CLIPTextEncoder.tokenize` says, with `length` tokens in all."""
    texts = checked(texts)
    ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
    lengths = np.zeros(len(texts), np.int64)
    truncated = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        pieces = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        truncated[i] = len(pieces) > length - 2
        row = [tokenizer.bos_token_id, *pieces[: length - 2], tokenizer.eos_token_id]
        ids[i, : len(row)], lengths[i] = row, len(row)
    return Tokens(ids=ids, mask=np.arange(length) < lengths[:, None], truncated=truncated)


def text_encoder(folder: Path) -> Published:
    """Read the config of `folder/text_encoder`, and say where its weights are.

    Raises UserError naming the file and the field that is not of a CLIP text encoder.
    """
    folder, model = folder / "text_encoder", "transformers.CLIPTextModel"
    return Published(
        folder=folder,
        config=read_config(folder, CLIPTextConfig.from_hf_dict, model),
        what="CLIP text encoder",
        model=model,
        stem="model",
        origins=origins,
        ignored=r".*position_ids$",
    )


def origins(target: Any, shapes: Shapes) -> dict[str, Origin]:
    """Say where in the files each parameter of a CLIPTextModel is, as `tower_origins` does.

    transformers 5 has dropped a prefix of all names.
    """
    prefix = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    return tower_origins(target, prefix)


def tower_origins(target: Any, prefix: str) -> dict[str, Origin]:
    """Say where in the files each parameter of one of CLIP's towers is.

    target: the parameters' shapes, as nested dicts. prefix: what the tensors' names begin with.
    """

    def origin(path: str, leaf: jax.ShapeDtypeStruct) -> Origin:
        if path == "class_embedding":
            return Origin((f"{prefix}embeddings.{path}",))
        if path.endswith("_embedding"):
            axes = (2, 3, 1, 0) if path == "patch_embedding" else None
            return Origin((f"{prefix}embeddings.{path}.weight",), axes)
        *modules, last = path.split("/")
        last, axes = {"kernel": ("weight", (1, 0)), "scale": ("weight", None)}.get(
            last, (last, None)
        )
        if modules[0] != "layers":
            return Origin((".".join([prefix + modules[0], *modules[1:], last]),), axes)
        within = ".".join([*modules[1:], last])
        names = (f"{prefix}encoder.layers.{i}.{within}" for i in range(leaf.shape[0]))
        return Origin(tuple(names), axes, stacked=True)

    return {path: origin(path, leaf) for path, leaf in weights.leaves(target)}


def read_tokenizer(folder: Path, ids: int) -> Any:
    """Read transformers' CLIPTokenizer of a folder, whose ids are to be below `ids`.

    Raises UserError where a file is missing, damaged or cut, or a token has no such id.
    """
    whole = (folder / "tokenizer.json").is_file()
    for name in () if whole else ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise UserError(f"CLIP tokenizer {folder}: {name} is missing; download it again")
    # Or it remarks on stderr that torch, which tokenizers do not need, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Of its own module: type checkers read for 20 seconds what `transformers` itself could name.
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt"):
            hub.check(file)
    try:
        found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # several libraries' errors about files that are not what they should be
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"CLIP tokenizer {folder}: {reason}; download it again") from None
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    largest = {"the largest id": max(found.get_vocab().values(), default=None)}
    for name, value in (largest | {name: getattr(found, name) for name in names}).items():
        if value is None or not 0 <= value < ids:
            raise UserError(
                f"CLIP tokenizer {folder}: {name} must be below vocab_size={ids} of "
                f"the text encoder's config.json, got {value}"
            )
    if unmade := _unmade(found):
        raise UserError(
            f"CLIP tokenizer {folder}: no merge makes the token {unmade[0]!r} (and "
            f"{len(unmade) - 1} others): its merges are cut short; download it again"
        )
    return found


def write_tokenizer(folder: Path, texts: Iterable[str], merges: int) -> int:
    """Learn a CLIPTokenizer of some texts (byte-pair encoding, Sennrich et al. 2016), and write it.

    merges: at most so many pairs become one token. Any text can be spelled with it, by letters if
    need be. Returns how many ids there are: 514 and the merges; the last two are the beginning
    and the end of a text, and the end is padding too.
    """
    import tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    ends = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [*letters, *(letter + "</w>" for letter in letters)]
    plain = CLIPTokenizer(vocab={t: i for i, t in enumerate([*alphabet, *ends])}, merges=[])
    backend = plain.backend_tokenizer
    model: Any = tokenizers.models.BPE(end_of_word_suffix="</w>")
    learner = tokenizers.Tokenizer(model)
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned[:merges]]
    tokens = list(dict.fromkeys([*alphabet, *(pair.replace(" ", "") for pair in pairs)])) + ends
    special = {
        "bos_token": ends[0],
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), ends[1]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("vocab.json", {token: i for i, token in enumerate(tokens)}),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", special | {"tokenizer_class": "CLIPTokenizer"}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    lines = ["#version: 0.2", *pairs]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def _unmade(tokenizer: Any) -> list[str]:
    """Tokens of several characters that no merge makes: those of a text would not be found."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]}
    made.update(map(str, tokenizer.added_tokens_decoder.values()))
    return [t for t in model["vocab"] if len(t.removesuffix("</w>")) > 1 and t not in made]


def copy_folder(source: Path, folder: Path, dtype: str | None = None) -> None:
    """Copy text_encoder/ and tokenizer/ of `source` into `folder`, tensor by tensor.

    dtype: what the tensors are stored as there, in safetensors' spelling; None keeps that of each.
    Raises UserError for what is missing, damaged, or of another model.
    """
    network = text_encoder(source)
    read_tokenizer(source / "tokenizer", network.config.vocab_size)
    where = folder / "text_encoder"
    with network.opened() as (opened, found):
        names = [name for origin in found.values() for name in origin.names]
        where.mkdir(parents=True)
        shutil.copy(network.folder / "config.json", where)
        weights.copy(opened, names, where / "model.safetensors", dtype)
    (folder / "tokenizer").mkdir()
    for file in sorted((source / "tokenizer").iterdir()):
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder / "tokenizer")
