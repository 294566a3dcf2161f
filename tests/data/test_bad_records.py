"""A record that cannot be read neither ends a run nor vanishes; a picture that can be read is."""

import collections
import io
import itertools
import json
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cascade import images
from cascade.commands import data as command
from cascade.data import FolderData, batches, folder, transforms
from cascade.data.source import BadRecord
from cascade.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side=16):
    levels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def read(data):
    return images.decoded(io.BytesIO(data))


def folder_of(path, bad=(), count=8):
    """Flat pictures, picture i of level 10 i and with caption "i"; those of `bad` are damaged."""
    path.mkdir(exist_ok=True)
    for i in range(count):
        whole = encoded(Image.new("RGB", (8, 8), (10 * i,) * 3))
        (path / f"{i}.png").write_bytes(whole[:40] if i in bad else whole)
        (path / f"{i}.txt").write_text(str(i))
    return FolderData(path=str(path))


def loaded(data, **options):
    options = {"resolution": 8, "batch_size": 4, "seed": 1, "tokenizer": None, **options}
    return batches(data.open(options.pop("resolution")), **options)


def levels(taken):
    return [int(picture[0, 0, 0]) // 10 for batch in taken for picture in batch["image"]]


def take(iterator, count):
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


# Pictures.


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_read_or_refused_in_one_way(kind):
    draw = random.Random(kind)
    whole = encoded(noise(), kind)
    refused = 0
    for case in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(min(len(data), draw.choice((64, 10**6))))] ^= 1 << draw.randrange(8)
        if case % 10 == 0:
            data = data[: draw.randrange(len(data))]
        try:
            picture = read(bytes(data))
        except images.Unreadable as e:
            refused += 1
            assert str(e) and "\n" not in str(e)
        else:
            assert picture.mode == "RGB"
    assert refused > 5


def test_every_flipped_bit_of_a_png_is_noticed():
    """Other formats have no checksums."""
    whole = encoded(noise(4))
    for bit in range(8 * 8, 8 * (len(whole) - 12), 3):  # after the signature, before the last chunk
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(images.Unreadable):
            read(bytes(data))


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\xff" * 40, b"MM\0*\0\0\0\x08\xff\xff", b"II*\0"])
def test_a_picture_is_read_whatever_its_exif(exif):
    assert read(encoded(noise(), "PNG", exif=exif)).size == (16, 16)


def test_a_picture_is_read_whatever_its_comments_and_profile():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 2_000_000, zip=True)
    info.add_itxt("more", "b" * 3_000_000, zip=True)
    profile = np.random.default_rng(0).bytes(1_500_000)
    data = encoded(noise(), "PNG", pnginfo=info, icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(read(data)), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_eight_bits_is_read_with_its_levels(mode):
    """Dark stays dark and light stays light."""
    for level in (0, 255):
        given = Image.new("RGB", (8, 8), (level,) * 3).convert("LA" if mode == "PA" else mode)
        given = given.convert(mode)
        kind = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
        if mode == "PA":
            given, kind = given.convert("RGBA"), "WEBP"
        seen = np.asarray(read(encoded(given, kind)))
        assert np.abs(seen.astype(int) - level).max() < 8


@pytest.mark.parametrize(
    "array,message",
    [
        (np.full((8, 8), 0.5, np.float32), "its pixels are floats"),
        (np.full((8, 8), 2**20, np.int32), "more than 16 bits"),
        (np.full((8, 8), 200, np.int32), "more than 16 bits"),
    ],
)
def test_pixels_of_no_agreed_range_are_refused(array, message):
    with pytest.raises(images.Unreadable, match=message):
        read(encoded(Image.fromarray(array), "TIFF"))


def test_sixteen_bits_that_count_from_white_are_refused():
    data = bytearray(encoded(Image.fromarray(np.full((8, 8), 60_000, np.uint16)), "TIFF"))
    at = data.index(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))  # PhotometricInterpretation, BlackIsZero
    data[at + 8] = 0
    with pytest.raises(images.Unreadable, match="count from white to black"):
        read(bytes(data))


def test_an_animated_picture_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(read(data))[0, 0].tolist() == [255, 0, 0]


# Batches.


@pytest.mark.parametrize("workers", [0, 1])
def test_another_example_stands_in_for_a_bad_one_which_is_named(tmp_path, workers):
    data = folder_of(tmp_path / "d", bad=(2, 3, 7))
    found = loaded(data, workers=workers)
    seen = levels(take(found, 40))
    counts = collections.Counter(seen)
    assert set(counts) == {0, 1, 4, 5, 6} and len(seen) == 160
    assert max(counts.values()) < 50  # 32 each: the one after bad ones is not seen more often
    expected = {(f"{i}.png", "unreadable picture") for i in (2, 3, 7)}
    assert set(found.bad_records) == expected


