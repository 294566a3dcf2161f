"""Shards, tables and Parquet files in a bucket are read where they are."""

import pytest
import storage
from written import WRITERS, records

from cascade.data import FolderData, HFData, TableData, TarData
from cascade.storage import paths


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that is gs://bucket."""
    paths._check_bucket.cache_clear()
    with storage.served(tmp_path, monkeypatch):
        (tmp_path / "bucket").mkdir()
        yield tmp_path / "bucket"
    paths._check_bucket.cache_clear()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tar", "hf", "hf parquet"])
def test_what_is_in_a_bucket_is_read_as_what_is_here(kind, bucket):
    here = WRITERS[kind](bucket / "d", records(6))
    name = {"csv": "metadata.csv", "parquet": "metadata.parquet", "tar": "{00000..00001}.tar"}
    fields = {k: v for k, v in vars(here).items() if k != "path"}
    there = type(here)(path=f"gs://bucket/d/{name.get(kind, '')}".rstrip("/"), **fields)
    assert isinstance(there, (FolderData, HFData, TableData, TarData))
    source = there.open(8)
    assert [source[i]["caption"] for i in range(len(source))] == [str(i) for i in range(6)]
    assert (source[3]["image"] == 30).all()


def test_an_index_may_be_kept_in_a_bucket(bucket):
    here = WRITERS["tar"](bucket / "d", records(6))
    data = TarData(path="gs://bucket/d/{00000..00001}.tar", index="gs://bucket/index")
    assert len(data.open(8)) == len(data.open(8)) == len(here.open(8))
    assert len(list((bucket / "index").iterdir())) == 2
