"""A SentencePiece vocabulary of texts of one's own, with T5's ids."""

import io
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator

import sentencepiece

from cascade.errors import UserError
from cascade.text.tokenizer import EOS_ID, PAD_ID

MOST_TEXT = 2**16
"""Bytes of the longest text that counts; longer ones are left out."""
_SPACELESS = re.compile(
    "(?=[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff])"
)
"""Before each letter of a script without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer,
Japanese, Chinese."""
_BOUND = "\ue000"
"""No piece goes across this sign, which is for private use and in no text."""


def train_vocabulary(texts: Iterable[str], pieces: int) -> bytes:
    """A SentencePiece unigram model with T5's ids: 0 padding, 1 end of sequence, 2 unknown.

    Letter case is folded. Characters that the texts do not have are spelled in bytes, so that no
    two words become one. Letters of scripts without spaces are pieces of their own: a caption would
    else be one word, and another caption of the same words unknown. Deterministic.

    pieces: at most so many; few texts have fewer. Raises UserError where the texts have no letters,
    or more kinds of them than pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(_SPACELESS.sub(_BOUND, text) for text in texts),
            pretokenization_delimiter=_BOUND,
            model_writer=model,
            model_type="unigram",
            vocab_size=pieces,
            hard_vocab_limit=False,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            required_chars=string.ascii_lowercase + string.digits + string.punctuation,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            max_sentence_length=MOST_TEXT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        many = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(e))
        if many is None:
            raise UserError(
                "the captions have no letters to make a vocabulary of; give some that have"
            ) from None
        raise UserError(
            f"the captions have so many kinds of letters that a vocabulary has {many[1]} pieces or "
            f"more, and at most {pieces} are asked for; raise encoder.vocab_size by "
            f"{int(many[1]) - pieces} or more"
        ) from None
    return model.getvalue()


def with_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, and then each of their words on its own.

    SentencePiece makes pieces of what several different words have in common; a word that is
    always the same is in letters, however frequent it is, unless it is also seen before a comma and
    a full stop.
    """
    words: dict[str, None] = {}
    for text in texts:
        words.update(dict.fromkeys(_words(text)))
        yield text
    for word in words:
        yield f"{word} {word}, {word}."


def _words(text: str) -> list[str]:
    """Runs of letters, digits and the marks on them, which are no letters in Hindi for one."""
    kept = (c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return "".join(kept).split()
