"""Arrow and Parquet files of strangers that say much in few bytes."""

import pytest
from written import hf_dataset, records

from cascade.data import HFData
from cascade.data.source import BadRecord
from cascade.errors import UserError

pyarrow = pytest.importorskip("pyarrow")


def saved(folder, *batches, new=None, **options):
    """A folder as save_to_disk writes it, of these rows."""
    hf_dataset(records(2)).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    file.unlink()  # which the dataset may have mapped
    new = new or pyarrow.ipc.new_stream
    written = pyarrow.ipc.IpcWriteOptions(**options)
    with file.open("wb") as opened, new(opened, batches[0].schema, options=written) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return HFData(path=str(folder))


def rows(text):
    pictures = [{"bytes": picture, "path": None} for _, picture, *_ in records(2)]
    return pyarrow.record_batch({"image": pictures, "text": text})


@pytest.mark.parametrize("new", ["new_stream", "new_file"])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_columns_that_are_compressed_are_refused_before_they_are_unpacked(
    compression, new, tmp_path
):
    """A few kB, which would take 32 MiB."""
    size = 2**24
    ends = pyarrow.py_buffer(b"".join(n.to_bytes(8, "little") for n in (0, 8, size)))
    zeros = [None, ends, pyarrow.py_buffer(bytes(size))]
    text = pyarrow.LargeStringArray.from_buffers(2, *zeros[1:])
    new = getattr(pyarrow.ipc, new)
    data = saved(tmp_path / "d", rows(text), rows(text), new=new, compression=compression)
    del text, zeros
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(UserError, match="^[^(]*its columns are compressed.*; save it without"):
        data.open(8)
    assert pyarrow.total_allocated_bytes() < before + 2**20


def test_dictionaries_that_are_compressed_are_refused_too(tmp_path):
    text = pyarrow.array(["a" * 5000, "b"]).dictionary_encode()
    with pytest.raises(UserError, match="its columns are compressed"):
        saved(tmp_path / "d", rows(text), compression="zstd").open(8)


@pytest.mark.parametrize("new", ["new_stream", "new_file"])
def test_what_is_not_compressed_is_read(new, tmp_path):
    text = pyarrow.array(["a", "b"]).dictionary_encode()
    source = saved(tmp_path / "d", rows(text), new=getattr(pyarrow.ipc, new)).open(8)
    assert [source[i]["caption"] for i in range(2)] == ["a", "b"]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_list_of_nothing_takes_no_time_however_long_it_is(kind, deep, tmp_path):
    """A list of nulls has no bytes."""
    import pyarrow.parquet

    long = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 0, 10**6], pyarrow.int32()), pyarrow.nulls(10**6)
    )
    text = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), long)
    batch = rows(text if deep else long)
    if kind == "arrow":
        data = saved(tmp_path / "d", batch)
    else:
        pyarrow.parquet.write_table(pyarrow.table(batch), tmp_path / "a.parquet")
        data = HFData(path=str(tmp_path / "a.parquet"))
    with pytest.raises(BadRecord, match="more than 10000 values in a column"):
        data.open(8)[1]


def test_as_many_captions_as_a_row_may_have_are_read(tmp_path):
    text = pyarrow.array([["a", "b"] * 5000, ["c"]])
    source = saved(tmp_path / "d", rows(text)).open(8)
    assert len(source.captions_of(0)) == 10**4


def test_files_of_other_columns_are_refused_together(tmp_path):
    hf_dataset(records(2)).to_parquet(tmp_path / "a.parquet")
    hf_dataset(records(2)).rename_column("number", "count").to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: has the columns .*; give files that are alike"):
        HFData(path=str(tmp_path)).open(8)