def test_what_stands_in_is_the_same_for_any_rows_and_after_resuming(tmp_path):
    data = folder_of(tmp_path / "d", bad=(1, 5))
    whole = levels(take(loaded(data), 4))
    halves = [levels(take(loaded(data, rows=rows), 4)) for rows in ([0, 1], [2, 3])]
    assert whole == [x for i in range(0, 8, 2) for half in halves for x in half[i : i + 2]]
    later = loaded(data)
    later.set_state({"examples": 8})
    assert levels(take(later, 2)) == whole[8:]


def test_more_bad_examples_than_allowed_end_it(tmp_path):
    data = folder_of(tmp_path / "d", bad=(0, 1))
    rest = loaded(data, batch_size=100, most_bad=0.2)
    taken = 0
    with pytest.raises(UserError, match=r"\d+ of 1\d+ examples could not be read, .* share of 0.2"):
        while True:
            next(rest)
            taken += 1
    rest.close()
    assert taken == 8  # 100 examples and 25 or more for which they stand in, until there are 1000
    assert len(take(loaded(data, batch_size=100, most_bad=0.3), 12)) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_nothing_but_bad_examples_is_refused(tmp_path, workers):
    data = folder_of(tmp_path / "d", bad=range(8))
    with pytest.raises(UserError, match=r"1000 examples in a row cannot be read, .*\.png"):
        next(loaded(data, workers=workers))


def test_no_more_than_a_few_bad_examples_in_a_row_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "MOST_BAD_IN_A_ROW", 3)
    with pytest.raises(UserError, match=r"3 examples in a row cannot be read"):
        next(loaded(folder_of(tmp_path / "d", bad=range(8))))


def children():
    return {process.pid for process in multiprocessing.active_children()}


def test_a_killed_worker_is_replaced_and_no_example_is_lost(tmp_path, capsys):
    data = folder_of(tmp_path / "d")
    expected = levels(take(loaded(data), 12))
    before, found, seen = children(), loaded(data, workers=1), []
    for step in range(12):
        seen.append(next(found))
        if step == 3:
            for worker in children() - before:
                os.kill(worker, signal.SIGKILL)
    found.close()
    assert levels(seen) == expected
    assert "a data worker was killed" in capsys.readouterr().err


def test_workers_that_are_killed_again_and_again_end_it(tmp_path, monkeypatch):
    def killed(self):
        def fail():
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
            yield

        return fail()

    def failed(self):
        raise RuntimeError("something else")

    found = loaded(folder_of(tmp_path / "d"), workers=1)
    monkeypatch.setattr(type(found), "_start", failed)
    with pytest.raises(RuntimeError, match="something else"):
        next(found)
    monkeypatch.setattr(type(found), "_start", killed)
    with pytest.raises(UserError, match="and so was a new one; set fewer workers"):
        next(found)


# Folders.


def test_what_is_left_out_of_a_folder_is_counted_by_reason(tmp_path, capsys):
    folder_of(tmp_path, count=3)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "b.heic").write_bytes(b"")
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "notes.md").write_text("no picture")
    source = FolderData(path=str(tmp_path)).open(8)
    assert len(source) == 1 and source[0]["caption"] == "2"
    assert {record.key: record.reason for record in source.left_out} == {
        "0.png": "without a caption",
        "1.png": "whose caption is not UTF-8",
        "b.heic": "of a format that is not read",
        "c.png": "no file",
    }
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 pictures with captions; left out 1 without a caption (0.png); 1 whose" in line
    assert set(loaded(FolderData(path=str(tmp_path))).bad_records) == {
        (record.key, record.reason) for record in source.left_out
    }


def test_a_caption_file_of_any_size_takes_no_memory(tmp_path, monkeypatch):
    folder_of(tmp_path, count=2)
    monkeypatch.setattr(folder, "MOST_CAPTION", 100)
    (tmp_path / "0.txt").write_text("a" * 100)
    (tmp_path / "1.txt").write_text("a" * 101)
    source = FolderData(path=str(tmp_path)).open(8)
    assert [record.reason for record in source.left_out] == ["whose caption is too long"]


