"""Shards, tables and datasets of strangers: none ends a run, takes memory, or leads elsewhere."""

import hashlib
import io
import json
import os
import random
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from written import WRITERS, flat, hf_dataset, records, tar

from cascade import cli
from cascade.commands.data import dataset
from cascade.data import HFData, TableData, TarData
from cascade.data import tar as tar_module
from cascade.data.source import BadRecord
from cascade.errors import UserError

PNG = flat(50)


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def written(path, *members, kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=kind) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def sample(key, caption=b"a"):
    return member(f"{key}.png", PNG), member(f"{key}.txt", caption)


def opened(path, **fields):
    source = TarData(path=str(path), **fields).open(8)
    return source, {record.key: record.reason for record in source.left_out}


# Tar shards.


def test_links_devices_and_holes_are_left_out_and_named(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    link = {"type": tarfile.SYMTYPE, "linkname": "../secret.png"}
    source, bad = opened(
        written(
            tmp_path / "a.tar",
            *sample("good"),
            member("link.png", **link),
            member("link.txt", b"a"),
            member("hard.png", type=tarfile.LNKTYPE, linkname="good.png"),
            member("dev.png", type=tarfile.CHRTYPE),
            member("pipe.png", type=tarfile.FIFOTYPE),
            member("folder.png", type=tarfile.DIRTYPE),
        )
    )
    assert [source[i]["caption"] for i in range(len(source))] == ["a"]
    why = "that is a link, a device or full of holes"
    odd = ("link.png", "hard.png", "dev.png", "pipe.png")
    assert bad == {**dict.fromkeys(odd, why), "link": "without a picture"}


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a\x1b[31mb", "\udcff\udcfe"])
def test_names_lead_nowhere(name, tmp_path):
    source, _ = opened(written(tmp_path / "a.tar", *sample(name)))
    assert len(source) == 1 and (source[0]["image"] == 50).all()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar"]


def test_samples_that_are_not_whole_are_left_out_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MOST_CAPTION", 100)
    monkeypatch.setattr(tar_module, "MOST_JSON", 100)
    source, bad = opened(
        written(
            tmp_path / "a.tar",
            *sample("good"),
            member("no_caption.png", PNG),
            member("no_picture.txt", b"a"),
            *sample("twice"),
            *sample("twice"),
            *sample("long", b"a" * 101),
            *sample("json"),
            member("json.json", b"1" * 101),
            member("empty.png"),
            member("empty.txt", b"a"),
            member("README"),
        )
    )
    assert len(source) == 1
    assert bad == {
        "no_caption": "without a caption",
        "no_picture": "without a picture",
        "twice": "with several files of one name and kind",
        "long": "whose caption is too long",
        "json": "whose JSON has more than 100 bytes",
        "empty": "whose picture has no bytes or more than 268435456",
    }


def test_a_caption_or_json_that_is_damaged_is_a_bad_record_when_it_is_read(tmp_path):
    path = written(
        tmp_path / "a.tar",
        *sample("utf8", b"\xff\xfe\xff"),
        *sample("json"),
        member("json.json", b"[" * 5000),
        member("png.png", PNG[:40]),
        member("png.txt", b"a"),
    )
    source, _ = opened(path)
    for index, reason in ((0, "whose caption is not UTF-8"), (2, "unreadable picture")):
        with pytest.raises(BadRecord) as told:
            source[index]
        assert told.value.reason == reason and told.value.key.startswith("a.tar/")
        assert "\n" not in str(told.value)
    assert source[1]["caption"] == "a"
    with pytest.raises(BadRecord, match="its JSON is no object"):
        opened(path, caption_column="caption")[0][1]


@pytest.mark.parametrize("cut", [5, 600, 1100, 2560, 3000])
def test_a_shard_that_was_cut_off_keeps_what_came_before(cut, tmp_path):
    path = written(tmp_path / "a.tar", *sample("a"), *sample("b"), *sample("c"))
    end = 3 * 4 * 512  # each file has a head and a block
    path.write_bytes(path.read_bytes()[: end - cut])
    source, bad = opened(path)
    left = (end - cut) // (4 * 512)
    assert len(source) == left + (cut == 5)  # of the last caption's block one byte is used
    assert all(source[i]["caption"] == "a" for i in range(len(source)))
    assert cut == 5 or bad


def head(**fields):
    """A head of a member with fields of its own, and the right checksum."""
    info = tarfile.TarInfo("a.png")
    info.size = 0
    buffer = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100)}
    for field, value in fields.items():
        at, n = places[field]
        buffer[at : at + n] = value.ljust(n, b"\0")
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    return bytes(buffer)


