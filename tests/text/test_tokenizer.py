"""Spaces, texts that are no texts, and tokenizers whose files are not what they are called."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures.clip_tokenizer import MERGES
from pipelines import write_upscaler

from cascade.errors import UserError
from cascade.text import T5Encoder, Tokenizer
from cascade.text.clip import CLIPTextEncoder
from cascade.text.clip import copy_folder as copy_clip
from cascade.text.t5 import SHIPPED, copy_folder
from cascade.text.tokenizer import checked

FIXTURE = Path(__file__).parents[1] / "fixtures" / "t5"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def test_whitespace_is_normalised():
    tokenizer = Tokenizer((FIXTURE / "spiece.model").read_bytes(), 64)
    plain, glued = tokenizer(["two red stars"]).ids, tokenizer(["two redstars"]).ids
    assert (glued != plain).any()
    np.testing.assert_array_equal(tokenizer(["\t two\n\n red  stars "]).ids, plain)
    for space in "\t\n\f\r\x85\xa0\u1680\u2003\u2028\u202f\u3000":
        np.testing.assert_array_equal(tokenizer([f"two red{space}stars"]).ids, plain)
    for nothing in "\x01\x0b\x1c\x1d\x1e\x1f":  # Python has four of these for spaces
        np.testing.assert_array_equal(tokenizer([f"two red{nothing}stars"]).ids, glued)


@pytest.mark.parametrize("source", [FIXTURE, SHIPPED["scenes"]], ids=["fixture", "scenes"])
def test_every_character_that_may_be_a_space_is_what_it_is_to_transformers(source):
    import transformers

    theirs = transformers.T5Tokenizer.from_pretrained(source)
    ours = Tokenizer((source / "spiece.model").read_bytes(), 24)
    likely = [chr(i) for i in (*range(1, 0x80), *range(0xA0, 0x110000)) if chr(i).isspace()]
    for character in [*map(chr, range(1, 32)), "\x85", "\u200b", "\ufeff", *likely]:
        for text in (f"red{character}star", f"red {character}{character} star{character}"):
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.pieces(text) == expected, repr(text)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("x4"))


@pytest.fixture(scope="module")
def tokenizers(clip_folder):
    model = (SHIPPED["scenes"] / "spiece.model").read_bytes()
    return Tokenizer(model, 8), CLIPTextEncoder.load(clip_folder).tokenize


@pytest.mark.parametrize("which", [0, 1], ids=["T5", "CLIP"])
@pytest.mark.parametrize("text", ["red \udcff", "\ud83d", "\ud83d\ude00"])
def test_a_text_that_is_not_unicode_is_refused(tokenizers, which, text):
    with pytest.raises(UserError, match=r"text '.*\\\\ud.*': is not UTF-8; write it anew"):
        tokenizers[which](["a red circle", text])


@pytest.mark.parametrize("which", [0, 1], ids=["T5", "CLIP"])
def test_one_text_is_not_taken_for_a_list_of_letters(tokenizers, which):
    with pytest.raises(TypeError, match="must be a list of texts, got the text 'a red circle'"):
        tokenizers[which]("a red circle")


@pytest.mark.parametrize("text", [b"a star", None, 3])
def test_what_is_no_text_is_refused(text):
    unchecked = inspect.unwrap(checked)  # by the test run's types, that is
    with pytest.raises(TypeError, match=rf"texts: must be texts, got {text!r}"):
        unchecked(["a star", text])


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the shipped encoder, without the checksums that others lack."""
    folder = shutil.copytree(SHIPPED["scenes"], tmp_path / "encoder")
    (folder / "SHA256SUMS").unlink()
    return folder


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xfeh\0i\0", POINTER, None])
def test_a_damaged_sentencepiece_model_is_named(folder, content):
    file = folder / "spiece.model"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    told = r"encoder: its spiece.model is no SentencePiece model"
    if content == POINTER:
        told = r"encoder/spiece.model: is git-lfs's pointer .*`git lfs pull`"
    with pytest.raises(UserError, match=told):
        T5Encoder.load(str(folder))
    with pytest.raises(UserError, match=told):
        copy_folder(folder, folder.parent / "copy")
    assert not (folder.parent / "copy").exists()


def test_a_vocabulary_that_is_not_the_encoders_is_refused(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 900}))
    for read in (T5Encoder.load, lambda f: copy_folder(f, f.parent / "copy")):
        with pytest.raises(
            UserError, match="its spiece.model has 924 pieces, .* vocab_size .* 900"
        ):
            read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.eos_id", lambda self: 2)
    with pytest.raises(UserError, match="spiece.model ends texts with the id 2, T5's with 1"):
        T5Encoder.load(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfeh\0i\0", POINTER, None])
def test_a_damaged_clip_tokenizer_is_named(clip_folder, tmp_path, name, content):
    folder = shutil.copytree(clip_folder, tmp_path / "x4")
    file = folder / "tokenizer" / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if content is None else content)
    told = "tokenizer_config.json: is git-lfs's" if content == POINTER else "download it again"
    with pytest.raises(UserError, match=told.replace("tokenizer_config.json", name)):
        CLIPTextEncoder.load(folder)
    with pytest.raises(UserError, match=told.replace("tokenizer_config.json", name)):
        copy_clip(folder, tmp_path / "copy")


@pytest.mark.parametrize("kept", [0, 1, len(MERGES) - 1])
def test_merges_that_are_cut_between_two_lines_are_refused(clip_folder, tmp_path, kept):
    folder = shutil.copytree(clip_folder, tmp_path / "x4")
    lines = "\n".join(["#version: 0.2", *MERGES[:kept]]) + "\n"
    (folder / "tokenizer" / "merges.txt").write_text(lines)
    with pytest.raises(UserError, match=rf"no merge makes the token '{MERGES[kept][0]}.*cut short"):
        CLIPTextEncoder.load(folder)


def test_a_clip_vocabulary_larger_than_the_embedding_is_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "x4")
    file = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary | {"red</w>": 600}))
    with pytest.raises(UserError, match="the largest id must be below vocab_size=529 .*, got 600"):
        CLIPTextEncoder.load(folder)
