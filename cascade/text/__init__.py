"""Prompts to embeddings: strings -> Tokens (host, NumPy) -> TextEmbedding (device, frozen T5)."""

from typing import TYPE_CHECKING

from cascade.text.tokenizer import DEFAULT_MAX_TOKENS, Tokenizer, Tokens

if TYPE_CHECKING:
    from cascade.text.embedding import TextEmbedding, TextEncoder
    from cascade.text.t5 import T5Encoder

__all__ = ["DEFAULT_MAX_TOKENS", "T5Encoder", "TextEmbedding", "TextEncoder", "Tokenizer", "Tokens"]


def __getattr__(name: str):
    # Data workers import only the tokenizer, and need not pay for jax.
    if name in ("TextEmbedding", "TextEncoder"):
        import cascade.text.embedding

        return getattr(cascade.text.embedding, name)
    if name == "T5Encoder":
        import cascade.text.t5

        return cascade.text.t5.T5Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
