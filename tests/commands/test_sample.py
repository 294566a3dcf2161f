"""The words of `cascade sample`: what is accepted, what is refused, what is written."""

import dataclasses
import errno
import json
import subprocess
import sys

import numpy as np
import processes
import pytest
from PIL import Image

from cascade import cli, images, testing
from cascade.diffusion import denoise, grids, samplers
from cascade.errors import UserError
from cascade.published.schedulers import Respaced
from cascade.runner import output
from cascade.runner.cascade import Cascade
from cascade.runner.overrides import override


def fails(capsys, *argv) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert e.value.code == 2 and captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.fixture
def fake(monkeypatch):
    """The model `scenes` is the untrained 8 -> 16 -> 32 px cascade."""
    from cascade.runner.cascade import Cascade

    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: testing.cascade()))


def sample(*argv):
    cli.main(["sample", *argv, "--no-compilation-cache"])


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "nothing to draw"),
        ([""], "the prompt is empty"),
        (["a", "  "], "prompt 2 is empty"),
        (["a", "--seed", "-1"], "--seed -1: must be 0 or more"),
        (["a", "--num", "0"], "--num 0: must be 1 or more"),
        (["a", "--sede", "1"], "--sede"),
        (["a", "--seed", "x"], "--seed must be a whole number, got 'x'; see --help"),
        (["a", "--until", "abc"], "--until must be a whole number, got 'abc'; see --help"),
        (["a", "--attribute-scale", "x"], "--attribute-scale must be a number, got 'x'; see"),
        (["a", "--seed", str(2**32)], "--seed 4294967296: the last of 1 pictures would"),
        (["a", "--model", "no/such"], "model no/such: no such folder"),
        (["a", "--prompts", "missing.txt"], "--prompts missing.txt: No such file"),
        (["a", "--lowres", "missing.png"], "missing.png: no such file"),
    ],
)
def test_bad_words_are_one_line_and_write_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "sample", *argv)
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in fails(capsys, "sample", "a", "--out", str(tmp_path / "out"))
    assert "cannot be written" in fails(capsys, "sample", "a", "--out", str(tmp_path / "out" / "x"))
    assert (tmp_path / "out").read_text() == "mine"


def test_prompt_files_must_be_text_with_a_prompt(capsys, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"a red circle\n\xff\xfe\n")
    assert "not UTF-8" in fails(capsys, "sample", "--prompts", str(file))
    file.write_text("\n \n")
    assert "has no line with a prompt" in fails(capsys, "sample", "--prompts", str(file))


def test_a_list_may_count_all_stages_of_the_model_or_those_that_draw():
    every = testing.stage_configs()
    for stages, text, expected in (
        (every[:2], "4,5,6", [4, 5]),
        (every[:2], "4,5", [4, 5]),
        (every[1:], "4,5,6", [5, 6]),
        (every[:1], "7", [7]),
    ):
        got = override(stages, every, steps=text)
        assert [s.steps for s in got] == expected
    (_, sr16) = override(every[:2], every, aug_level="0.1,0.2")
    assert sr16.aug_level == 0.1
    with pytest.raises(UserError, match="aug_level='0.1': no super-resolution stage draws"):
        override(every[:1], every, aug_level="0.1")


def test_a_number_of_steps_replaces_a_list_that_has_another():
    (base, *_) = testing.stage_configs()
    listed = Respaced(name="smart27")
    sampling = dataclasses.replace(base.sampling, steps=27, grid=listed)
    (got,) = override([dataclasses.replace(base, sampling=sampling)], steps="9")
    assert (got.steps, got.grid) == (9, grids.OnTable())


def test_a_prompt_without_its_quotes_is_warned_of(fake, tmp_path):
    words = ("red", "circle", "--until", "8", "--out", str(tmp_path), "--steps", "1")
    with pytest.warns(UserWarning, match='needs quotes: "red circle"'):
        sample(*words)


def test_what_the_machine_refuses_is_one_line(fake, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "disk/0000_8.png")

    monkeypatch.setattr(images, "save_png", full)
    with pytest.raises(SystemExit) as e:
        sample("a", "--until", "8", "--out", str(tmp_path), "--steps", "1")
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and last == "error: disk/0000_8.png: No space left on device"


def test_an_unknown_verb_names_the_nearest(capsys):
    assert "did you mean 'sample'" in fails(capsys, "smaple")


