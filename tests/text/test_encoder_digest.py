"""What stands for a text encoder: the SHA-256 of its weights, tokenizer and config."""

import hashlib
import pathlib
import shutil

import huggingface_hub.constants
import pytest

from cascade.errors import UserError
from cascade.text import t5

T5 = pathlib.Path(__file__).parents[1] / "fixtures" / "t5"
FILES = ("config.json", "spiece.model", "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(T5, tmp_path / "t5")


def test_it_is_that_of_three_files_in_turn(folder):
    digests = b"".join(hashlib.sha256((T5 / name).read_bytes()).digest() for name in FILES)
    assert t5.digest(folder) == hashlib.sha256(digests).hexdigest()
    (folder / "README.md").write_text("something else")
    assert t5.digest(folder) == t5.digest_here(str(folder)) == t5.digest(T5)


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_any_of_them_changes_it(folder, name):
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert t5.digest(folder) != t5.digest(T5)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.partition(".")[0]):
        t5.digest(folder)


def test_a_pipeline_gives_that_of_its_text_encoder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    shutil.copytree(T5, tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "spiece.model").rename(tmp_path / "tokenizer" / "spiece.model")
    assert t5.digest(tmp_path) == t5.digest(T5)


def test_a_download_has_that_of_a_copy_and_nothing_is_downloaded_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cache, commit = tmp_path / "models--google--t5", "0123456789abcdef0123456789abcdef01234567"
    assert t5.digest_here("google/t5") is None
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    assert t5.digest_here("google/t5") is None  # begun, no more
    for name in FILES:
        blob = cache / "blobs" / hashlib.sha256((T5 / name).read_bytes()).hexdigest()
        shutil.copy(T5 / name, blob)
        (cache / "snapshots" / commit / name).symlink_to(blob)
    assert t5.digest_here("google/t5") == t5.digest_here("google/t5@main") == t5.digest(T5)
    assert t5.digest_here("google/other") is None
    # A large file is known by its name, so that no encoder of many GB is read to compare it.
    (cache / "snapshots" / commit / "model.safetensors").resolve().write_bytes(b"")
    assert t5.digest_here("google/t5") == t5.digest(T5)


def test_what_is_not_here_has_none(tmp_path):
    assert t5.digest_here(str(tmp_path / "none")) is None
    assert t5.digest_here("scenes") == t5.digest(t5.SHIPPED["scenes"])
