"""`cascade eval prompts`: what it draws, that it goes on where it was, and what others read."""

import contextlib
import json
import os
import re

import model_folders
import numpy as np
import processes
import pytest

from cascade import images, testing
from cascade.commands import eval as evaluate
from cascade.data.samples import SamplesData
from cascade.errors import UserError
from cascade.evaluation import prompt_runs
from cascade.runner import output
from cascade.runner.cascade import Cascade
from cascade.storage import paths

LINES = [
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two <b>cats</b>"},
    {"tag": "colors", "include": [{"class": "car", "color": "red"}], "prompt": "a red car"},
    {"tag": "counting", "include": [{"class": "dog", "count": 3}], "prompt": "three dogs"},
]


@pytest.fixture(scope="module")
def cascade():
    found = testing.cascade([testing.smallest_stage(), testing.super_resolution_stage(8)])
    found.name, found.digest = "tiny", "abc"
    return found


@pytest.fixture
def loaded(cascade, monkeypatch):
    """Makes every model the tiny one."""
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
    return cascade


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(file, out, *words):
    words = ["prompts", str(file), "--out", str(out), *map(str, words)]
    evaluate.main([*words, "--no-compilation-cache"])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_pictures_lie_as_those_of_sample_with_what_the_set_says(loaded, file, tmp_path, capsys):
    out = tmp_path / "out"
    run(file, out, "--samples", 2, "--seed", 5)
    report = json.loads(capsys.readouterr().out)
    assert report["categories"] == {"counting": 2, "colors": 1}
    assert (report["prompts"], report["pictures"], report["drawn_before"]) == (3, 6, 0)
    assert (report["model"], report["model_sha256"]) == ("tiny", "abc")
    assert set(report["settings"]) == {"base8", "sr16"}
    assert report["files"][0]["prompts"] == 3 and len(report["files"][0]["sha256"]) == 64
    about = json.loads((out / "0003.json").read_text())
    assert (about["prompt"], about["category"]) == ("a red car", "colors")
    assert about["of_set"] == {"include": LINES[1]["include"]}
    assert [json.loads((out / f"{n:04d}.json").read_text())["seed"] for n in range(6)] == [
        *(5, 6, 1005, 1006, 2005, 2006)
    ]
    drawn = loaded("a red car", seed=1006)[0].images
    for side in (8, 16):
        there = np.asarray(images.load_image(out / f"0003_{side}.png"))
        assert np.abs(there.astype(int) - drawn[side]).max() <= 1
    source = SamplesData(path=str(out)).open(16)
    assert len(source) == 6 and source[3]["caption"] == "a red car"
    assert not [p for p in out.iterdir() if p.name.startswith(".") or p.name == "running.json"]


