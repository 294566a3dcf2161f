"""`cascade data embed`: captions in, a store out, whatever comes in between."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal

import numpy as np
import processes
import pytest
import storage

from cascade.cli import main
from cascade.commands import data as command
from cascade.data import FolderData
from cascade.devices import distributed
from cascade.errors import UserError
from cascade.storage import paths
from cascade.text import T5Encoder, store
from cascade.text.store import open_store
from cascade.training import embed as embedding
from cascade.training.embed import EmbedOptions, embed

T5 = pathlib.Path(__file__).parents[1] / "fixtures" / "t5"
CAPTIONS = [
    *(f"a {size} {colour} circle" for size in ("big", "small") for colour in ("red", "blue")),
    *("a red circle above a blue square, beside a green star", "star", "a star", "é, ü", "star"),
    *("a word " * 9, "a red circle " * 4, "two", "three stars", "a big red circle"),
]


def folder_of(folder, captions=CAPTIONS):
    """Captions with pictures that nobody can read."""
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    lines = [json.dumps({"file": "a.png", "caption": caption}) for caption in captions]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


def options_of(source, out, **changes):
    fields = {"text_encoder": str(T5), "text_tokens": 16, "shards": 3, "batch_size": 8}
    return EmbedOptions(source=source, out=str(out), **fields | changes)


def made(source, out, **changes):
    return embed(options_of(source, out, **changes), FolderData(path=source))


def contents(folder):
    return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("sources") / "captions")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An int8 store of CAPTIONS, on eight devices."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    made(source, folder)
    return folder


@pytest.mark.parametrize("dtype,close", [("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 4e-2)])
def test_the_command_embeds_captions_as_the_encoder_does(source, tmp_path, capsys, dtype, close):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a prompt of mine\n\nstar\n")
    words = ["--text-encoder", str(T5), "--text-tokens", "16", "--dtype", dtype]
    words += ["--prompts", str(prompts), "--out", str(tmp_path / "s")]
    command.main(["embed", source, *words])
    report = json.loads(capsys.readouterr().out)
    texts = sorted({*(caption.strip() for caption in CAPTIONS), "a prompt of mine", ""})
    assert (report["texts"], report["shards"], report["captions_left_out"]) == (len(texts), 1, 0)
    expected = T5Encoder.load(T5, 16)(texts)
    values, mask = open_store(str(tmp_path / "s")).embed(texts, 16)
    np.testing.assert_array_equal(mask, expected.mask)
    true = np.asarray(expected.values)[mask]
    error = np.abs(values[mask] - true).max(1)
    assert (error <= close * np.abs(true).max(1)).all()
    assert report["longest"] == 16 and report["tokens"] == mask.sum()  # some are cut


def test_captions_are_prepared_as_in_training_and_found_as_they_are(tmp_path):
    source = folder_of(tmp_path / "d", ["A RED Circle", "a red circle"])
    made(source, tmp_path / "s", captions="lower")
    opened = open_store(str(tmp_path / "s"))
    assert opened.config.texts == 3 and opened.config.captions == "lower"
    upper, lower = opened.embed(["A RED Circle", "a red circle"], 16)[0]
    np.testing.assert_array_equal(upper, lower)
    expected = T5Encoder.load(T5, 16)(["a red circle"])
    np.testing.assert_allclose(upper[:4], expected.values[0, :4], atol=0.05)
    assert expected.mask.sum() >= 4


def test_a_store_that_is_whole_is_left_alone(source, whole):
    before = contents(whole)
    assert made(source, whole)["shards_made_now"] == 0
    assert contents(whole) == before


def test_only_so_many_examples_are_read_and_a_bad_line_is_counted(tmp_path):
    source = folder_of(tmp_path / "d", ["one", "two", "three", "four"])
    (tmp_path / "d" / "captions.jsonl").open("a").write("\n{\n")
    report = made(source, tmp_path / "s", count=3)
    opened = open_store(str(tmp_path / "s"))
    assert report["captions_left_out"] == 1 and report["texts"] == 4
    assert "three" in opened and "four" not in opened


# Interruptions


def killed(folder, source, at):
    """Embeds, and is killed when a file is about to get its name for the at-th time."""
    replace, count = os.replace, itertools.count(1)

    def counted(*names):
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    os.replace = counted
    made(source, folder)


def test_a_store_whose_making_was_killed_ends_as_if_it_had_not(source, tmp_path):
    """Two names a shard, and one each for what is begun, the checksums and the config."""
    group = [processes.start(killed, tmp_path / "undisturbed", source, 0)]
    assert processes.codes(group) == [0]
    for at in (1, 2, 3, 2, 4, 2, 0):
        code = processes.codes([processes.start(killed, tmp_path / "s", source, at)])
        assert code == [-signal.SIGKILL if at else 0]
        if at:
            with pytest.raises(UserError, match="are not whole yet|has no config.json"):
                open_store(str(tmp_path / "s"))
    assert contents(tmp_path / "s") == contents(tmp_path / "undisturbed")
    assert sorted(contents(tmp_path / "s"))[:2] == ["SHA256SUMS", "config.json"]


def as_one_of_several(folder, source):
    sys_out = folder.parent / f"out_{os.environ.get('JAX_PROCESS_ID', 'alone')}"
    with distributed.processes():
        sys_out.write_text(json.dumps(made(source, folder)))


def test_several_processes_make_the_same_store_each_its_own_shards(source, tmp_path):
    one = processes.start(as_one_of_several, tmp_path / "one", source)
    two = processes.start_group(2, as_one_of_several, tmp_path / "two", source)
    assert processes.codes([one, *two]) == [0] * 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    told = [json.loads((tmp_path / f"out_{i}").read_text()) for i in range(2)]
    assert [report.pop("shards_made_now") for report in told] == [2, 1] and told[0] == told[1]


def test_the_store_of_another_command_is_not_mixed_with_it(source, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "s")
    (folder / "config.json").unlink()
    begun = json.loads((whole / "config.json").read_text())
    for name in ("type", "version", "source", "texts", "tokens", "longest", "lowest_cosine"):
        del begun[name]
    begun["type"] = "cascade.text.store.Making"
    (folder / store.UNFINISHED).write_text(json.dumps(begun))
    before = contents(folder)
    for changes, says in (
        ({"dtype": "float32"}, "another dtype \\(int8 there, float32 here\\)"),
        ({"text_tokens": 12}, "another max_tokens"),
        ({"text_encoder": "scenes"}, "another text_encoder"),
        ({"shards": 4}, "another shards"),
        ({"count": 3}, "another texts_digest"),
    ):
        for at in (folder, whole):
            with pytest.raises(UserError, match=says):
                made(source, at, **changes)
    assert contents(folder) == before
    assert made(source, folder)["shards_made_now"] == 0
    assert contents(folder) == contents(whole)


def test_a_full_disk_is_told_in_a_line_and_the_command_goes_on_when_there_is_room(
    source, whole, tmp_path
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 400, 800):  # bytes: the lock, what is begun, a shard are cut off
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=r"\(File too large\); whole shards stay; make"):
                with contextlib.redirect_stderr(io.StringIO()):  # which is a file here
                    made(source, tmp_path / "s")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not [name for name in contents(tmp_path / "s") if "partial" in name]
    made(source, tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


def test_two_commands_do_not_write_one_store(source, tmp_path, monkeypatch):
    make = embedding._make

    def nested(*args):
        with pytest.raises(UserError, match="another `cascade data embed` holds this folder"):
            made(source, tmp_path / "s")
        return make(*args)

    monkeypatch.setattr(embedding, "_make", nested)
    assert made(source, tmp_path / "s")["shards_made_now"] == 3


# Object storage


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    paths._check_bucket.cache_clear()
    with storage.served(tmp_path, monkeypatch):
        (tmp_path / "bucket").mkdir()
        yield tmp_path / "bucket"
    paths._check_bucket.cache_clear()


def test_a_store_in_a_bucket_is_the_same_and_is_read_by_a_copy(source, whole, bucket):
    shutil.copytree(source, bucket / "captions")
    embed(
        options_of("gs://bucket/captions", "gs://bucket/s"), FolderData(path="gs://bucket/captions")
    )
    there = contents(bucket / "s")
    there.pop("config.json")  # says where captions are from
    assert there == {k: v for k, v in contents(whole).items() if k != "config.json"}
    opened = open_store("gs://bucket/s", part=1, parts=7)
    shutil.rmtree(bucket / "s")
    np.testing.assert_array_equal(
        opened.embed(["star"], 16)[0], open_store(str(whole)).embed(["star"], 16)[0]
    )


def test_a_damaged_store_in_a_bucket_is_told_by_every_process(source, whole, bucket):
    """Each has a copy of its own."""
    shutil.copytree(whole, bucket / "s")
    (bucket / "s" / store.shard_name(2)).write_bytes(b"")
    with pytest.raises(UserError, match="gs://bucket/s: shard-00002.safetensors is not what"):
        open_store("gs://bucket/s", part=1, parts=7)


# Mistakes


@pytest.mark.parametrize(
    "words,says",
    [
        (["scenes", "--out", "{}/s"], "scenes have no end: say how many with --count"),
        (["scenes", "--out", "{}/s", "--count", "0"], "--count 0: must be 1 or more"),
        (["scenes", "--out", "{}/s", "--count", "5", "--shards", "0"], "--shards 0: must be 1"),
        (["scenes", "--out", "{}/s", "--count", "5", "--shards", "99999"], "at most 65536"),
        (["scenes", "--out", "{}/s", "--count", "5", "--batch-size", "0"], "--batch-size 0: must"),
        (["scenes", "--out", "{}/s", "--count", "5", "--text-tokens", "0"], "--text-tokens 0"),
        (["scenes", "--out", "{}/s", "--count", "5", "--fsdp", "0"], "--fsdp 0: must be 1 or"),
        (["scenes", "--out", "{}/s", "--count", "5", "--fsdp", "3"], "needs a multiple of 3"),
        (["scenes", "--out", "{}/s", "--count", "5", "--text-encoder", "{}/no"], "no such folder"),
        (["scenes", "--out", "{}/s", "--count", "5", "--prompts", "{}/no"], "No such file"),
        (["scenes", "--out", "{}/s", "--count", "5", "--prompts", "{}/bad"], "is not UTF-8"),
        (["scenes", "--out", "{}/full", "--count", "5"], "exists already; name a new or empty"),
        (["scenes", "--out", "{}/full/file", "--count", "5"], "exists already; name a new or"),
        (["{}/none", "--out", "{}/s"], "no such folder"),
        (["scenes", "--count", "5"], "--out"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_nothing_is_written(tmp_path, capsys, words, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SystemExit) as e:
        main(["data", "embed", *(word.format(tmp_path) for word in words)])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert e.value.code == 2 and len(told) == 1 and says in told[0]
    assert not [p for p in (tmp_path / "s").glob("*") if "shard" in p.name]
    assert contents(tmp_path / "full") == {"file": b"mine"}
