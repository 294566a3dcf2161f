"""What `cascade data inspect` finds out."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from written import WRITERS, flat, pairs, records, tar

from cascade.commands import data as command
from cascade.data import duplicates
from cascade.errors import UserError


def inspect(capsys, source, tmp_path, *words):
    command.main(["inspect", source, "--out", str(tmp_path / "sheet.png"), *words])
    return json.loads(capsys.readouterr().out)


def scene(seed, side=64):
    """A smooth random picture."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_sizes_captions_and_columns_are_counted(tmp_path, capsys):
    found = [
        ("a", flat(0, 8), "one two", {}),
        ("b", flat(60, 16), "one", {}),
        ("c", encoded(Image.new("RGB", (32, 8))), "", {}),
    ]
    tar(tmp_path / "d", found)
    told = inspect(capsys, f"tar:{tmp_path}/d", tmp_path)
    assert told["shorter_side"] == {"min": 8, "median": 8, "max": 16}
    assert told["width_over_height"] == {"min": 1, "median": 1, "max": 4}
    assert told["empty_captions"] == 1 and told["words_per_caption"]["max"] == 2
    with Image.open(told["histograms"]) as drawn:
        assert drawn.width > 800
    with pytest.raises(UserError, match="sheet_histograms.png exists already"):
        (tmp_path / "sheet.png").unlink()
        inspect(capsys, f"tar:{tmp_path}/d", tmp_path)


def test_captions_that_a_text_encoder_cuts_are_counted(tmp_path, capsys):
    from cascade.text import T5Encoder

    texts = ["a circle", "a red circle above a blue square on gray"]
    pairs(tmp_path / "d", [(str(i), flat(i), text, {}) for i, text in enumerate(texts)])
    words = ("--text-encoder", "scenes", "--tokens", "8")
    told = inspect(capsys, f"folder:{tmp_path}/d", tmp_path, *words)
    tokens = T5Encoder.load("scenes", 8).tokenize(texts)
    assert told["tokens_per_caption"]["cut"] == int(tokens.truncated.sum()) == 1
    assert told["tokens_per_caption"]["min"] == int(tokens.mask[0].sum())


def test_captions_without_a_picture_are_counted(tmp_path, capsys):
    pairs(tmp_path / "d", records(2))
    (tmp_path / "d" / "more.txt").write_text("no picture")
    told = inspect(capsys, f"folder:{tmp_path}/d", tmp_path)
    assert told["captions_without_picture"]["first"] == [str(tmp_path / "d" / "more.txt")]


@pytest.mark.parametrize("kind", WRITERS)
def test_datasets_of_every_kind_are_inspected(kind, tmp_path):
    from cascade.data.inspection import inspect as look

    told = look(WRITERS[kind](tmp_path / "d", records(6)), tmp_path / "s.png", count=2, sample=4)
    assert (told["examples"], told["sampled"], told["distinct_captions"]) == (6, 4, 4)
    assert told["same_pictures"]["count"] == told["near_duplicates"]["count"] == 0


def test_pictures_that_are_there_twice_or_nearly_so_are_named(tmp_path, capsys):
    found = [(f"{i}", encoded(scene(i)), "a", {}) for i in range(12)]
    found += [
        ("same", found[0][1], "b", {}),
        ("jpeg", encoded(scene(1), "JPEG", quality=80), "c", {}),
        ("small", encoded(scene(2).resize((40, 40))), "d", {}),
    ]
    pairs(tmp_path / "d", found)
    told = inspect(capsys, f"folder:{tmp_path}/d", tmp_path)
    assert told["same_pictures"] == {"count": 1, "first": [["0.png", "same.png"]]}
    groups = {tuple(group) for group in told["near_duplicates"]["first"]}
    assert groups == {("0.png", "same.png"), ("1.png", "jpeg.png"), ("2.png", "small.png")}


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    numbers = [int(n) for n in rng.integers(0, 2**63, 40)]
    for number in numbers[:20]:
        flips = rng.choice(64, rng.integers(1, 7), replace=False)
        numbers.append(number ^ sum(1 << int(bit) for bit in flips))
    hashes = [(number, (0.0,)) for number in numbers]
    links = {
        frozenset((i, j))
        for i, a in enumerate(numbers)
        for j, b in enumerate(numbers[:i])
        if bin(a ^ b).count("1") <= duplicates.MOST_BITS
    }
    assert {frozenset(group) for group in duplicates.near(hashes)} == links and len(links) > 3
