"""A frozen T5 encoder with its tokenizer: prompts in, one contextual embedding per token out.

It is kept as a Hugging Face folder: config.json, spiece.model, model.safetensors. Linear weights
are [out, in] on disk and [in, out] here, and the layers of the file are the leading axis of our
stacked parameters. Tensors of a decoder, which full T5 checkpoints have, are ignored.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from cascade.config import read_json
from cascade.errors import UserError
from cascade.models.t5 import T5Config, T5EncoderModel, quantized
from cascade.storage import checksums, hub, paths, weights
from cascade.storage.weights import Origin
from cascade.text.captions import Captions
from cascade.text.embedding import TextEmbedding
from cascade.text.tokenizer import DEFAULT_MAX_TOKENS, Tokenizer, Tokens

SHIPPED = {"scenes": Path(__file__).parents[1] / "pretrained" / "scenes" / "text_encoder"}
"""The folders of encoders that come with the package, by the names that `T5Encoder.load` takes."""
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")
"""The two names of one tensor, which T5 ties: a file has either or both."""
IGNORED = r"decoder\.|lm_head\.|shared\.weight$|encoder\.embed_tokens\.weight$"
"""A regular expression of the tensors that a file may have and an encoder does not need."""
CONVERT = (
    'python -c "from transformers import T5EncoderModel as T; '
    "T.from_pretrained('SOURCE').save_pretrained('DIR')\", copy spiece.model to DIR, and give DIR"
)
"""How errors say that pickled weights are made safetensors."""


class T5Encoder:
    """T5 v1.1's encoder without its decoder: texts in, an embedding of each of their tokens out.

    >>> encoder = T5Encoder.load("scenes")  # or a folder, or "google/t5-v1_1-xl"
    >>> embedding = encoder(["a red circle", "two stars"])
    >>> embedding.values.shape, embedding.mask.sum(1)  # [b, max_tokens, width]; tokens + 1
    ((2, 64, 128), Array([4, 3], dtype=int32))

    It is frozen: it has no training mode, and its parameters belong in no optimizer and no
    checkpoint.
    """

    def __init__(self, config: T5Config, params: dict, tokenizer: Tokenizer):
        """params: T5EncoderModel's arrays, as nested dicts."""
        self.commit: str | None = None
        """The commit of the Hugging Face hub that was loaded is this; None for a folder."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._jitted = jax.jit(self.apply)

    @classmethod
    def load(
        cls,
        name_or_dir: str | Path,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        captions: Captions = "verbatim",
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        int8: bool = False,
        shardings: Callable[[Any], Any] | None = None,
    ) -> "T5Encoder":
        """Read an encoder: "scenes", which ships, a local folder or, failing both, a hub's name,
        which may end with @REVISION (a branch, tag or commit).

        A folder holds any google/t5-v1_1-* (the decoder of a full checkpoint is not read), or it is
        a DeepFloyd IF pipeline, or the text_encoder/ of one. Its weights are safetensors: one file,
        shards or a variant (fp16).

        max_tokens: the length in tokens that prompts are padded or cut to, or the config's
            n_positions if that is less.
        captions: what is done to a prompt first; DeepFloyd IF takes max_tokens=77,
            captions="clean".
        compute_dtype: parameters are float32, or with bfloat16 the matrices of the layers are
            bfloat16.
        int8: these matrices take one byte a weight, rounded as they are read, with scales for
            groups of inputs (`cascade.models.t5.quantized`); one layer's at a time are floats.
        shardings: parameters as ShapeDtypeStructs -> where each is put, such as
            `partial(cascade.devices.sharding.shardings, mesh=mesh)`; None is the default device.
        Raises UserError saying what is missing and what to do.
        """
        folder = locate(name_or_dir)
        config, params, spiece = read_folder(
            folder, compute_dtype=compute_dtype, int8=int8, shardings=shardings
        )
        tokenizer = Tokenizer(spiece, min(max_tokens, config.n_positions), captions)
        encoder = cls(config, params, tokenizer)
        if is_hub_name(str(name_or_dir)):
            encoder.commit = hub.commit(folder)
        return encoder

    def save(self, folder: Path) -> None:
        """Write the encoder as a folder that `load` reads, in float16.

        Raises ValueError for an int8 one, whose weights are rounded already, and for a weight that
        float16 cannot hold.
        """
        if self.config.int8:
            raise ValueError("T5Encoder.save: load it without int8 to keep its weights")
        write_folder(folder, self.config, self.params, self.tokenizer.model)

    @property
    def width(self) -> int:
        """How many channels an embedding has."""
        return self.config.d_model

    @property
    def max_tokens(self) -> int:
        """How many tokens every text is padded or cut to."""
        return self.tokenizer.max_tokens

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed texts: values [texts, max_tokens, width], mask [texts, max_tokens]."""
        return self.embed(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into ids and mask [texts, max_tokens], on the host, in NumPy.

        A data worker needs `self.tokenizer` alone.
        """
        return self.tokenizer(texts)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """Embed tokens on the device, by a jitted program that is compiled once per batch size."""
        return self._jitted(self.params, tokens.ids, tokens.mask)

    def apply(
        self, params: dict, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> TextEmbedding:
        """Embed tokens as a pure function of the parameters, for use within a jitted program."""
        values = nnx.merge(self._graphdef, params)(ids, mask)
        return TextEmbedding(values=values, mask=mask)

    @functools.cached_property
    def _graphdef(self) -> Any:
        return _traced(self.config)[0]


@functools.cache
def _traced(config: T5Config) -> tuple[Any, Any]:
    """The encoder's graph and the shapes of its parameters."""
    return nnx.split(nnx.eval_shape(lambda: T5EncoderModel(config, nnx.Rngs(0))))


_OTHERS = "give one that `cascade train` has made (WORKDIR/text_encoder), or a name on the hub"


def is_hub_name(name: str) -> bool:
    """Tell whether `T5Encoder.load(name)` would ask the Hugging Face hub."""
    if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?" + hub.REVISION, name) is None:
        return False
    return name not in SHIPPED and not Path(name).is_dir()


def locate(name_or_dir: str | Path) -> Path:
    """Find the folder that `T5Encoder.load` reads, and download it if it is on the hub.

    Raises UserError for a folder that is not there and a name that the hub does not give.
    """
    name = str(name_or_dir)
    if name in SHIPPED:
        return SHIPPED[name]
    if isinstance(name_or_dir, str) and is_hub_name(name):
        return _downloaded(name)
    folder = paths.path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"text encoder {name}: no such folder; {_OTHERS}")
    return paths.local_copy(folder)


