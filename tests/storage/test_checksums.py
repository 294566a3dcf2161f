import random
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from cascade.errors import UserError
from cascade.runner.model_folder import SHIPPED, open_model
from cascade.storage import checksums
from cascade.text import t5
from cascade.text.t5 import T5Encoder


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(SHIPPED / "scenes", tmp_path / "model")


def test_sha256sum_itself_agrees_with_what_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.bin").write_bytes(random.Random(0).randbytes(100_000))
    (tmp_path / "two").write_text("2")
    checksums.write(tmp_path, checksums.files_under(tmp_path))
    asked = ["sha256sum", "--check", "--strict", checksums.NAME]
    assert subprocess.run(asked, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert checksums.damage(tmp_path, ["a"]) is None


def test_every_file_that_ships_is_listed_and_as_it_was_written():
    files = checksums.files_under(SHIPPED / "scenes")
    for file in files:
        if file.name != checksums.NAME:
            assert file.name in (file.parent / checksums.NAME).read_text()
            checksums.check(file)


def load(folder):
    model = open_model(folder)
    model.read(model.stages[0])
    T5Encoder.load(model.text_encoder)


@pytest.mark.parametrize(
    "file",
    ["config.json", "base64/config.json", "base64/model.safetensors"]
    + [f"text_encoder/{name}" for name in ("config.json", "spiece.model", "model.safetensors")],
)
def test_a_flipped_bit_in_any_file_of_a_model_is_refused_by_name(model, file):
    content = bytearray((model / file).read_bytes())
    content[len(content) // 2] ^= 1
    (model / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: damaged.*checksum"):
        load(model)


@pytest.mark.parametrize("file", ["base64/model.safetensors", "text_encoder/spiece.model"])
def test_no_copy_gives_a_damaged_file_new_checksums(model, tmp_path, file):
    content = bytearray((model / file).read_bytes())
    content[len(content) // 2] ^= 1
    (model / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: damaged"):
        open_model(model).copy_stage("base64", tmp_path / "stage")
        t5.copy_folder(model / "text_encoder", tmp_path / "encoder")


def test_a_file_changed_by_hand_is_read_once_its_line_is_removed(model):
    file = model / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UserError, match="remove its line"):
        open_model(model)
    (model / checksums.NAME).unlink()
    assert open_model(model).stages


def test_processes_share_the_reading_and_miss_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5):
        (tmp_path / "a" / str(i)).write_text(str(i))
    checksums.write(tmp_path, checksums.files_under(tmp_path))
    (tmp_path / "a" / "3").write_text("x")
    found = [checksums.damage(tmp_path, ["a"], part=i, parts=2) for i in range(2)]
    assert [f is None for f in found] == [True, False] and "a/3" in str(found[1])
    assert checksums.damage(tmp_path, ["b"]) is None


def test_weights_that_are_not_finite_are_refused_by_name(model):
    file = model / "base64" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] = np.inf
    safetensors.numpy.save_file(tensors, file)
    (file.parent / checksums.NAME).unlink()
    with pytest.raises(UserError, match=f"{name} holds a value that is not a finite number"):
        load(model)