def test_seeds_do_not_change_with_the_number_of_samples(loaded, file, tmp_path):
    run(file, tmp_path / "one", "--until", 8)
    run(file, tmp_path / "three", "--until", 8, "--samples", 3)
    for p in range(3):
        one, three = tmp_path / "one" / f"{p:04d}_8.png", tmp_path / "three" / f"{3 * p:04d}_8.png"
        assert one.read_bytes() == three.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(cascade, tmp_path_factory):
    """The words of a run, and what is in its folder when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: cascade))
        run(folder / "set.jsonl", folder / "out", "--samples", 3, "--batch", 2)
    return folder / "set.jsonl", contents(folder / "out")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 7, 12, 20, 27])
def test_a_run_that_is_killed_and_given_again_equals_an_uninterrupted_one(
    loaded, uninterrupted, tmp_path, monkeypatch, after, batch
):
    """Killed when so many files have been written, and nothing more is."""
    file, expected = uninterrupted
    if batch == 1:
        run(file, tmp_path / "whole", "--samples", 3, "--batch", 1)
        expected = contents(tmp_path / "whole")
    left = [after]
    replace = os.replace

    class Killed(BaseException):
        pass

    def replacing(source, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(paths.os, "replace", replacing)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(file, out, "--samples", 3, "--batch", batch)
    monkeypatch.setattr(paths.os, "replace", replace)
    (out / ".0004_8.png.0123.partial").write_bytes(b"half of")
    (out / "running.json").write_text("{")
    assert contents(out).keys() < {*expected, ".0004_8.png.0123.partial", "running.json"}
    drawn = []
    draw = loaded.draw
    monkeypatch.setattr(loaded, "draw", lambda *a, **k: drawn.append(k["seed"]) or draw(*a, **k))
    whole = len(list(out.glob("[0-9]*.json")))
    run(file, out, "--samples", 3, "--batch", batch)
    assert contents(out) == expected
    assert len(drawn) == -(-9 // batch) - whole // batch


def test_a_picture_that_is_not_whole_is_drawn_again_and_others_are_left(loaded, file, tmp_path):
    out = tmp_path / "out"
    run(file, out)
    before = contents(out)
    (out / "0000_16.png").unlink()
    (out / "0001.json").unlink()
    (out / "0002_8.png").write_bytes(b"mine")
    run(file, out)
    after = contents(out)
    assert after.pop("0002_8.png") == b"mine"
    before.pop("0002_8.png")
    assert after == before


@pytest.mark.parametrize(
    "words,message",
    [
        (["--samples", "3"], "samples was 2 and is 3 now"),
        (["--seed", "1"], "seed was 0 and is 1 now"),
        (["--until", "8"], "until was 16 and is 8 now; give"),
        (["--steps", "2,3"], "settings.sr16.steps was 2 and is 3 now"),
        (["--guidance", "2,1"], "settings.base8.guidance was 1.0 and is 2.0 now"),
    ],
)
def test_other_settings_are_refused_and_what_is_there_stays(loaded, file, tmp_path, words, message):
    out = tmp_path / "out"
    run(file, out, "--samples", 2)
    before = contents(out)
    with pytest.raises(UserError) as e:
        run(file, out, *([] if "--samples" in words else ["--samples", "2"]), *words)
    assert message in str(e.value) and "begun by another run" in str(e.value)
    assert contents(out) == before


def test_another_file_or_model_is_refused_and_another_place_of_the_same_is_not(
    loaded, file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run(file, out)
    run(file.rename(tmp_path / "moved.jsonl"), out)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(UserError, match="files.0.sha256 was"):
        run(other, out)
    monkeypatch.setattr(loaded, "digest", "abd")
    with pytest.raises(UserError, match='model_sha256 was "abc" and is "abd" now'):
        run(tmp_path / "moved.jsonl", out)


def test_a_folder_of_something_else_is_refused(loaded, file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine.txt, and no run.json"):
        run(file, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}
    (tmp_path / "out" / "run.json").write_text("[1")
    with pytest.raises(UserError, match="not readable as JSON"):
        run(file, tmp_path / "out")
    with pytest.raises(UserError, match="is a file; name a folder"):
        run(file, file)


def test_geneval_finds_its_lines_and_pictures(loaded, file, tmp_path):
    """As its evaluate_images.py looks for them: folders of digits, with pictures in samples."""
    out = tmp_path / "out"
    run(file, out, "--samples", 2, "--layout", "geneval")
    folders = sorted(path.name for path in (out / "geneval").iterdir())
    assert folders == ["00000", "00001", "00002"]
    for place, name in enumerate(folders):
        folder = out / "geneval" / name
        assert json.loads((folder / "metadata.jsonl").read_text()) == LINES[place]
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"] and {p.name for p in folder.iterdir()} == {
            *("metadata.jsonl", "samples")
        }
        for sample, picture in enumerate(names):
            theirs = (folder / "samples" / picture).read_bytes()
            assert theirs == (out / f"{2 * place + sample:04d}_16.png").read_bytes()


def test_a_layout_can_be_asked_for_later_and_where_there_are_no_links(
    loaded, file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run(file, out, "--samples", 2)
    monkeypatch.setattr(loaded, "draw", None)  # all are there
    monkeypatch.setattr(prompt_runs.os, "link", lambda *_: (_ for _ in ()).throw(OSError("none")))
    for _ in range(2):
        run(file, out, "--samples", 2, "--layout", "geneval2")
        run(file, out, "--samples", 2, "--layout", "geneval")
    firsts = json.loads((out / "geneval2" / "image_paths.json").read_text())
    assert firsts == {
        line["prompt"]: str(out / f"{2 * i:04d}_16.png") for i, line in enumerate(LINES)
    }
    copy = out / "geneval" / "00002" / "samples" / "0001.png"
    assert copy.read_bytes() == (out / "0005_16.png").read_bytes()


def test_t2i_compbench_finds_prompts_and_numbers_in_the_names(loaded, tmp_path):
    """As its scorers read them: the prompt before the first _, the number after the last."""
    file, out = tmp_path / "color_val.txt", tmp_path / "out"
    file.write_text("a red bench, no. 2\na blue cat\n")
    run(file, out, "--samples", 2, "--layout", "t2i-compbench")
    names = [path.name for path in (out / "t2i-compbench" / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [
        *("a red bench, no. 2", "a red bench, no. 2", "a blue cat", "a blue cat")
    ]
    there = out / "t2i-compbench" / "samples" / names[2]
    assert there.read_bytes() == (out / "0002_16.png").read_bytes()


@pytest.mark.parametrize("prompt", ["a cat/dog", "../../mine", "a_b", "x" * 240])
def test_prompts_that_no_file_can_be_called_are_refused_before_anything_is_drawn(
    loaded, tmp_path, prompt
):
    (tmp_path / "a.txt").write_text(f"fine\n{prompt}\n")
    with pytest.raises(UserError, match=r"--layout t2i-compbench: .*a.txt, line 2"):
        run(tmp_path / "a.txt", tmp_path / "out", "--layout", "t2i-compbench")
    with pytest.raises(UserError, match=r"--layout geneval: .* is text"):
        run(tmp_path / "a.txt", tmp_path / "out", "--layout", "geneval")
    assert not (tmp_path / "out").exists()


def test_the_page_has_every_prompt_and_picture_by_category(loaded, file, tmp_path):
    out = tmp_path / "out"
    run(file, out, "--samples", 2)
    text = (out / "index.html").read_text()
    shown = re.findall(r'<img src="([^"]+)" loading="lazy"', text)
    assert sorted(shown) == sorted(f"{n:04d}_{side}.png" for n in range(6) for side in (8, 16))
    assert all(f'<a href="{name}"><img' in text for name in shown)
    counting, colors = text.split("<section")[1:]
    assert 'id="c0"><h2>counting' in counting and 'href="#c0">counting</a><td>2<td>4<td>0' in text
    assert "three dogs" in counting and "a red car" in colors and "seed 1001" in colors
    assert "<b>cats" not in text and "two &lt;b&gt;cats" in text
    assert "http" not in text and "to draw yet</small>" not in text
    odd = tmp_path / os.fsdecode(b"\xff<.jsonl")
    run(file.rename(odd), out, "--samples", 2)
    assert "?&lt;.jsonl</span>, drawn by" in (out / "index.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_that_is_stopped_shows_what_is_there(loaded, file, tmp_path, monkeypatch):
    draw, left = loaded.draw, [2]

    def stopping(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr(loaded, "draw", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "out", "--until", 8)
    text = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r'<img src="([^"]+)"', text) == ["0000_8.png", "0001_8.png"]
    assert "<tr><th>all<th>3<th>2<th>1" in text and "1 to draw yet</small>" in text


def share(argv, printed):
    own = f"{printed}_{os.environ['JAX_PROCESS_ID']}"
    written = output.write

    def telling(picture, folder, number, record):
        with open(f"{own}.numbers", "a") as told:
            print(number, file=told)
        return written(picture, folder, number, record)

    with open(own, "w") as out, contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as m:
        m.setattr(output, "write", telling)
        evaluate.main(argv)


def test_several_processes_share_the_pictures_and_the_first_tells(tmp_path, file, capsys):
    """Batches of two of nine pictures, of which the sixth is there already."""
    model = model_folders.model_folder(tmp_path / "model", testing.smallest_stage(128))
    words = ["--samples", "3", "--batch", "2", "--model", str(model), "--layout", "geneval2"]
    run(file, tmp_path / "alone", *words)
    capsys.readouterr()
    run(file, tmp_path / "out", *words)
    capsys.readouterr()
    for picture in range(9):
        if picture != 5:
            (tmp_path / "out" / f"{picture:04d}.json").unlink()
    argv = ["prompts", str(file), "--out", str(tmp_path / "out"), *words]
    argv.append("--no-compilation-cache")
    group = processes.start_group(2, share, argv, str(tmp_path / "printed"))
    assert processes.codes(group) == [0, 0]
    own = [(tmp_path / f"printed_{i}.numbers").read_text().split() for i in range(2)]
    assert own == [["0", "1", "4", "8"], ["2", "3", "6", "7"]]
    report, silence = ((tmp_path / f"printed_{i}").read_text() for i in range(2))
    assert json.loads(report)["drawn_before"] == 1 and silence == ""
    alone, shared = contents(tmp_path / "alone"), contents(tmp_path / "out")
    assert shared.keys() == alone.keys() and shared["index.html"] == alone["index.html"]
    for n in range(9):
        one, other = (
            np.asarray(images.load_image(tmp_path / name / f"{n:04d}_8.png")).astype(int)
            for name in ("alone", "out")
        )
        assert np.abs(one - other).max() <= 1


def test_what_a_person_should_know_is_said_once(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaded, "known_words", frozenset({"red", "circle"}))
    rows = ["prompt,category", "red circle,a", ",b", "red pony,a", "pony one two,b"]
    long = " ".join(["red"] * 20)
    (tmp_path / "a.csv").write_text("\n".join([*rows, long + ",c"]))
    with pytest.warns(UserWarning) as told:
        run(tmp_path / "a.csv", tmp_path / "out", "--until", 8)
    said = [str(one.message) for one in told]
    assert len(said) == 3 and "no prompt in line 3; passed over" in said[0]
    assert "2 of 4 prompts have words that are not in the captions" in said[1]
    assert "such as pony" in said[1] and "1 of 4 prompts are longer than 12 tokens" in said[2]
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,message",
    [
        (["--samples", "0"], "--samples 0: must be 1 to 1000"),
        (["--samples", "1001"], "--samples 1001: must be 1 to 1000"),
        (["--batch", "0"], "--batch 0: must be 1 to 4096"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--seed", str(2**32 - 2000)], "4294967296, below 2^32"),
        (["--layout", "rows"], "--layout"),
        (["--until", "9"], "this model draws 8, 16 px"),
        (["--prompt-column", "text"], "no such column; it has tag, include, prompt"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(loaded, file, tmp_path, words, message):
    with pytest.raises(UserError) as e:
        run(file, tmp_path / "out", *words)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no file of prompts is given"):
        evaluate.main(["prompts", "--out", str(tmp_path / "out")])