def read_folder(
    folder: Path,
    *,
    compute_dtype: str = "float32",
    int8: bool = False,
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[T5Config, dict, bytes]:
    """Read (config, parameters as nested dicts for T5EncoderModel, bytes of the spiece.model).

    folder: one that holds a T5, or a diffusers pipeline, or the text_encoder/ of one, beside which
    a pipeline keeps spiece.model in tokenizer/.
    compute_dtype, int8: parameters are float32 whatever the file holds; with bfloat16 the matrices
    of the layers are bfloat16 (half the memory; they would be cast at each use anyway), and with
    int8 they are `quantized` (a quarter) as they are read. Each goes from disk to its device before
    the next.
    shardings: parameters as ShapeDtypeStructs -> the placement of each; None is the default device.
    Raises UserError when a file or tensor is missing, damaged, left over or of another shape.
    """
    folder, config_file, vocabulary = _places(folder)
    config = dataclasses.replace(_read_config(config_file), compute_dtype=compute_dtype, int8=int8)
    spiece = _read_vocabulary(vocabulary, config)
    return config, _read_parameters(folder, config, shardings), spiece


def read_config(folder: Path) -> T5Config:
    """Read the config.json of a folder that `read_folder` takes; no other file need be there.

    Raises UserError naming the file that is missing, or the field that is not of a T5 v1.1.
    """
    return _read_config(_weights_folder(folder) / "config.json")


def digest(folder: Path) -> str:
    """The SHA-256 that stands for an encoder: of its config.json, its spiece.model and the files of
    its weights, as a folder that `read_folder` takes has them.

    The hub's cache calls large files by theirs, which is then taken for true. Raises UserError when
    a file is missing.
    """
    folder, config_file, vocabulary = _places(folder)
    found = weights.files(folder, "model", f"text encoder {folder}", CONVERT)
    whole = hashlib.sha256()
    for file in (config_file, vocabulary, *found):
        blob = file.resolve().name if file.is_symlink() else ""
        known = re.fullmatch("[0-9a-f]{64}", blob) and file.resolve().parent.name == "blobs"
        whole.update(bytes.fromhex(blob if known else checksums.digest(file)))
    return whole.hexdigest()


def digest_here(name: str) -> str | None:
    """The `digest` of the encoder that `T5Encoder.load` reads by that name; None unless it is on
    this machine: nothing is downloaded. Raises UserError for a folder where a file is missing."""
    if is_hub_name(name):
        cached = hub.cached(name, _WANTED)
        try:
            return None if cached is None else digest(cached)
        except UserError:  # begun to be downloaded, no more
            return None
    return digest(locate(name)) if name in SHIPPED or Path(name).is_dir() else None


def read_tokenizer(name_or_dir: str | Path, max_tokens: int) -> Tokenizer:
    """Read the tokenizer of an encoder as `T5Encoder.load` finds it, without the weights.

    max_tokens: as there. Raises UserError as there.
    """
    _, config_file, vocabulary = _places(locate(name_or_dir))
    config = _read_config(config_file)
    return Tokenizer(_read_vocabulary(vocabulary, config), min(max_tokens, config.n_positions))


def copy_folder(source: Path, folder: Path, dtype: str | None = None) -> None:
    """Copy what `read_folder` reads of `source` to a T5 folder of its own, tensor by tensor.

    dtype: what the tensors are stored as there, in safetensors' spelling; None keeps that of each.
    Raises UserError as `read_folder` does.
    """
    source, config_file, vocabulary = _places(source)
    config = _read_config(config_file)
    spiece = _read_vocabulary(vocabulary, config)
    with weights.opened(source, "model", what="text encoder", convert=CONVERT) as opened:
        names = [n for o in check(opened.name, opened.shapes, config).values() for n in o.names]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spiece.model").write_bytes(spiece)
        paths.write_json(folder / "config.json", config.to_hf_dict())
        weights.copy(opened, names, folder / "model.safetensors", dtype)


def write_folder(
    folder: Path, config: T5Config, params: dict, spiece: bytes, *, dtype: Any = np.float16
) -> None:
    """Write a folder that `read_folder` and transformers read.

    params: T5EncoderModel's arrays, as nested dicts. spiece: the bytes of the spiece.model.
    dtype: what the tensors are stored as. Raises ValueError when a parameter does not fit in it.
    """
    found = {}
    for path, origin in origins(config).items():
        value = _leaf(params, path)
        for i, name in enumerate(origin.names):
            found[name] = (value[i] if origin.stacked else value, origin.axes is not None)

    def read(name: str) -> np.ndarray:
        value, transposed = found[name]
        with np.errstate(over="ignore"):
            stored = np.asarray(value, np.float32).astype(dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"{name} has values that {np.dtype(dtype)} cannot hold: write float32")
        return stored.T if transposed else stored

    spelled = weights.spelling(dtype)
    tensors = [(n, v.shape[::-1] if t else v.shape, spelled) for n, (v, t) in found.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    paths.write_json(folder / "config.json", config.to_hf_dict())
    weights.write(folder / "model.safetensors", tensors, read)


def origins(config: T5Config, embedding: str = EMBEDDING[0]) -> dict[str, Origin]:
    """Say where in the file each parameter is. embedding: what the file calls the embedding."""
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = {
        **{f"attention/{n}/kernel": (f"{attention}.{n}", (1, 0)) for n in "qkvo"},
        **{f"feed_forward/{n}/kernel": (f"{dense}.{n}", (1, 0)) for n in ("wi_0", "wi_1", "wo")},
        "attention_norm/scale": ("layer.0.layer_norm", None),
        "feed_forward_norm/scale": ("layer.1.layer_norm", None),
    }
    blocks = range(config.num_layers)
    return {
        "shared": Origin((embedding,)),
        "relative_attention_bias": Origin(
            (f"encoder.block.0.{attention}.relative_attention_bias.weight",)
        ),
        "final_norm/scale": Origin(("encoder.final_layer_norm.weight",)),
        **{
            f"layers/{path}": Origin(
                tuple(f"encoder.block.{i}.{name}.weight" for i in blocks), axes, stacked=True
            )
            for path, (name, axes) in layer.items()
        },
    }


def target(config: T5Config, shardings: Callable[[Any], Any] | None = None) -> Any:
    """Give the parameters as ShapeDtypeStructs, with their dtypes and placement.

    shardings: parameters as ShapeDtypeStructs -> the placement of each; None is the default device.
    """
    abstract = nnx.to_pure_dict(_traced(config)[1])

    def dtype(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.dtype == jnp.int8:
            return leaf.dtype
        # In int8 the layers have no matrices of floats, only scales.
        matrix = len(leaf.shape) == 3 and not config.int8
        return jnp.dtype(config.compute_dtype if matrix else "float32")

    return weights.as_target(abstract, dtype, shardings)


def check(name: str, shapes: Mapping[str, Sequence[int]], config: T5Config) -> dict[str, Origin]:
    """Give the origins, if tensors of these shapes are an encoder of this config.

    name: what the error calls the weights. shapes: of the tensors, by name. Raises UserError that
    lists what is missing, left over or of another shape.
    """
    either = EMBEDDING[0] if EMBEDDING[0] in shapes else EMBEDDING[1]
    found = origins(config, either)
    weights.fit(name, shapes, found, target(config), ignored=IGNORED)
    return found


_WANTED = (
    *("config.json", "spiece.model", "model*.safetensors", "model*safetensors*.json"),
    # of a DeepFloyd IF pipeline
    *("tokenizer/spiece.model", "text_encoder/*.json", "text_encoder/*fp16*.safetensors"),
)
"""What is downloaded of the hub's repository of a text encoder."""


def _downloaded(name: str) -> Path:
    try:
        return hub.download(name, _WANTED)
    except Exception as e:  # the client lets several libraries' network errors through
        raise UserError(
            f"text encoder {name}: no folder of this name here, and the Hugging Face hub did not "
            f"give it ({type(e).__name__}); check the name, its revision and the "
            "network, or give a local folder with config.json, spiece.model and model.safetensors, "
            "or 'scenes', which ships"
        ) from None


def _places(folder: Path) -> tuple[Path, Path, Path]:
    """Find the folder of the weights, its config.json, and the spiece.model."""
    folder = _weights_folder(folder)
    config_file, vocabulary = folder / "config.json", folder / "spiece.model"
    if not vocabulary.is_file():
        beside = folder.parent / "tokenizer" / vocabulary.name
        vocabulary = beside if beside.is_file() else vocabulary
    for file in (config_file, vocabulary):
        if not file.is_file():
            raise UserError(
                f"text encoder {folder}: {file.name} is missing; a T5 folder holds config.json, "
                "spiece.model and model.safetensors"
            )
    return folder, config_file, vocabulary


def _weights_folder(folder: Path) -> Path:
    """Find the folder of the weights: this one, or the text_encoder/ in that of a pipeline."""
    if not folder.is_dir():
        raise UserError(f"text encoder {folder}: no such folder; {_OTHERS}")
    if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
        return folder / "text_encoder"
    return folder


def _read_config(file: Path) -> T5Config:
    paths.check_regular(file)
    checksums.check(file)
    fields = read_json(file)
    try:
        return T5Config.from_hf_dict(fields)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"text encoder {file}: {e}") from None


def _read_vocabulary(file: Path, config: T5Config) -> bytes:
    hub.check(file)
    checksums.check(file)
    spiece = file.read_bytes()
    try:
        Tokenizer(spiece, 1).check(config.vocab_size)
    except ValueError as e:
        raise UserError(f"text encoder {file.parent}: its {file.name} {e}") from None
    return spiece


def _read_parameters(
    folder: Path, config: T5Config, shardings: Callable[[Any], Any] | None
) -> dict:
    with weights.opened(folder, "model", what="text encoder", convert=CONVERT) as opened:
        found = check(opened.name, opened.shapes, dataclasses.replace(config, int8=False))
        wanted = target(config, shardings)
        return (
            _read_int8(opened, found, wanted)
            if config.int8
            else weights.read(opened, found, wanted)
        )


def _read_int8(opened: weights.Weights, found: Mapping[str, Origin], wanted: Any) -> dict:
    """Do what `weights.read` does, and round the file's floats to int8 kernels layer by layer."""
    leaves = dict(weights.leaves(wanted))
    kernels = [path for path, leaf in leaves.items() if leaf.dtype == jnp.int8]
    made = {}
    for path in kernels:
        scale_path = path.removesuffix("kernel") + "scale"
        kernel, scale = leaves.pop(path), leaves.pop(scale_path)
        filled = np.empty(kernel.shape, np.int8), np.empty(scale.shape, np.float32)
        for i, name in enumerate(found[path].names):
            layer = opened.whole(Origin((name,), found[path].axes), kernel.shape[1:])
            filled[0][i], filled[1][i] = quantized(layer)
        for name, leaf, value in zip((path, scale_path), (kernel, scale), filled, strict=True):
            made[name] = jax.device_put(value, leaf.sharding)
    made |= weights.leaves(weights.read(opened, found, weights.nested(leaves)))
    return weights.nested(made)


def _leaf(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
