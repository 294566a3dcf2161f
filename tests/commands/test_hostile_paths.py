"""Names of files that hang, that no system takes, or that are empty: one line each, at once."""

import json
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cascade import cli, config, images
from cascade.data.folder import FolderData
from cascade.errors import UserError
from cascade.runner.model_folder import open_model
from cascade.storage import paths, weights
from cascade.text.t5 import T5Encoder, read_config


@pytest.fixture(params=["pipe", "link to a pipe", "socket", "/dev/zero"])
def special(request, tmp_path, monkeypatch):
    """Makes a file of that kind: a function of its path.

    Whoever reads it fails: a pipe, which nobody writes to, ends after 20 s, and memory is short.
    """
    writers = []

    def pipe(file):
        os.mkfifo(file)
        late = ["bash", "-c", 'sleep 20; : > "$1"', "bash", file]
        writers.append(subprocess.Popen(late, start_new_session=True))

    def make(file):
        if request.param == "pipe":
            pipe(file)
        elif request.param == "link to a pipe":
            pipe(tmp_path / "the pipe")
            file.symlink_to(tmp_path / "the pipe")
        elif request.param == "socket":
            monkeypatch.chdir(file.parent)  # the names of sockets are short
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(file.name)
        else:
            file.symlink_to("/dev/zero")
        return file

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    began = time.monotonic()
    yield make
    resource.setrlimit(resource.RLIMIT_AS, before)
    for writer in writers:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()
    assert time.monotonic() - began < 15, "it hung until the pipe ended"


def pictures(folder):
    images.save_png(folder / "1.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "1.txt").write_text("a circle")
    return FolderData(path=str(folder))


def read_shards(folder):
    with weights.opened(folder, "model", what="x", convert="y"):
        pass


@pytest.mark.parametrize(
    "name,read",
    [
        ("a.png", images.load_image),
        ("a.json", config.read_json),
        ("a.py", lambda file: config.load(str(file))),
        ("model.safetensors", weights.load_tensors),
        ("model.safetensors", lambda file: weights.load_safetensors(file, {"a": np.zeros(2)})),
        ("model.safetensors", lambda file: read_shards(file.parent)),
        ("model.fp16.safetensors", lambda file: read_shards(file.parent)),
        ("model.safetensors.index.json", lambda file: read_shards(file.parent)),
        ("config.json", lambda file: open_model(file.parent)),
        ("config.json", lambda file: read_config(file.parent)),
        ("config.json", lambda file: T5Encoder.load(file.parent)),
        ("model_index.json", lambda file: open_model(file.parent)),
        ("captions.jsonl", lambda file: pictures(file.parent).open(8)),
    ],
)
def test_what_is_no_regular_file_is_refused_before_it_is_read(name, read, special, tmp_path):
    (tmp_path / "here").mkdir()
    file = special(tmp_path / "here" / name)
    with pytest.raises(UserError, match=str(file.parent)) as e:
        read(file)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("flag", ["--prompts", "--lowres", "--init-image"])
def test_an_option_that_names_no_regular_file_is_one_line(flag, special, tmp_path, capsys):
    file = special(tmp_path / "file")
    words = [] if flag == "--prompts" else ["red"]
    line = fails(capsys, "sample", *words, flag, str(file), "--out", str(tmp_path / "out"))
    assert f"{file}: is a pipe, socket or device; give a regular file" in line
    assert not (tmp_path / "out").exists()


def test_what_links_lead_to_is_read(tmp_path):
    images.save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "link").symlink_to(tmp_path / "a.png")
    assert images.load_image(tmp_path / "link").size == (8, 8)


def fails(capsys, *argv) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


CONFIG = "configs/tiny/base64.py"
COMMANDS = [
    ["sample", "red", "--out", "{}"],
    ["sample", "red", "--model", "{}"],
    ["sample", "red", "--text-encoder", "{}"],
    ["sample", "red", "--prompts", "{}"],
    ["sample", "red", "--lowres", "{}"],
    ["train", "{}", "--workdir", "w"],
    ["train", CONFIG, "--workdir", "{}"],
    ["export", "{}", "o"],
    ["convert", "deepfloyd", "o", "--stage1", "{}"],
    ["convert", "deepfloyd", "{}", "--stage1", "x"],
    ["data", "make", "{}", "--count", "1"],
    ["data", "inspect", "{}", "--out", "o.png"],
    ["data", "inspect", "scenes", "--out", "{}"],
    ["data", "embed", "{}", "--out", "o"],
    ["data", "embed", "scenes", "--count", "2", "--out", "{}"],
    ["data", "embed", "scenes", "--count", "2", "--out", "o", "--text-encoder", "{}"],
    ["data", "embed", "scenes", "--count", "2", "--out", "o", "--prompts", "{}"],
    ["bench", "embeddings", "{}"],
    ["train", CONFIG, "--workdir", "w", "--embeddings", "{}"],
    ["plan", "{}", "--topology", "v5e:2x2"],
    ["eval", "scenes", "--model", "{}", "--out", "o"],
    ["eval", "scenes", "--out", "{}"],
    ["{}"],
]
PATHS = {
    "empty": "",
    "NUL": "a\0b",
    "long": "a" * 5000,
    "deep": "/".join(["a" * 99] * 50),
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_no_system_takes_is_one_short_line(words, kind, capsys, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *(word.format(PATHS[kind]) for word in words))
    assert len(line) < 1000 and "Traceback" not in line
    if kind == "NUL":
        assert "'a\\x00b' has a NUL character" in line
    assert [file.name for file in tmp_path.iterdir()] == ["configs"]


def test_a_nul_character_that_no_command_had_is_told_where_it_is(tmp_path):
    with pytest.raises(UserError, match="a path may have no NUL character"):
        paths.path("a\0b")
    with pytest.raises(UserError, match="a path may have no NUL character"):
        FolderData(path="a\0b").open(8)
    pictures(tmp_path)
    listed = json.dumps({"file": "a\0b.png", "caption": "a circle"})
    (tmp_path / "captions.jsonl").write_text(listed)
    with pytest.raises(UserError, match="line 1: .* and file no NUL character"):
        FolderData(path=str(tmp_path)).open(8)


def test_an_empty_path_is_not_this_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--out", ""], ["--out="]):
        line = fails(capsys, "sample", "red", *words)
        assert "--out" in line and "the path is empty; write . for this folder" in line
    with pytest.raises(UserError, match="is empty; write . for this folder"):
        FolderData(path="").open(8)
    assert "--text-encoder is empty" in fails(capsys, "sample", "red", "--text-encoder", "")


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x07b", "\x9b2J", "\u202ereversed", "\udcff"])
def test_no_character_of_a_name_is_obeyed_by_the_terminal(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "a cat", "--model", f"{name}/none"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and ascii(name)[1:-1] in line