@pytest.mark.parametrize(
    "flag,text,message",
    [
        ("steps", "4,5", "steps='4,5': 2 values for 3 stages (base8, sr16, sr32)"),
        ("steps", "4,0,5", "steps='0': must be at least 1"),
        ("steps", "4,x,5", "steps='x'"),
        ("aug_level", "0.1,0.2,0.3", "3 values for 2 stages (sr16, sr32)"),
        ("aug_level", "2", "aug_level='2': must be in [0, 1]"),
        ("sampler", "euler", "must be one of ancestral, ddim, ddim-predicted, dpm++, "),
        ("sampler", "dpm++:2", "dpm++ takes no number"),
        ("sampler", "ancestral:2", "sampler='ancestral:2': gamma must be in [0, 1]"),
        ("guidance_plan", "wave", "must be one of constant, interval, oscillating"),
        ("guidance_plan", "constant:1", "interval at most two"),
        ("guidance_plan", "interval:1:2:3", "interval at most two"),
        (
            "guidance_plan",
            "interval:9",
            "'interval:9': low must be in [0, high=5.42), got 9",
        ),
        ("threshold", "static:.9", "dynamic at most two"),
        (
            "steps",
            "smart5",
            "entries of a table such as 999/500/0, or one of fast27",
        ),
        ("steps", "4,,5", "steps='4,,5': value 2 is empty"),
        ("guidance", "nan", "guidance='nan': must be a number, such as 0.5, got 'nan'"),
        ("guidance", "-1", "guidance='-1': must be 0 or more, got -1"),
        ("grid", "linear", "must be one of uniform, quadratic"),
        ("threshold", "clip", "must be one of none, static, dynamic"),
    ],
)
def test_lists_by_stage_are_checked(flag, text, message):
    with pytest.raises(UserError) as e:
        override(testing.stage_configs(), **{flag: text})
    assert message in str(e.value)


def test_lists_by_stage_reach_their_stages():
    stages = testing.stage_configs()
    got = override(
        stages,
        steps="7,smart27,9",
        guidance="2.5",
        aug_level="0.2,0.3",
        threshold="none,static,dynamic",
        grid="karras,uniform,trailing",
        sampler="ancestral:0.5,dpm++sde,heun:0.2",
        guidance_plan="constant,interval,oscillating",
        rescale="0.7",
    )
    assert [s.steps for s in got] == [7, 27, 9]
    assert [s.grid for s in got] == [
        grids.Karras(),
        Respaced(name="smart27"),
        grids.OnTable(),
    ]
    assert [s.guidance for s in got] == [2.5] * 3
    assert [s.aug_level for s in got] == [0.0, 0.2, 0.3]
    assert [s.threshold.kind for s in got] == ["none", "static", "dynamic"]
    assert [s.sampler for s in got] == [
        samplers.Ancestral(gamma=0.5),
        samplers.DPMSolverPP2MSDE(),
        samplers.Heun(churn=0.2),
    ]
    assert [type(s.guidance_plan).__name__ for s in got] == ["Constant", "Interval", "Oscillating"]
    (plan,) = {s.guidance_plan for s in override(stages, guidance_plan="interval:1.5:100")}
    assert plan == denoise.Interval(low=1.5, high=100.0)
    assert [s.guidance_rescale for s in got] == [0.7] * 3
    (threshold,) = {s.threshold for s in override(stages, threshold="dynamic:.95:1.5")}
    assert threshold == denoise.Threshold(percentile=0.95, cap=1.5)


def test_pictures_their_json_and_the_grid_are_written(fake, tmp_path, capsys):
    out = tmp_path / "new" / "samples"
    sample("red circle", "blue square", "--num", "2", "--out", str(out), "--steps", "2")
    names = {f"{i:04d}{end}" for i in range(4) for end in ("_8.png", "_16.png", "_32.png", ".json")}
    assert {p.name for p in out.iterdir()} == names | {"grid.png"}
    record = json.loads((out / "0003.json").read_text())
    assert (record["prompt"], record["seed"]) == ("blue square", 1)
    assert record["stages"]["sr32"]["steps"] == 2 and record["versions"]["jax"]
    assert record["text_encoder"] is None and record["dtype"] == "float32"
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in lines] == ["0000", "0001", "0002", "0003"]
    with Image.open(out / "0000_32.png") as image:
        assert image.size == (32, 32)