def test_more_left_out_than_allowed_is_refused_at_once(tmp_path):
    folder_of(tmp_path, count=4)
    (tmp_path / "1.txt").unlink()
    assert len(take(loaded(FolderData(path=str(tmp_path)), most_bad=0.25), 2)) == 2
    with pytest.raises(UserError, match=r"1 of 4 examples cannot be used, .* the first: .*1.png"):
        loaded(FolderData(path=str(tmp_path)), most_bad=0.2)


@pytest.mark.parametrize("name", ["picture", "caption", "listed", "too long", "surrogate"])
def test_an_odd_entry_is_left_out_like_any_other(tmp_path, name):
    folder_of(tmp_path, count=2)
    if name in ("picture", "caption"):
        odd = tmp_path / ("1.png" if name == "picture" else "1.txt")
        odd.unlink()
        odd.symlink_to(odd)
    else:
        (tmp_path / "x.png").symlink_to(tmp_path / "x.png")
        file = {"listed": "x.png", "too long": "y" * 300 + ".png", "surrogate": "\ud83d.png"}[name]
        lines = [json.dumps({"file": f, "caption": "a"}) for f in ("0.png", file)]
        (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = FolderData(path=str(tmp_path)).open(8)
    assert len(source) == 1 and len(source.left_out) == 1


def test_a_list_that_leads_elsewhere_or_is_a_folder_is_refused(tmp_path):
    folder_of(tmp_path / "d", count=2)
    (tmp_path / "list").write_text(json.dumps({"file": "0.png", "caption": "a"}))
    (tmp_path / "d" / "captions.jsonl").symlink_to(tmp_path / "list")
    with pytest.raises(UserError, match="captions.jsonl is outside the folder"):
        FolderData(path=str(tmp_path / "d")).open(8)
    (tmp_path / "d" / "captions.jsonl").unlink()
    (tmp_path / "d" / "captions.jsonl").mkdir()
    with pytest.raises(UserError, match="captions.jsonl: is a folder"):
        FolderData(path=str(tmp_path / "d")).open(8)


def test_a_picture_that_becomes_a_link_to_elsewhere_is_not_read(tmp_path):
    source = folder_of(tmp_path / "d", count=2).open(8)
    (tmp_path / "d" / "1.png").rename(tmp_path / "secret.png")
    (tmp_path / "d" / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRecord, match="outside the folder"):
        source[1]


def test_a_line_of_any_length_takes_little_memory(tmp_path, monkeypatch):
    folder_of(tmp_path, count=2)
    monkeypatch.setattr(folder, "MOST_CAPTION", 100)
    good = json.dumps({"file": "0.png", "caption": "a"})
    (tmp_path / "captions.jsonl").write_text(f"{good}\n{'x' * 5000}\n{good}\n{'y' * 101}")
    assert max(map(len, folder._lines(tmp_path / "captions.jsonl"))) == 102
    source = FolderData(path=str(tmp_path)).open(8)
    assert len(source) == 2
    assert [record.key for record in source.left_out] == [
        f"captions.jsonl, line {n}" for n in (2, 4)
    ]


def test_pictures_of_every_format_that_is_read_are_found(tmp_path):
    for i, kind in enumerate(FORMATS):
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(encoded(noise(), kind))
        (tmp_path / f"{i}.txt").write_text("a")
    source = FolderData(path=str(tmp_path)).open(8)
    assert len(source) == len(FORMATS)
    assert all(source[i]["image"].shape == (8, 8, 3) for i in range(len(source)))


def test_inspect_reads_what_it_can_and_names_the_rest(tmp_path, capsys):
    folder_of(tmp_path / "d", bad=(3,))
    (tmp_path / "d" / "5.txt").unlink()
    command.main(["inspect", str(tmp_path / "d"), "--out", str(tmp_path / "s.png")])
    told = json.loads(capsys.readouterr().out)
    assert told["examples"] == 7 and told["sampled"] == 6
    assert told["bad_records"] == {
        "without a caption": {"count": 1, "first": ["5.png"]},
        "unreadable picture": {"count": 1, "first": ["3.png"]},
    }
    assert Image.open(tmp_path / "s.png").width > 128


def test_inspecting_nothing_but_bad_pictures_is_refused_with_one_of_them(tmp_path):
    folder_of(tmp_path / "d", bad=range(8))
    with pytest.raises(UserError, match=r"none of 8 examples can be read, the first: .*/0.png"):
        command.main(["inspect", str(tmp_path / "d"), "--out", str(tmp_path / "s.png")])
    assert not (tmp_path / "s.png").exists()
