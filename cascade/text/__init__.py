"""Prompts to embeddings: strings -> Tokens (host, numpy) -> TextEmbedding (device, frozen T5)."""

from typing import TYPE_CHECKING

from cascade.text.tokenizer import DEFAULT_MAX_TOKENS, Tokenizer, Tokens

if TYPE_CHECKING:
    from cascade.text.t5 import T5Encoder, TextEmbedding, TextEncoder

__all__ = ["DEFAULT_MAX_TOKENS", "T5Encoder", "TextEmbedding", "TextEncoder", "Tokenizer", "Tokens"]


def __getattr__(name: str):
    # Data workers import only the tokenizer, and need not pay for jax.
    if name in ("T5Encoder", "TextEmbedding", "TextEncoder"):
        import cascade.text.t5

        return getattr(cascade.text.t5, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