HUGE = b"\x80" + (10**12).to_bytes(11, "big")
NEGATIVE = b"\xff" * 11 + b"\x00"
HOSTILE = {
    "huge": head(size=HUGE),
    "negative": head(size=NEGATIVE),
    "huge name": head(size=HUGE, type=b"L", name=b"././@LongLink"),
    "negative name": head(size=NEGATIVE, type=b"L"),
    "huge pax": head(size=HUGE, type=b"x"),
    "long pax": head(size=b"%011o" % (3 * 2**20), type=b"x") + b"9" * 3 * 2**20,
    "pax without end": head(size=b"%011o" % 512, type=b"x") + b"0 path=a\n".ljust(512, b"\0"),
    "pax size": head(size=b"%011o" % 512, type=b"x") + b"12 size=-512\n".ljust(512, b"\0") + head(),
    "heads of heads": head(size=b"%011o" % 512, type=b"L") * 4000,
    "sparse": head(type=b"S"),
    "noise": np.random.default_rng(0).bytes(5000),
    "old checksum": head()[:148] + b"00000000" + head()[156:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_head_ends_a_shard_and_is_told(name, tmp_path):
    good = written(tmp_path / "good.tar", *sample("a")).read_bytes()[: 4 * 512]
    path = tmp_path / "a.tar"
    path.write_bytes(good + HOSTILE[name] + bytes(1024))
    tracemalloc.start()
    started = time.process_time()
    source, bad = opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 1 and source[0]["caption"] == "a"
    assert len(bad) == 1 and peak < 2e7 and time.process_time() - started < 20


@pytest.mark.parametrize("name", [*HOSTILE, "gz", "nothing"])
def test_a_file_that_is_no_shard_is_refused_in_a_line(name, tmp_path):
    import gzip

    content = {"gz": gzip.compress(bytes(9000)), "nothing": b""}
    (tmp_path / "a.tar").write_bytes(HOSTILE.get(name) or content[name])
    with pytest.raises(UserError) as told:
        opened(tmp_path / "a.tar")
    assert "a.tar" in str(told.value) and "\n" not in str(told.value)


def test_a_flipped_bit_anywhere_in_a_shard_ends_nothing(tmp_path):
    draw = random.Random(0)
    whole = tar(tmp_path / "d", records(6), per_shard=6)
    content = (tmp_path / "d" / "00000.tar").read_bytes()
    for _ in range(150):
        data = bytearray(content)
        for _ in range(draw.choice((1, 4))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "d" / "00000.tar").write_bytes(data)
        try:
            source = whole.open(8)
        except UserError as e:
            assert "\n" not in str(e)
            continue
        for index in range(len(source)):
            try:
                assert source[index]["image"].shape == (8, 8, 3)
            except BadRecord as e:
                assert "\n" not in str(e) and e.reason and e.key


def indexed(tmp_path):
    """Shards of three pictures whose index is kept, and its one file."""
    data = tar(tmp_path / "d", records(3))
    kept = TarData(path=data.path, index=str(tmp_path / "i"))
    kept.open(8)
    (file,) = (tmp_path / "i").iterdir()
    return kept, file


def test_every_flipped_byte_of_an_index_and_every_cut_makes_it_anew(tmp_path, monkeypatch):
    kept, file = indexed(tmp_path)
    true, gone = file.read_bytes(), tar_module._gone_through
    anew = []
    monkeypatch.setattr(
        tar_module, "_gone_through", lambda *given: anew.append(given) or gone(*given)
    )
    kept.open(8)
    assert not anew
    for at in range(len(true)):
        file.write_bytes(true[:at] + bytes([true[at] ^ 1 << at % 8]) + true[at + 1 :])
        kept.open(8)
        assert file.read_bytes() == true and len(anew) == 2 * at + 1
        file.write_bytes(true[:at])
        kept.open(8)
        assert len(anew) == 2 * at + 2


def test_an_index_of_a_stranger_leads_nowhere_else(tmp_path):
    """Whose checksum is right: it is damaged on purpose."""
    kept, file = indexed(tmp_path)
    head, _, rest = file.read_bytes()[32:].partition(b"\n")
    noted, kind = json.loads(head), tar_module._SAMPLE
    first = int(np.frombuffer(rest, kind)[0]["picture_at"])

    def sample(at, n, text=(0, 0)):
        return np.array([(at, n, *text, 0, 0, 0)], kind).tobytes()

    for changed, samples in (
        *((noted, sample(at, 9)) for at in (10**12, -5, 0, 511, 2**63 - 1)),
        *((noted, sample(first, n)) for n in (-1, 2**31 - 1)),
        *((noted, sample(first, 9, text)) for text in ((2**63 - 1, 9), (-1, 5), (0, -1))),
        (noted, rest[:-1]),
        (noted | {"bad": [[1]]}, rest),
        (noted | {"bad": 3}, rest),
        (noted | {"stamp": [0]}, rest),
        ([], rest),
        ({}, rest),
    ):
        body = json.dumps(changed).encode() + b"\n" + samples
        file.write_bytes(hashlib.sha256(body).digest() + body)
        assert [kept.open(8)[i]["caption"] for i in range(3)] == ["0", "1", "2"]
    file.unlink()
    os.mkfifo(file)  # which would be read without end
    assert len(kept.open(8)) == 3


# Tables.


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x.png", "gs://b/x.png"])
def test_a_table_names_no_file_outside_its_folder(kind, name, tmp_path):
    import pandas

    rows = pandas.DataFrame([{"file": name, "caption": "a"}])
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    with pytest.raises(UserError, match="row 1: .* is outside the folder"):
        TableData(path=str(path)).open(8)


def test_a_table_follows_no_link_that_leads_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "d" / "list.csv").write_text("file,caption\na.png,a\n")
    with pytest.raises(BadRecord, match="a link that leads outside"):
        TableData(path=str(tmp_path / "d")).open(8)[0]


def test_damaged_rows_are_left_out_by_reason_and_the_others_stay(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    lines = [
        b"file,caption",
        b"a.png,good",
        b"a.png,one,too many",
        b"a.png,\xff\xfe",
        b"a.png," + b"x" * 70_000,
        b',""',
        b"a.png,also good",
        b'a.png,"a quote without end',
        *[b"a.png," + b"swallowed by it " * 1000] * 10,
        b"a.png,last",
    ]
    (tmp_path / "list.csv").write_bytes(b"\r\n".join(lines) + b"\r\n")
    source = TableData(path=str(tmp_path)).open(8)
    found = [source[i]["caption"] for i in range(len(source))]
    assert found[:2] == ["good", "also good"] and found[-1] == "last"
    reasons = [record.reason for record in source.left_out]
    assert reasons[:4] == [
        "row of more or fewer columns than the first",
        "row that is not UTF-8",
        "row that is too long",
        "row that names no file",
    ]
    assert "row that is no CSV, or too long" in reasons
    assert [r.key for r in source.left_out][:2] == ["list.csv, row 2", "list.csv, row 3"]


def test_damaged_lines_are_left_out_by_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = {
        '{"file": "a.png", "caption": "good"}': "",
        "nonsense": "line that is no JSON",
        "[" * 60_000: "line that is no JSON",
        "[1]": "line that is no JSON object",
        '{"caption": "a"}': "row without file",
        '{"file": "a.png"}': "row without caption",
        '{"file": 5, "caption": "a"}': "row that names no file",
        '{"file": "a\\u0000.png", "caption": "a"}': "row that names no file",
        '{"file": "a.png", "caption": 5}': "whose caption is no text",
        '{"file": "a.png", "caption": []}': "without a caption",
        '{"file": "a.png", "caption": null}': "without a caption",
        '{"file": "a.png", "caption": "\\ud83d"}': "whose caption is no text",
        '{"file": "a.png", "caption": "' + "x" * 70_000 + '"}': "row that is too long",
    }
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    source = TableData(path=str(tmp_path)).open(8)
    assert len(source) == 1
    assert [record.reason for record in source.left_out] == [why for why in rows.values() if why]
    for odd in ("missing.png", "y" * 300 + ".png"):
        (tmp_path / "list.jsonl").write_text(json.dumps({"file": odd, "caption": "a"}))
        with pytest.raises(BadRecord):
            TableData(path=str(tmp_path)).open(8)[0]


@pytest.mark.parametrize("text", ["", "\n", "a,a\n", "\xff\n", '"a\n'])
def test_a_csv_without_names_of_columns_is_refused(text, tmp_path):
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="list.csv"):
        TableData(path=str(tmp_path)).open(8)


# Parquet and Arrow.


@pytest.mark.parametrize("kind", ["hf", "hf parquet", "parquet"])
def test_a_flipped_bit_anywhere_in_parquet_or_arrow_ends_nothing(kind, tmp_path):
    """In a process of its own: what pyarrow does not survive would end the tests."""
    import subprocess
    import sys

    data = WRITERS[kind](tmp_path / "d", records(6))
    code = f"""
import pathlib, random
from cascade.data import HFData, TableData
from cascade.data.source import BadRecord
from cascade.errors import UserError
draw = random.Random(0)
data = {type(data).__name__}(**{ {k: v for k, v in vars(data).items() if isinstance(v, str)}!r})
folder = pathlib.Path({str(tmp_path / "d")!r})
file = sorted(p for p in folder.rglob("*") if p.suffix in (".arrow", ".parquet"))[0]
whole = file.read_bytes()
for case in range(120):
    bits = bytearray(whole)
    for _ in range(draw.choice((1, 4))):
        bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(8)
    file.unlink()
    file.write_bytes(bits[: draw.randrange(len(bits))] if case % 10 == 0 else bits)
    try:
        source = data.open(8)
        for index in range(min(len(source), 10)):
            try:
                source[index]
            except BadRecord as e:
                assert chr(10) not in str(e)
    except UserError as e:
        assert chr(10) not in str(e)
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "survived\n", done.stderr[-2000:]


def test_a_picture_that_lies_elsewhere_is_not_read(tmp_path):
    import datasets

    (tmp_path / "secret.png").write_bytes(PNG)
    columns = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "text": ["a"]}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "a.parquet")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    rows[0]["image"] = {"bytes": None, "path": str(tmp_path / "secret.png")}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, table.schema), tmp_path / "a.parquet"
    )
    with pytest.raises(BadRecord, match="its picture is not in the dataset but in the file"):
        HFData(path=str(tmp_path / "a.parquet")).open(8)[0]


@pytest.mark.parametrize("name", ["../x.arrow", "/x.arrow", "x.py", 5])
def test_a_saved_dataset_lists_files_of_its_own_folder(name, tmp_path):
    data = WRITERS["hf"](tmp_path / "d", records(4))
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="which is no .*arrow file of that folder"):
        data.open(8)


def test_a_saved_dataset_is_no_link_to_what_is_elsewhere(tmp_path):
    data = WRITERS["hf"](tmp_path / "d", records(4))
    file = sorted((tmp_path / "d").glob("*.arrow"))[0]
    file.rename(tmp_path / "elsewhere.arrow")
    file.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(UserError, match="is a link that leads outside"):
        data.open(8)


def test_columns_of_other_types_are_bad_records(tmp_path):
    import pandas

    rows = [
        {"image": PNG, "text": "good"},
        {"image": PNG, "text": None},
        {"image": None, "text": "a"},
        {"image": b"", "text": "a"},
        {"image": b"no picture", "text": "a"},
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    source = HFData(path=str(tmp_path / "a.parquet")).open(8)
    assert source[0]["caption"] == "good"
    reasons = []
    for index in range(1, 5):
        with pytest.raises(BadRecord) as told:
            source[index]
        reasons.append(told.value.reason)
    assert reasons == [
        "without a caption",
        *["without a picture"] * 2,
        "unreadable picture",
    ]
    pandas.DataFrame([{"image": 5, "text": 6}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match="must be text"):
        HFData(path=str(tmp_path / "a.parquet")).open(8)[0]


def test_a_row_group_that_is_too_large_to_read_at_once_is_refused(tmp_path, monkeypatch):
    from cascade.data import parquet

    hf_dataset(records(6)).to_parquet(tmp_path / "a.parquet", batch_size=3)
    monkeypatch.setattr(parquet, "MOST_GROUP", 100)
    with pytest.raises(UserError, match="row group 0 has .* at most 100 are read at once"):
        HFData(path=str(tmp_path / "a.parquet")).open(8)


def test_one_long_value_in_every_row_takes_no_more_memory_than_a_row_group_may(
    tmp_path, monkeypatch
):
    """The file says it once, in 10 kB, and says that its row group is as small."""
    import pyarrow
    import pyarrow.parquet

    from cascade.data import parquet

    n, zeros = 5000, np.zeros(5000, np.int32)
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array(zeros), pyarrow.array(["x" * 40_000]))
    rows = pyarrow.table({"image": [PNG + bytes([i % 256]) for i in range(n)], "text": text})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", store_schema=False)
    monkeypatch.setattr(parquet, "MOST_GROUP", 2**25)
    source = HFData(path=str(tmp_path / "a.parquet")).open(8)
    before, reads = pyarrow.default_memory_pool().max_memory(), []
    read = parquet._Parquet.read
    monkeypatch.setattr(
        parquet._Parquet, "read", lambda self, *given: reads.append(given) or read(self, *given)
    )
    for index in (0, 1, n - 1):
        with pytest.raises(BadRecord, match="its row group has more than .* bytes in memory"):
            source[index]
    assert len(reads) == 1  # of 200 MB, which need not be met again
    assert pyarrow.default_memory_pool().max_memory() < max(before, 2**26 + 2**24)


def test_a_file_that_claims_more_rows_than_it_has_bytes_is_refused(tmp_path, monkeypatch):
    from cascade.data import parquet

    hf_dataset(records(6)).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(parquet._Parquet, "groups", lambda self: iter([(10**12, 5)]))
    with pytest.raises(UserError, match="says that it has 1000000000000 rows in .* bytes"):
        HFData(path=str(tmp_path / "a.parquet")).open(8)


def test_few_row_groups_stay_in_memory(tmp_path, monkeypatch):
    from cascade.data import parquet

    hf_dataset(records(12)).to_parquet(tmp_path / "a.parquet", batch_size=2)
    monkeypatch.setattr(parquet, "MOST_KEPT", 500)
    source = HFData(path=str(tmp_path / "a.parquet")).open(8)
    for index in [*range(12), *range(12)]:
        assert source[index]["caption"] == str(index)
    kept = source._rows._kept
    assert 1 <= len(kept) < 6 and source._rows._size == sum(one.nbytes for one in kept.values())
    monkeypatch.setattr(parquet, "MOST_KEPT", 2**20)
    for index in (0, 2, 0):
        source[index]
    assert list(kept)[-2:] == [1, 0]  # the one that was asked for last goes last


# On the command line.


@pytest.mark.parametrize("word", ["tar:p.tar", "table:p.csv", "table:p.jsonl", "table:p.parquet"])
def test_a_pipe_is_not_read_without_end(word, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    os.mkfifo(word.partition(":")[2])
    with pytest.raises(UserError, match="is a pipe, socket or device"):
        dataset(word).open(8)


@pytest.mark.parametrize(
    "word",
    [
        "tar:no",
        "tar:{0..2}.tar",
        "table:no",
        "table:no.csv",
        "hf:no",
        "parquet:no",
        "hf:.",
        "zip:x",
    ],
)
def test_what_is_not_there_is_told_in_one_line(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", word, "--out", "x.png"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and not list(tmp_path.iterdir())
