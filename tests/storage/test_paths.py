"""Folders and files that appear whole. Object storage is in test_storage.py."""

import errno
import json
import os
import shutil

import pytest

from cascade.errors import UserError
from cascade.storage.paths import WholeFolder


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
