"""A frozen T5 encoder with its tokenizer: prompts in, one contextual embedding per token out."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cascade.errors import UserError
from cascade.models.t5 import T5Config, T5EncoderModel
from cascade.storage import paths
from cascade.text.captions import Captions
from cascade.text.t5_folder import read_folder, write_folder
from cascade.text.tokenizer import DEFAULT_MAX_TOKENS, Tokenizer, Tokens

SHIPPED = {"scenes": Path(__file__).parents[1] / "pretrained" / "scenes" / "text_encoder"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """values: one embedding per token. mask: True on tokens, the end of sequence included.

    Values where the mask is False are whatever the encoder computes on padding, not zeros.
    """

    values: Float[Array, "b l d"]
    mask: Bool[Array, "b l"]

    @property
    def width(self) -> int:
        return self.values.shape[-1]


@runtime_checkable
class TextEncoder(Protocol):
    """What a cascade asks of its text encoder."""

    @property
    def width(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def tokenize(self, texts: Sequence[str]) -> Tokens: ...

    def embed(self, tokens: Tokens) -> TextEmbedding: ...

    def __call__(self, texts: Sequence[str]) -> TextEmbedding: ...


class T5Encoder:
    """T5 v1.1's encoder, usable alone: texts in, an embedding for each of their tokens out.

    >>> encoder = T5Encoder.load("scenes")  # or a folder, or "google/t5-v1_1-xl"
    >>> embedding = encoder(["a red circle", "two stars"])
    >>> embedding.values.shape, embedding.mask.sum(1)  # [b, max_tokens, width]; tokens + 1
    ((2, 64, 128), Array([4, 3], dtype=int32))

    Frozen: no training mode; its parameters belong in no optimizer and no checkpoint.
    """

    def __init__(self, config: T5Config, params: dict, tokenizer: Tokenizer):
        """params: nested dict of T5EncoderModel's arrays."""
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
        """The shipped encoder ("scenes"), a local folder, or a Hugging Face name, in this order.

        A folder is that of any google/t5-v1_1-* (the decoder of a full checkpoint is not read), or
        a DeepFloyd IF pipeline, or the text_encoder/ of one. Weights in safetensors, whole, in
        shards or as a variant (fp16); parameters are float32, or with compute_dtype bfloat16 the
        matrices of the layers are bfloat16. int8: these matrices take one byte a weight, rounded as
        they are read, with scales for groups of inputs (`cascade.models.t5.quantized`); one layer's
        at a time are floats.

        max_tokens: the length that prompts are padded or cut to, or the config's n_positions if
        that is less. captions: what is done to a prompt first; DeepFloyd IF takes max_tokens=77,
        captions="clean". shardings: parameters as ShapeDtypeStructs -> where each is put, such as
        `partial(cascade.devices.sharding.shardings, mesh=mesh)`; None is the default device.
        Raises UserError saying what is missing and what to do.
        """
        config, params, spiece = read_folder(
            locate(name_or_dir), compute_dtype=compute_dtype, int8=int8, shardings=shardings
        )
        max_tokens = min(max_tokens, config.n_positions)
        return cls(config, params, Tokenizer(spiece, max_tokens, captions))

    def save(self, folder: Path) -> None:
        """Write the encoder as a folder that `load` reads, in float16. ValueError for an int8 one,
        whose weights are rounded already."""
        if self.config.int8:
            raise ValueError("T5Encoder.save: load it without int8 to keep its weights")
        write_folder(folder, self.config, self.params, self.tokenizer.model)

    @property
    def width(self) -> int:
        return self.config.d_model

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.max_tokens

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        return self.embed(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """On the host, in numpy; `self.tokenizer` alone is what a data worker needs."""
        return self.tokenizer(texts)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """Jitted: one compilation per batch size."""
        return self._jitted(self.params, tokens.ids, tokens.mask)

    def apply(
        self, params: dict, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> TextEmbedding:
        """`embed` as a pure function of the parameters, for use within another jitted program."""
        values = nnx.merge(self._graphdef, params)(ids, mask)
        return TextEmbedding(values=values, mask=mask)

    def null(self, b: int) -> TextEmbedding:
        """b embeddings of no text at all: zeros, nothing unmasked. Not the embedding of ""."""
        return TextEmbedding(
            values=jnp.zeros((b, self.max_tokens, self.width)),
            mask=jnp.zeros((b, self.max_tokens), bool),
        )

    @functools.cached_property
    def _graphdef(self) -> Any:
        return nnx.graphdef(nnx.eval_shape(lambda: T5EncoderModel(self.config, nnx.Rngs(0))))


def is_hub_name(name: str) -> bool:
    """Whether `T5Encoder.load(name)` would ask the Hugging Face hub."""
    if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name) is None:
        return False
    return name not in SHIPPED and not Path(name).is_dir()


def locate(name_or_dir: str | Path) -> Path:
    """The folder that `T5Encoder.load` reads, downloaded from the hub if it has to be."""
    name = str(name_or_dir)
    if name in SHIPPED:
        return SHIPPED[name]
    if isinstance(name_or_dir, str) and is_hub_name(name):
        return _downloaded(name)
    folder = paths.path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"text encoder {name}: no such folder")
    return paths.local_copy(folder)


def _downloaded(name: str) -> Path:
    import huggingface_hub

    wanted = ["config.json", "spiece.model", "model*.safetensors", "model*safetensors*.json"]
    # of a DeepFloyd IF pipeline
    wanted += ["tokenizer/spiece.model", "text_encoder/*.json", "text_encoder/*fp16*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # the client lets several libraries' network errors through
        raise UserError(
            f"text encoder {name}: no folder of this name here, and the Hugging Face hub did not "
            f"give it ({type(e).__name__}); check the name and the network, or give a local folder "
            "with config.json, spiece.model and model.safetensors, or 'scenes', which ships"
        ) from None
