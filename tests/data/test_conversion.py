"""Datasets written anew: whole or not at all, and read again by our sources and by others."""

import datetime
import io
import json
import subprocess

import numpy as np
import pytest
from PIL import Image
from written import WRITERS, flat, pairs, records, tar

from cascade.commands import data as command
from cascade.data import FolderData, HFData, TableData, TarData, TFDSData, conversion
from cascade.data.source import BadRecord
from cascade.errors import UserError
from cascade.scenes.dataset import ScenesData


def convert(capsys, *words):
    command.main(["convert", *map(str, words)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("format", ["tar", "array_record"])
@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "mixed"])
def test_what_was_converted_reads_back_as_it_was(kind, format, tmp_path, capsys):
    WRITERS[kind](tmp_path / "d", records(7))
    named = {"pairs": "folder:", "hf parquet": "parquet:"}.get(kind, f"{kind}:")
    if kind in ("jsonl", "csv", "tsv", "parquet"):
        file = "list.jsonl" if kind == "jsonl" else f"metadata.{kind}"
        fields = "" if kind == "jsonl" else "?file_column=file_name&caption_column=text"
        source = f"table:{tmp_path}/d/{file}{fields}"
    else:
        source = f"{named}{tmp_path}/d"
    told = convert(capsys, source, tmp_path / "out", "--format", format, "--per-shard", 3)
    assert told["examples"] == 7 and told["files"] == 3
    found = command.dataset(told["read_with"]).open(8)
    assert [found[i]["caption"] for i in range(len(found))] == [str(i) for i in range(7)]
    assert all(found.found(i).picture == record[1] for i, record in enumerate(records(7)))
    sums = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
    assert subprocess.run(sums, cwd=tmp_path / "out").returncode == 0


def test_webdataset_and_tfds_read_what_was_written(tmp_path, capsys):
    import tensorflow_datasets as tfds
    import webdataset

    tar(tmp_path / "d", records(5))
    convert(capsys, f"tar:{tmp_path}/d", tmp_path / "tar", "--per-shard", 2)
    read = webdataset.WebDataset(sorted(map(str, (tmp_path / "tar").glob("*.tar"))), shardshuffle=0)
    read = list(read.decode("rgb8"))
    assert [sample["txt"] for sample in read] == [str(i) for i in range(5)]
    assert [sample["json"]["number"] for sample in read] == list(range(5))
    assert all((sample["png"] == 10 * i).all() for i, sample in enumerate(read))
    convert(capsys, f"tar:{tmp_path}/d", tmp_path / "tfds", "--format", "array_record")
    record = tfds.builder_from_directory(str(tmp_path / "tfds" / "pictures" / "1.0.0"))
    record = record.as_data_source("train")[3]
    assert (record["image"] == 30).all() and record["caption"] == b"3"
    columns = json.loads(record["columns"])
    assert columns["number"] == 3 and (columns["width"], columns["height"]) == (8, 8)


def test_a_resolution_resizes_the_central_square_and_scenes_are_drawn(tmp_path, capsys):
    pairs(tmp_path / "d", [("a", flat(50, 32), "a", {})])
    convert(capsys, f"folder:{tmp_path}/d", tmp_path / "t", "--resolution", 16)
    found = TarData(path=str(tmp_path / "t")).open(16).found(0)
    assert np.asarray(Image.open(io.BytesIO(found.picture))).shape == (16, 16, 3)
    data = ScenesData(size=3)
    conversion.convert(data, tmp_path / "s", resolution=16)
    drawn, read = data.open(16), TarData(path=str(tmp_path / "s")).open(16)
    for index in range(3):
        np.testing.assert_array_equal(read[index]["image"], drawn[index]["image"])
        assert read[index]["caption"] == drawn[index]["caption"]
    with pytest.raises(UserError, match="has no picture files to keep .* give --resolution"):
        conversion.convert(data, tmp_path / "u")


def test_all_captions_are_kept_in_a_column(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(flat(0))
    row = {"file": "a.png", "caption": ["one", "two"]}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    told = convert(capsys, f"table:{tmp_path}/list.jsonl", tmp_path / "out")
    source = command.dataset(told["read_with"] + "?caption_column=captions").open(8)
    assert source[0]["captions"] == ("one", "two")
    assert command.dataset(told["read_with"]).open(8)[0]["caption"] == "one"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "hf", "hf parquet", "tar"])
