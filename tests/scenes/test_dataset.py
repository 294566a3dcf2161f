"""Scenes as training data: fields that make no sense, closeups; the TFDS dataset of them."""

import subprocess
import sys

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.scenes.captions import caption_at
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make
from cascade.scenes.render import render


@pytest.mark.parametrize("fields", [{"size": 0}, {"seed": -1}])
def test_scenes_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=f"ScenesData.{next(iter(fields))}"):
        ScenesData(**fields)


@pytest.mark.parametrize("most", [1, 3])
def test_a_closeup_is_a_window_of_the_scene_with_all_of_its_objects(most):
    near = ScenesData(max_objects=most, closeup=2).open(32)
    corners, several = set(), 0
    for index in range(12):
        described, caption = caption_at(0, index, max_objects=most, within=0.5 - 1 / 32)
        image, scene = near[index]["image"], render(described, 64)
        several += len(described.objects) > 1
        assert image.shape == (32, 32, 3) and near[index]["caption"] == caption.text
        found = [
            (y, x)
            for y, x in np.ndindex(33, 33)
            if np.array_equal(scene[y : y + 32, x : x + 32], image)
        ]
        assert found
        corners.update(found[:1])
        y, x = found[0]
        rest = np.full((64, 64), True)
        rest[y : y + 32, x : x + 32] = False
        assert (scene[rest] == scene[rest][0]).all()  # background alone
    assert len(corners) > 6 and (several > 0) == (most > 1)
    with pytest.raises(ValueError, match="closeup must be 1"):
        ScenesData(split="long", closeup=2)


def test_a_square_too_small_for_an_object_is_refused():
    with pytest.raises(ValueError, match="within must hold any one object"):
        caption_at(0, 0, within=0.3)


def test_one_object_is_the_same_scene_in_a_closeup():
    near = ScenesData(max_objects=1, closeup=2).open(32)
    whole = ScenesData(max_objects=1).open(64)
    assert [near[i]["caption"] for i in range(50)] == [whole[i]["caption"] for i in range(50)]


def test_make_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="full"):
        make(ScenesData(), tmp_path / "full", count=1, resolution=8)
    with pytest.raises(UserError, match="count"):
        make(ScenesData(), tmp_path / "new", count=0, resolution=8)
    with pytest.raises(ValueError, match="split and seed alone"):
        make(ScenesData(max_objects=1), tmp_path / "new", count=1, resolution=8)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("cascade.scenes.tfds_builder.render", fail)
    with pytest.raises(OSError, match="disk full"):
        make(ScenesData(), tmp_path / "new", count=1, resolution=8)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


FULL_DISKS = """
import resource, sys
from pathlib import Path
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData
from cascade.scenes.make import make

soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (100, 1_000, 20_000, 60_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        make(ScenesData(), Path(sys.argv[1]), count=200, resolution=16)
    except UserError as e:
        said = str(e)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(said)
    assert not list(Path(sys.argv[1]).parent.iterdir())
print(make(ScenesData(), Path(sys.argv[1]), count=1, resolution=8)["examples"])
"""


def test_a_disk_that_is_full_at_any_point_is_told_in_a_line_and_nothing_is_left(tmp_path):
    words = [sys.executable, "-c", FULL_DISKS, str(tmp_path / "new")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    *said, examples = done.stdout.splitlines()
    assert done.returncode == 0 and examples == "1", done.stderr[-3000:]
    assert len(said) == 4
    assert all("new: cannot be written to (File too large); make room" in line for line in said)
