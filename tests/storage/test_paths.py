"""Folders and files that appear whole. Object storage is in test_storage.py."""

import errno
import json
import os
import shutil
import stat

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.images import save_png
from cascade.storage.paths import WholeFolder, write_json, writing
from cascade.storage.weights import save_safetensors


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), WholeFolder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with WholeFolder(tmp_path / "out") as folder:
        (folder / "all").write_text(json.dumps({}))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["all"]
    with pytest.raises(UserError, match="exists already"), WholeFolder(tmp_path / "out"):
        pass
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "mount", "."])
def test_an_empty_folder_that_cannot_be_removed_is_filled(tmp_path, monkeypatch, kind):
    """With what a killed run has left in it, which does not count."""
    (tmp_path / "empty" / ".partial-killed").mkdir(parents=True)
    out = tmp_path / "empty"
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "empty")
    elif kind == "mount":
        move = os.replace

        def busy(source, target):
            if target == out:
                raise OSError(errno.EBUSY, "Device or resource busy")
            move(source, target)

        monkeypatch.setattr(os, "replace", busy)
    else:
        monkeypatch.chdir(out)
        out = "."
    with WholeFolder(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text("all")
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "empty" / "config.json").exists()
    made = {p.name for p in (tmp_path / "empty").iterdir()}
    assert made == {"part", "config.json", ".partial-killed"}
    assert (tmp_path / "empty" / "part" / "weights").read_text() == "all"
    with pytest.raises(UserError, match="exists already"), WholeFolder(out):
        pass


def test_what_cannot_be_moved_into_place_is_kept_and_named(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="not empty any more.*left in") as said:
        with WholeFolder(tmp_path / "out") as folder:
            (folder / "mine").write_text("x")
            (tmp_path / "out" / "mine").write_text("of another process")
    (kept,) = (tmp_path / "out").glob(".partial-*")
    assert (kept / "mine").read_text() == "x" and str(kept) in str(said.value)
    assert (tmp_path / "out" / "mine").read_text() == "of another process"


def write_text(path):
    with writing(path) as file:
        file.write_text("new")


def write_weights(path):
    save_safetensors(path, {"a": np.zeros(2, np.float32)})


def write_picture(path):
    save_png(path, np.zeros((2, 2, 3), np.uint8))


def write_folder(path):
    with WholeFolder(path) as folder:
        (folder / "part").write_text("all")


WRITERS = [write_text, write_weights, write_picture, lambda path: write_json(path, {})]


@pytest.fixture(params=[0o077, 0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_has_the_permissions_that_the_umask_gives(write, umask, tmp_path):
    write(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_a_folder_has_the_permissions_that_the_umask_gives(umask, tmp_path):
    write_folder(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    (tmp_path / "empty").mkdir()
    with WholeFolder(tmp_path / "empty") as folder:
        (folder / "part").mkdir()
    assert stat.S_IMODE((tmp_path / "empty" / "part").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_planted_under_the_name_of_the_partial_file_is_not_followed(
    write, tmp_path, monkeypatch
):
    """Neither is one of a name that was seen before, nor is one that was guessed right."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    (out / ".file.partial").symlink_to(victim)
    seen = []
    move = os.replace

    def plant(source, target):
        seen.append(source)
        move(source, target)
        source.symlink_to(victim)

    monkeypatch.setattr(os, "replace", plant)
    write(out / "file")
    monkeypatch.undo()
    (partial,) = seen
    assert partial.parent == out  # so that it is moved and not copied
    partial.unlink(missing_ok=True)
    partial.symlink_to(victim)
    write(out / "file")
    monkeypatch.setattr("secrets.token_hex", lambda n: partial.name.split(".")[2])
    with pytest.raises(FileExistsError):
        write(out / "file")
    assert victim.read_text() == "mine" and not (out / "file").is_symlink()


def test_a_json_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    write_json(tmp_path / "file", {"old": 1})
    write = type(tmp_path).write_text

    def full(self, text, **how):
        write(self, text[:3], **how)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "file", {"new": 2})
    assert json.loads((tmp_path / "file").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_takes_no_file_is_told_by_the_name_of_the_file_that_was_meant(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        write_json(tmp_path / "none" / "a.json", {})
    assert e.value.filename == str(tmp_path / "none" / "a.json")