def test_a_picture_that_another_command_drew_meanwhile_is_not_overwritten(
    fake, tmp_path, capsys, monkeypatch
):
    (tmp_path / "0000.json").write_text("theirs")
    monkeypatch.setattr(output, "next_number", lambda folder: 0)
    with pytest.raises(SystemExit):
        sample("a", "--until", "8", "--out", str(tmp_path))
    assert "picture 0000 has come there" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["0000.json"]
    assert (tmp_path / "0000.json").read_text() == "theirs"


def test_a_folder_with_pictures_is_continued(fake, tmp_path):
    sample("red circle", "--until", "8", "--out", str(tmp_path))
    first = (tmp_path / "0000_8.png").read_bytes()
    (tmp_path / "0007.json").write_text("{}")
    sample("blue square", "--until", "8", "--out", str(tmp_path))
    assert (tmp_path / "0000_8.png").read_bytes() == first
    assert (tmp_path / "0008_8.png").exists() and not (tmp_path / "0001_8.png").exists()


def test_the_next_picture_has_a_number_that_no_file_has(tmp_path):
    assert output.next_number(tmp_path / "absent") == 0
    files = ("grid.png", 0), ("0003_8.png", 4), ("0004.gif", 5), ("0005_path.png", 6)
    for name, following in (
        *files,
        ("0006.json", 7),
        ("12345.json", 12346),
        ("a99999.json", 12346),
    ):
        (tmp_path / name).touch()
        assert output.next_number(tmp_path) == following


def test_the_sheet_is_of_the_pictures_of_its_own_command(fake, tmp_path):
    sample("red circle", "--until", "8", "--out", str(tmp_path))
    sample("blue square", "--num", "2", "--until", "8", "--out", str(tmp_path))
    own = [np.asarray(Image.open(tmp_path / f"000{i}_8.png")) for i in (1, 2)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), images.grid(own))


def test_a_seed_drawn_at_random_is_told_and_draws_the_same_again(fake, tmp_path, capsys):
    words = ("red circle", "--until", "8", "--num", "2", "--out", str(tmp_path))
    sample(*words, "--random-seed")
    told = capsys.readouterr()
    first, second = (json.loads(line)["seed"] for line in told.out.splitlines())
    assert second == first + 1 and f"--seed {first}\n" in told.err
    sample(*words, "--seed", str(first))
    for k in (0, 1):
        again, before = (np.asarray(Image.open(tmp_path / f"000{i}_8.png")) for i in (k, k + 2))
        np.testing.assert_array_equal(again, before)
    sample(*words[:3], "--out", str(tmp_path), "--random-seed")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seed"] != first
    with pytest.raises(SystemExit):
        sample(*words, "--random-seed", "--seed", "5")
    assert "--seed 5 and --random-seed: give one of them" in capsys.readouterr().err


