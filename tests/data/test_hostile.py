"""Data from strangers runs no code, names no file outside its folder, and takes bounded memory."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from cascade import cli, images
from cascade.commands import data as data_command
from cascade.data import FolderData, tfds
from cascade.data.inspection import dataset_in
from cascade.errors import UserError


def picture(path, mode="RGB", side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side)).save(path)
    return path


def refused(capsys, *words):
    """The one line that the command line ends with."""
    with pytest.raises(SystemExit) as e:
        cli.main([*map(str, words)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and lines[-1].startswith("error: ")
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


# Pictures.


@pytest.mark.parametrize(
    "content",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", b"GIF89a", b""],
)
def test_no_program_is_run_to_read_a_picture(tmp_path, content, monkeypatch):
    """PostScript would be given to Ghostscript."""
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: ran.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: ran.append(a))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="a.png: cannot be read as an image"):
        images.load_image(tmp_path / "a.png")
    assert not ran


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = picture(tmp_path / "a.png", side=32)
    monkeypatch.setattr(images, "MOST_PIXELS", 32 * 32)
    assert images.load_image(file).size == (32, 32)
    monkeypatch.setattr(images, "MOST_PIXELS", 32 * 32 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"it has 32 x 32 pixels, and at most 1023 are read"):
        images.load_image(file)


@pytest.mark.parametrize("kind", [{}, {"format": "MPO", "save_all": True}])
def test_a_picture_that_is_drawn_over_and_over_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, kind
):
    image = Image.new("RGB", (16, 16))
    more = {"append_images": [image.copy()]} if kind else {}
    image.save(tmp_path / "a.jpg", progressive=True, **kind, **more)
    scans = (tmp_path / "a.jpg").read_bytes().count(b"\xff\xda")
    monkeypatch.setattr(images, "MOST_SCANS", scans)
    assert scans > 1 and images.load_image(tmp_path / "a.jpg").size == (16, 16)
    monkeypatch.setattr(images, "MOST_SCANS", scans - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=rf"it draws its pixels {scans} times over"):
        images.load_image(tmp_path / "a.jpg")


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    ramp = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16) + 7
    Image.fromarray(ramp).save(tmp_path / "a.png")
    read = np.asarray(images.load_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read, (ramp >> 8).astype(np.uint8)[..., None].repeat(3, -1))


def test_what_is_transparent_shows_the_ground(tmp_path):
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert (np.asarray(images.load_image(tmp_path / "a.png")) == 255).all()
    assert (np.asarray(images.load_image(tmp_path / "a.png", ground="black")) == 0).all()


# Folders.


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "/ABSOLUTE", "link.png"])
def test_a_list_names_no_file_outside_its_folder(tmp_path, name):
    outside = picture(tmp_path / "outside.png")
    folder = picture(tmp_path / "d" / "a" / "0.png").parents[1]
    (folder / "link.png").symlink_to(outside)
    name = str(outside) if name == "/ABSOLUTE" else name
    (folder / "captions.jsonl").write_text(json.dumps({"file": name, "caption": "a"}))
    with pytest.raises(UserError, match="captions.jsonl, line 1: .* is outside the folder"):
        FolderData(path=str(folder)).open(8)


@pytest.mark.parametrize("linked", ["a.png", "a.txt"])
def test_a_pair_is_no_link_to_what_is_elsewhere(tmp_path, linked):
    folder = picture(tmp_path / "d" / "a.png").parent
    (folder / "a.txt").write_text("a caption")
    assert len(FolderData(path=str(folder)).open(8)) == 1
    (folder / linked).rename(tmp_path / linked)
    (folder / linked).symlink_to(tmp_path / linked)
    with pytest.raises(UserError, match=f"{linked} is outside the folder"):
        FolderData(path=str(folder)).open(8)


def test_a_link_within_the_folder_is_a_file_of_it(tmp_path):
    folder = picture(tmp_path / "d" / "a.png").parent
    (folder / "a.txt").write_text("a caption")
    for end in ("png", "txt"):
        (folder / f"b.{end}").symlink_to(folder / f"a.{end}")
    assert len(FolderData(path=str(folder)).open(8)) == 2


def test_hidden_folders_are_passed_over_and_linked_ones_are_told(tmp_path, capsys):
    folder = picture(tmp_path / "d" / "a.png").parent
    (folder / "a.txt").write_text("a caption")
    picture(folder / ".ipynb_checkpoints" / "a-checkpoint.png")
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(FolderData(path=str(folder)).open(8)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and line.endswith("is not followed (more)")


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "a.png", "caption": "half an emoji \\ud83d"}',
        "[" * 100_000,
        '{"file": ' + "9" * 6000 + "}",
        '{"file": 5, "caption": 5}',
        "5",
        "null",
    ],
)
def test_a_damaged_line_of_a_list_is_left_out_and_named(tmp_path, line):
    folder = picture(tmp_path / "d" / "a.png").parent
    good = json.dumps({"file": "a.png", "caption": "a"})
    (folder / "captions.jsonl").write_text(f"{good}\n{line}\n")
    source = FolderData(path=str(folder)).open(8)
    assert len(source) == 1
    (record,) = source.left_out
    assert record.key == "captions.jsonl, line 2" and f"{record.key}: " in str(record)


# TFDS.


@pytest.mark.parametrize("said", ["1", "3", "1000000000000"])
def test_a_dataset_of_tfds_holds_as_many_records_as_it_says(tmp_path, capsys, said):
    data_command.main(["make", str(tmp_path / "ds"), "--count", "2", "--resolution", "8"])
    (info,) = (tmp_path / "ds").rglob("dataset_info.json")
    told = json.loads(info.read_text())
    told["splits"][0]["shardLengths"] = [said]
    info.write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"holds 2 records, and dataset_info.json says {said}"):
        dataset_in(str(tmp_path / "ds")).open(8)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_dataset_of_tfds_runs_no_code_of_its_own(tmp_path, capsys, monkeypatch, key, deep):
    data_command.main(["make", str(tmp_path / "ds"), "--count", "2", "--resolution", "8"])
    (file,) = (tmp_path / "ds").rglob("features.json")
    features = json.loads(file.read_text())
    named = {key: "payload_of_a_stranger.Text", "content": {}}
    if deep:
        features["featuresDict"]["features"]["caption"] = named
    else:
        features = features | named
    file.write_text(json.dumps(features))
    (tmp_path / "payload_of_a_stranger.py").write_text("open('RAN', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    said = refused(capsys, "data", "inspect", "ds", "--out", "sheet.png")
    assert "names the class payload_of_a_stranger.Text" in said
    assert not (tmp_path / "RAN").exists() and "payload_of_a_stranger" not in sys.modules


@pytest.mark.parametrize(
    "named",
    [
        *({key: "a_stranger.Text"} for key in ("proto_cls", "protoCls")),
        [{"type": "a_stranger.Text"}],
        {"type": "tensorflow_datasets_of_a_stranger.Text"},
    ],
)
def test_a_class_is_found_wherever_a_dataset_of_tfds_names_it(tmp_path, named):
    features = {"content": named, "type": "tensorflow_datasets.core.features.Text"}
    (tmp_path / "1.0.0").mkdir()
    (tmp_path / "1.0.0" / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match="it: features.json names the class .*a_stranger.Text"):
        tfds._check_features(tmp_path, "it")


def test_a_dataset_of_tfds_is_no_link_to_what_is_elsewhere(tmp_path):
    folder = tmp_path / "ds" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "a").write_text("")
    (folder / "b").symlink_to(folder / "a")
    tfds._check_features(tmp_path / "ds", "it")
    (tmp_path / "secret").write_text("")
    (folder / "c").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="it: c is a link that leads outside"):
        tfds._check_features(tmp_path / "ds", "it")
