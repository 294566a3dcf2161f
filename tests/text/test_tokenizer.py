"""Texts and models that the tokenizer cannot take."""

import shutil

import pytest

from cascade.errors import UserError
from cascade.text import T5Encoder, Tokenizer
from cascade.text.t5 import SHIPPED


def test_a_text_that_is_not_unicode_is_refused():
    tokenizer = Tokenizer((SHIPPED["scenes"] / "spiece.model").read_bytes(), 8)
    with pytest.raises(UserError, match=r"text 'red \\\\udcff': is not UTF-8"):
        tokenizer(["a red circle", "red \udcff"])


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content):
    folder = shutil.copytree(SHIPPED["scenes"], tmp_path / "encoder")
    file = folder / "spiece.model"
    (folder / "SHA256SUMS").unlink()  # encoders from elsewhere have none
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=r"encoder: its spiece.model is no SentencePiece model"):
        T5Encoder.load(str(folder))
