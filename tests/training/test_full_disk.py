"""A run on a disk that is full at any point ends in one line, and goes on when there is room.

A limit on the size of files stands for the disk: the system refuses to write past it. The runs have
a process of their own, whose stderr is all that a person would see.
"""

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_job import LINE, losses

from cascade.errors import UserError
from cascade.training.loop import fit

LIMITS = (0, 500, 1_500, 4_000, 12_000)
"""Bytes: the lock, the config, a row, a file of a checkpoint, the plot are cut off."""
JOB = dataclasses.replace(LINE, save_every_images=16)


def said_at(folder):
    """For each limit what the run said, what it left, and its losses when it has gone on."""
    assert fit(JOB, folder / "whole")
    whole, found = losses(folder / "whole"), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in LIMITS:
        run = folder / f"run{limit}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            said = fit(JOB, run)
        except UserError as e:
            said = str(e)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = [str(file.relative_to(run)) for file in run.rglob("*") if run.exists()]
        assert fit(JOB, run)
        found.append((said, left, losses(run) == whole))
    return found


def test_it_ends_in_one_line_leaves_nothing_half_written_and_goes_on(tmp_path):
    words = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(LIMITS)
    for said, left, same in found:
        assert "(File too large)" in str(said) and "make room" in said
        assert not [name for name in left if "orbax-checkpoint-tmp" in name or "partial" in name]
        assert "running.json" not in left and same
    whole = [name for _, left, _ in found for name in left if name.startswith("checkpoints/")]
    assert whole  # the last limits let complete checkpoints through, which the run went on from


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO"])
def test_each_way_in_which_a_disk_fails_is_told_in_a_line(code, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("cascade.storage.paths.write_json", fails)
    said = os.strerror(getattr(errno, code))
    with pytest.raises(UserError, match=rf"cannot be written to \({said}\).* run the same command"):
        fit(JOB, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_error_of_the_system_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("cascade.storage.paths.write_json", fails)
    with pytest.raises(PermissionError):
        fit(JOB, tmp_path / "run")


if __name__ == "__main__":
    print(json.dumps(said_at(Path(sys.argv[1]))))