def test_all_columns_that_json_can_hold_are_kept(kind, tmp_path):
    """Of files of columns too, of which training reads those alone that it needs."""
    conversion.convert(WRITERS[kind](tmp_path / "d", records(3)), tmp_path / "out")
    source = TarData(path=str(tmp_path / "out")).open(8)
    assert [int(source.found(i).values["number"]) for i in range(3)] == [0, 1, 2]


def test_what_json_cannot_hold_of_a_column_is_left_out_and_the_row_stays(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [flat(1), flat(2)], "text": ["a", "b"], "score": [0.5, float("nan")]}
    rows |= {"raw": [b"1", b"2"], "long": [list(range(10_001)), [3]]}
    rows["at"] = [datetime.date(2020, 1, 1)] * 2
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    conversion.convert(HFData(path=str(tmp_path / "a.parquet")), tmp_path / "out")
    source = TarData(path=str(tmp_path / "out")).open(8)
    beside = [dict(source.found(i).values) for i in range(2)]
    for values in beside:
        assert {values.pop(name) for name in ("width", "height")} == {8}
    assert beside == [
        {"text": "a", "score": 0.5, "key": "row 0"},
        {"text": "b", "long": [3], "key": "row 1"},
    ]


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path, capsys):
    tar(tmp_path / "d", [*records(3), ("x", b"no picture", "x", {})])
    words = ["--filters.columns", "number != 1"]
    told = convert(capsys, f"tar:{tmp_path}/d", tmp_path / "out", *words)
    assert told["examples"] == 2
    assert told["filtered"] == {
        "filtered: not number != 1": 1,
        "filtered: no number in column number": 1,
    }
    told = convert(capsys, f"tar:{tmp_path}/d", tmp_path / "all")
    assert told["examples"] == 3 and told["bad_records"] == {"unreadable picture": 1}
    (line,) = (tmp_path / "all" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"key": "00000.tar/x", "reason": "unreadable picture"}


@pytest.mark.parametrize("format", ["tar", "array_record"])
def test_a_conversion_that_fails_leaves_nothing(format, tmp_path, monkeypatch):
    data = pairs(tmp_path / "d", records(6))

    def fails(source, index, resolution, original=conversion._record):
        if index == 4:
            raise OSError(28, "No space left on device")
        return original(source, index, resolution)

    monkeypatch.setattr(conversion, "_record", fails)
    with pytest.raises(UserError, match="out: cannot be written to .No space left"):
        conversion.convert(data, tmp_path / "out", format=format, per_shard=2)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    monkeypatch.setattr(conversion, "_record", lambda *a: (_ for _ in ()).throw(BadRecord("bad")))
    with pytest.raises(UserError, match="of 6 examples none can be read, the first: bad"):
        conversion.convert(data, tmp_path / "out", format=format)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        conversion.convert(data, tmp_path / "out", format=format)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_numbers_that_make_no_sense_are_refused(tmp_path, capsys):
    data = pairs(tmp_path / "d", records(2))
    for options in ({"resolution": 0}, {"per_shard": 0}):
        with pytest.raises(UserError, match="must be positive"):
            conversion.convert(data, tmp_path / "out", **options)
    with pytest.raises(UserError, match="a ScenesData has no picture files to filter"):
        command.main(["convert", "scenes:", str(tmp_path / "o"), "--filters.least-side", "4"])


def test_columns_of_a_converted_dataset_can_be_filtered_again(tmp_path, capsys):
    tar(tmp_path / "d", records(4))
    convert(capsys, f"tar:{tmp_path}/d", tmp_path / "out", "--format", "array_record")
    from cascade.data import Filters

    data = TFDSData(
        name="pictures", data_dir=str(tmp_path / "out"), filters=Filters(columns=("number > 1",))
    )
    source = data.open(8)
    assert source[2]["caption"] == "2"
    with pytest.raises(BadRecord, match="filtered: not number > 1"):
        source[1]
    assert isinstance(FolderData(path="x").filters, Filters) and TableData(path="x").flip is False
