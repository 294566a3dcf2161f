"""SentencePiece tokenization as T5 has it: pieces, then the end of sequence, then padding.

Runs on the host and returns numpy; a Tokenizer pickles, so data workers can own one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int

from cascade.errors import UserError
from cascade.text.captions import Captions, prepared

PAD_ID = 0
"""The id of padding."""
EOS_ID = 1
"""The id of the end of sequence."""
DEFAULT_MAX_TOKENS = 128
"""How many tokens a prompt is padded or cut to where nothing else is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a batch of texts, in rows of the same length."""

    ids: Int[Any, "b l"]
    """The ids in the vocabulary, PAD_ID on padding."""
    mask: Bool[Any, "b l"]
    """True on tokens, the end of sequence included."""
    truncated: Bool[Any, " b"] | None = None
    """True where the prompt was longer than max_tokens and lost its end; None if unknown."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """T5's tokenizer, for rows of one length."""

    model: bytes = dataclasses.field(repr=False)
    """The bytes of a spiece.model."""
    max_tokens: int
    """How many tokens every row has, the end of sequence included; at least 1."""
    captions: Captions = "verbatim"
    """What is done to a text first; DeepFloyd IF was trained on "clean" ones of 77 tokens."""

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(
                "Tokenizer.max_tokens must be at least 1 (the end of sequence), got "
                f"{self.max_tokens}"
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into rows of exactly max_tokens.

        The model says which characters are spaces, how many of them count as one, and which are
        nothing; in T5's, control characters such as U+000B are nothing. The empty prompt is
        [EOS_ID, PAD_ID, ...]. A prompt that is too long keeps its beginning and the end of
        sequence, and is marked in `truncated`. Raises as `checked` does.
        """
        texts = checked(texts)
        ids = np.full((len(texts), self.max_tokens), PAD_ID, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        truncated = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            pieces = self.pieces(text)
            kept = [*pieces[: self.max_tokens - 1], EOS_ID]
            ids[row, : len(kept)] = kept
            lengths[row] = len(kept)
            truncated[row] = len(pieces) >= self.max_tokens
        mask = np.arange(self.max_tokens) < lengths[:, None]
        return Tokens(ids=ids, mask=mask, truncated=truncated)

    @property
    def size(self) -> int:
        """How many ids the vocabulary has."""
        return self._processor.get_piece_size()

    def pieces(self, text: str) -> list[int]:
        """Give all ids of one text, without the end of sequence.

        Raises as `checked` does, and ValueError for a damaged model.
        """
        (text,) = checked([text])
        # transformers takes a next line (U+0085) for a space, which the model has no piece for.
        return self._processor.encode(prepared(text, self.captions).replace("\x85", " "))

    def check(self, ids: int) -> None:
        """Raise ValueError unless the model is a T5's whose ids are below that number."""
        if self._processor.eos_id() != EOS_ID:
            raise ValueError(
                f"ends texts with the id {self._processor.eos_id()}, T5's with {EOS_ID}: it is "
                "another model's; put T5's there"
            )
        if self.size > ids:
            raise ValueError(
                f"has {self.size} pieces, and vocab_size of config.json must be at least that, "
                f"got {ids}"
            )

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if not processor.LoadFromSerializedProto(self.model):
                raise RuntimeError
        except RuntimeError:
            raise ValueError("is no SentencePiece model, or damaged; put it there again") from None
        return processor

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state)


def checked(texts: Sequence[str]) -> Sequence[str]:
    """The texts, if a tokenizer can take them.

    Raises TypeError for one text where a list of them belongs and for what is no text, UserError
    for a text with a lone surrogate, which is not Unicode.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts: must be a list of texts, got the text {texts!r:.80}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts: must be texts, got {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = text.encode(errors="backslashreplace").decode()
            raise UserError(f"text {shown!r}: is not UTF-8; write it anew") from None
    return texts
