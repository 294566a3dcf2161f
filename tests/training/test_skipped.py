"""What a run could not read of its data is listed once, counted, and does not end the run."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cascade import testing
from cascade.data import FolderData
from cascade.errors import UserError
from cascade.stage import StageConfig
from cascade.training import skipped
from cascade.training.job import Optimizer
from cascade.training.loop import fit
from cascade.training.skipped import Skipped
from cascade.training.stage_training import StageTraining


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def textless() -> StageConfig:
    return dataclasses.replace(testing.smallest_stage(), conditions=())


@pytest.fixture
def job(tmp_path):
    """Of eight pictures one is damaged and one has no caption."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(str(i))
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "5.txt").unlink()
    return StageTraining(
        stage=textless(),
        data=FolderData(path=str(folder)),
        images=32,
        batch_size=8,
        log_every_images=16,
        preview_every_images=0,
        optimizer=Optimizer(learning_rate=1e-3),
    )


def test_a_run_leaves_out_what_it_cannot_read_and_lists_it(job, tmp_path, capsys):
    assert fit(job, tmp_path / "run", until=16)
    assert fit(job, tmp_path / "run")
    found = lines(tmp_path / "run" / "skipped.jsonl")
    assert {(x["key"], x["reason"]) for x in found} == {
        ("5.png", "without a caption"),
        ("3.png", "unreadable picture"),
    }
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["images"] for row in rows] == [16, 32]
    for row in rows:
        assert row["skipped_records/unreadable picture"] == 1
        assert row["skipped_records/without a caption"] == 1
    assert "left out 3.png: unreadable picture; see" in capsys.readouterr().err


def test_a_run_of_too_many_bad_records_ends_with_their_list(job, tmp_path, monkeypatch):
    monkeypatch.setattr("cascade.data.pipeline._ENOUGH_TO_JUDGE", 16)
    with pytest.raises(UserError, match="could not be read, which is more than the share of 0"):
        fit(dataclasses.replace(job, most_bad=0.13), tmp_path / "run")
    assert {x["key"] for x in lines(tmp_path / "run" / "skipped.jsonl")} == {"3.png", "5.png"}


def test_a_run_that_goes_on_forgets_what_it_will_meet_again(tmp_path):
    begun = Skipped(tmp_path, 0)
    begun.add([("a", "x"), ("b", "y"), ("a", "x")], 8)
    begun.add([("c", "x")], 16)
    assert begun.counts == {"x": 2, "y": 1}
    with (tmp_path / "skipped.jsonl").open("a") as f:
        f.write("damaged\n{}\n")
    again = Skipped(tmp_path, 8)
    assert again.counts == {"x": 1, "y": 1}
    again.add([("c", "x")], 16)
    assert [x["key"] for x in lines(tmp_path / "skipped.jsonl")] == ["a", "b", "c"]


def test_a_reason_is_told_once_and_a_record_keeps_where_it_was_met_first(tmp_path, capsys):
    noted = Skipped(tmp_path, 0)
    noted.add([("a", "x"), ("b", "x")], 8)
    noted.add([("a", "x"), ("c", "y")], 16)
    assert [entry["images"] for entry in lines(tmp_path / "skipped.jsonl")] == [8, 8, 16]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in told] == [
        "warning: left out a: x",
        "warning: left out c: y",
    ]


def test_every_process_has_its_own_list(tmp_path, monkeypatch):
    monkeypatch.setattr(skipped.jax, "process_index", lambda: 2)
    Skipped(tmp_path, 0).add([("a", "x")], 8)
    assert [file.name for file in tmp_path.iterdir()] == ["skipped_2.jsonl"]


def test_lines_of_other_types_are_dropped(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"images": "1", "key": "a", "reason": "x"}\n[1]\n')
    assert not Skipped(tmp_path, 8).counts


def test_the_list_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(skipped, "MOST_LINES", 3)
    Skipped(tmp_path, 0).add([(str(i), "x") for i in range(9)], 8)
    assert len(lines(tmp_path / "skipped.jsonl")) == 3
