"""Names of the Hugging Face hub with a revision, and downloads that are not what was published.

The hub is a stand-in that lays out its cache as the client does.
"""

import hashlib
import json
import shutil
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from pipelines import NAME, T5, write_pipeline

from cascade.commands import sample
from cascade.errors import UserError
from cascade.runner.cascade import Cascade
from cascade.runner.model_folder import open_model
from cascade.storage import hub
from cascade.text.t5 import T5Encoder, is_hub_name

COMMIT, OLD = "0123456789abcdef0123456789abcdef01234567", "f" * 40
MODEL = "DeepFloyd/IF-I-M-v1.0"


def snapshot(cache, commit, source):
    """Lay out a folder in the cache as one commit: links to blobs that digests are names of."""
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    for file in source.rglob("*"):
        if file.is_file():
            large = file.suffix in (".safetensors", ".model")
            digest = (hashlib.sha256 if large else hashlib.sha1)(file.read_bytes()).hexdigest()
            blob, link = cache / "blobs" / digest, cache / "snapshots" / commit
            shutil.copy(file, blob)
            link = link / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return cache / "snapshots" / commit


@pytest.fixture
def download(tmp_path, monkeypatch):
    """A hub with a pipeline and a T5, each of two commits; gives what it was asked."""
    asked = []
    write_pipeline(tmp_path / "made", 1)
    for name, source in ((MODEL, tmp_path / "made"), ("google/t5", T5)):
        for commit in (COMMIT, OLD):
            snapshot(tmp_path / "cache" / name.replace("/", "--"), commit, source)

    def download(repository, *, revision=None, **patterns):
        asked.append((repository, revision))
        commit = {None: COMMIT, "main": COMMIT, "refs/pr/1": OLD, OLD: OLD}.get(revision)
        if commit is None:
            response: Any = type("Response", (), {"headers": {}, "request": None})()
            raise errors.RevisionNotFoundError("404", response=response)
        return str(tmp_path / "cache" / repository.replace("/", "--") / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "revision,commit", [("", COMMIT), ("@main", COMMIT), ("@refs/pr/1", OLD), (f"@{OLD}", OLD)]
)
def test_a_name_takes_a_revision_and_tells_the_commit(revision, commit, download):
    assert open_model(MODEL + revision).name == f"{MODEL}@{commit}"
    assert is_hub_name("google/t5" + revision)
    assert T5Encoder.load("google/t5" + revision).commit == commit
    given = revision[1:] or None
    assert download == [(MODEL, given), ("google/t5", given)]


def test_the_picture_s_record_has_the_commits(download, tmp_path):
    words = ["--model", MODEL, "--text-encoder", "google/t5@refs/pr/1", "--steps", "1"]
    sample.main(["red", *words, "--out", str(tmp_path / "out"), "--no-compilation-cache"])
    record = json.loads((tmp_path / "out" / "0000.json").read_text())
    assert record["model"] == f"{MODEL}@{COMMIT}"
    assert record["text_encoder"] == "google/t5@refs/pr/1"
    assert record["text_encoder_commit"] == OLD


def test_a_folder_has_no_commit(download, tmp_path):
    assert T5Encoder.load(T5).commit is None
    assert open_model(tmp_path / "made").name == str(tmp_path / "made")
    assert download == []


@pytest.mark.parametrize("revision", ["none", "v9/x"])
def test_a_revision_that_is_not_there_is_one_line(revision, download):
    with pytest.raises(UserError, match=f"no revision '{revision}'; give a branch, tag or commit"):
        Cascade.load(f"{MODEL}@{revision}")
    with pytest.raises(UserError, match=r"check the name, its revision"):
        T5Encoder.load(f"google/t5@{revision}")


@pytest.mark.parametrize("revision", ["@", "@../../x", "@a/../../x", "@-x", "@a b", "@a@b"])
def test_what_is_no_revision_is_not_asked_for(revision, download):
    with pytest.raises(UserError, match="no such folder"):
        Cascade.load(MODEL + revision)
    with pytest.raises(UserError, match="no such folder"):
        T5Encoder.load("google/t5" + revision)
    assert download == []


@pytest.mark.parametrize(
    "name,file,load",
    [
        (MODEL, f"unet/{NAME}.safetensors", Cascade.load),
        (MODEL, "text_encoder/model.safetensors", Cascade.load),
        ("google/t5", "model.safetensors", T5Encoder.load),
        ("google/t5", "spiece.model", T5Encoder.load),
    ],
)
def test_a_download_that_is_not_what_was_published_is_refused(name, file, load, download, tmp_path):
    """One bit of a weight is another: the file still opens, and all of its shapes fit."""
    where = tmp_path / "cache" / name.replace("/", "--") / "snapshots" / COMMIT / file
    load(name)
    blob = where.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError) as e:
        load(name)
    assert str(e.value).startswith(f"{where}: is not what the Hugging Face hub published")
    assert str(blob) in str(e.value) and "\n" not in str(e.value)


def test_files_that_are_no_blobs_of_the_hub_have_no_digest_to_keep(tmp_path):
    for name in ("plain.safetensors", "a" * 64):
        (tmp_path / name).write_text("anything")
        hub.check(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / ("a" * 64))
    hub.check(tmp_path / "link")