def test_quiet_leaves_stderr_to_errors(tmp_path):
    words = ["sample", "frog", "zebra", "--until", "64", "--steps", "1", "--quiet"]
    done = processes.cascade(*words, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


def test_how_a_picture_comes_about_is_shown(fake, tmp_path, capsys):
    words = ("red circle", "--steps", "4,3,2", "--out", str(tmp_path))
    sample(*words, "--path", "gif")
    sample(*words, "--path", "strip")
    shown = [json.loads(line)["files"]["path"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [str(tmp_path / "0000.gif"), str(tmp_path / "0001_path.png")]
    with Image.open(shown[0]) as moving:
        assert moving.n_frames == 4 + 3 + 2 and moving.size == (32, 32)
        moving.seek(moving.n_frames - 1)
        last = np.asarray(moving.convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "0000_32.png")).astype(int)
    assert np.abs(last - drawn).mean() < 12  # in 256 colours
    strip = np.asarray(Image.open(shown[1]))
    assert strip.shape == (3 * 32 + 2 * 2, 8 * 32 + 7 * 2, 3)
    np.testing.assert_array_equal(strip[68:, 34:66], drawn)  # second step of the last row
    assert (strip[68:, 66:] == 255).all()


def test_a_sheet_of_several_prompts_keeps_each_ones_pictures_in_a_row(fake, tmp_path):
    sample("red circle", "blue square", "--num", "3", "--until", "16", "--out", str(tmp_path))
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    own = [np.asarray(Image.open(tmp_path / f"000{i}_16.png")) for i in range(6)]
    height = (len(sheet) - 8) // 2
    assert sheet.shape[1] == 3 * 16 + 2 * 2 and len(sheet) == 2 * height + 8
    for i, picture in enumerate(own):
        y, x = (i // 3) * (height + 8), (i % 3) * 18
        np.testing.assert_array_equal(sheet[y : y + 16, x : x + 16], picture)
    below = [sheet[y + 16 : y + height] for y in (0, height + 8)]
    assert all((text < 128).any() for text in below)
    assert not np.array_equal(*below)  # each its own words


def test_lowres_starts_from_a_picture(fake, tmp_path):
    sample("red circle", "--out", str(tmp_path))
    sample("red circle", "--out", str(tmp_path), "--lowres", str(tmp_path / "0000_16.png"))
    again, first = (np.asarray(Image.open(tmp_path / f"000{i}_32.png")) for i in (1, 0))
    assert np.array_equal(again, first)
    assert not (tmp_path / "0001_8.png").exists()


def test_a_picture_of_any_shape_is_fitted_before_stages_are_chosen_for_it(fake, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="30x20"):
        sample("red", "--lowres", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "0000_32.png").exists()


def test_a_random_seed_leaves_room_for_all_its_pictures(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("secrets.randbelow", lambda below: below - 1)
    sample("a", "--num", "2", "--until", "8", "--out", str(tmp_path), "--random-seed")
    seeds = [json.loads(line)["seed"] for line in capsys.readouterr().out.splitlines()]
    assert seeds == [2**32 - 2, 2**32 - 1]


def test_a_long_prompt_is_cut_with_a_warning(fake, tmp_path):
    with pytest.warns(UserWarning, match="longer than 12 tokens"):
        sample("red " * 2500, "--until", "8", "--out", str(tmp_path))
    assert (tmp_path / "0000_8.png").exists()


def test_the_options_of_sample_are_listed_without_jax():
    code = """
import sys
from cascade import cli
try:
    cli.main(["sample", "--help"])
finally:
    print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--init-image" in done.stdout


def test_the_words_reach_what_loads_and_what_draws(tmp_path, monkeypatch, capsys):
    loaded, drawn, draw = {}, {}, Cascade.draw

    def load(cls, name, **options):
        loaded.update(options, model=name)
        cascade = testing.cascade()
        cascade.known_words = frozenset({"red"})
        return cascade

    monkeypatch.setattr(Cascade, "load", classmethod(load))
    monkeypatch.setattr(
        Cascade, "draw", lambda self, *a, **k: drawn.update(k) or draw(self, *a, **k)
    )
    words = "--model m --seed 7 --num 2 --negative blue --split-rows 2 --batch-size 2 --until 16"
    words += " --dtype bfloat16 --t5-int8 --offload --text-encoder e --steps 1"
    with pytest.warns(UserWarning, match="trained on: frog") as warned:
        sample("red frog", *words.split(), "--out", str(tmp_path))
    assert len(warned) == 1
    assert loaded == {
        "model": "m",
        "dtype": "bfloat16",
        "t5_int8": True,
        "offload": True,
        "text_encoder": "e",
    }
    expected = {
        "seed": 7,
        "num": 2,
        "negative": "blue",
        "split_rows": 2,
        "batch_size": 2,
        "until": 16,
    }
    assert {name: drawn[name] for name in expected} == expected
    assert [s.steps for s in drawn["settings"]] == [1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [7, 8]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--steps", "4,5"], "--steps 4,5: 2 values for 3 stages (base8, sr16, sr32); give one"),
        (["--aug-level", "2"], "--aug-level 2: must be in [0, 1], got 2.0"),
        (["--rescale", "x"], "--rescale x: must be a number, such as 0.5, got 'x'"),
        (["--sampler", "ddim:3"], "--sampler ddim:3: eta must be in [0, 1], got 3.0"),
        (
            ["--split-rows", "9"],
            "--split-rows 9: must be 1, or up to the number of devices here, 8",
        ),
        (["--split-rows", "3"], "--split-rows 3: must divide the 16 rows of sr16's pictures"),
        (["--until", "64"], "--until 64: this model draws 8, 16, 32 px"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
    ],
)
def test_errors_call_options_as_they_are_typed(fake, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    words = ["sample", "a", *words, "--out", str(out), "--no-compilation-cache"]
    assert fails(capsys, *words).startswith(f"error: {message}")
    assert not out.exists()


def test_warnings_are_lines_before_the_bar(tmp_path):
    """In a process of its own: pytest collects warnings that a person would see."""
    words = ["sample", "red frog", "a frog", "--until", "64", "--steps", "1"]
    done = processes.cascade(*words, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *others = done.stderr.splitlines()
    assert first == "warning: not in the captions that scenes was trained on: frog"
    assert not any("warning" in line for line in others)
