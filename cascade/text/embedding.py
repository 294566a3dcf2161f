"""What every text encoder gives, and what is asked of one."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float

from cascade.errors import UserError
from cascade.text.tokenizer import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """The embeddings of a batch of texts, each padded to the same number of tokens."""

    values: Float[Array, "b l d"]
    """One embedding per token. Where the mask is False they are whatever the encoder computes on
    padding, not zeros."""
    mask: Bool[Array, "b l"]
    """True on tokens, the end of sequence included."""

    @property
    def width(self) -> int:
        """The channels of an embedding."""
        return self.values.shape[-1]


@runtime_checkable
class TextEncoder(Protocol):
    """What a cascade asks of its text encoder."""

    @property
    def width(self) -> int:
        """The channels of an embedding."""
        ...

    @property
    def max_tokens(self) -> int:
        """The length in tokens that every text is padded or cut to."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into rows of max_tokens ids, on the host."""
        ...

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """Turn tokens into embeddings, on the device."""
        ...

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        """Embed texts: `tokenize`, then `embed`."""
        ...


def no_encoder(texts: Sequence[str]) -> TextEmbedding:
    """What embeds texts where there is no text encoder. Raises UserError."""
    raise UserError("a condition asks for a text encoder, and no stage has a condition Text")
