"""The road of a newcomer, through the console command, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from notebooks import executed, pictures
from PIL import Image
from processes import ONE_DEVICE

ROOT = Path(__file__).parent.parent
SMALL = ["--batch-size", "4", "--log-every-images", "8", "--preview-every-images", "0"]
# Few images are to move the weights: an untrained network that predicts x0 draws plain gray.
SMALL += ["--optimizer.warmup-images", "0", "--optimizer.cooldown-images", "0"]


def cascade(*argv, check=True):
    done = processes.cascade(*argv, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr
    return done


def finished(checkpoints: Path) -> list[int]:
    """Steps whose checkpoint is complete; one that is being written has another name."""
    return [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of three tiny stages, and the notebook that trained them, executed.

    The notebook finds a base that was killed while it trained, and goes on with it.
    """
    folder = tmp_path_factory.mktemp("runs")
    base = ["train", "configs/tiny/base64.py", "--workdir", str(folder / "base64"), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade", *base, "--save-every-images", "8", "--images", "100000"],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE},
    )
    saved = folder / "base64" / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not finished(saved):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = max(finished(saved))
    assert step >= 2
    words = " ".join([*SMALL, "--images", str(4 * (step + 4))])
    ours = f'runs, configs, words = "{folder}", "tiny", "{words}"'
    return folder, executed("own_cascade", ours, folder), 4 * (step + 4)


@pytest.fixture(scope="module")
def runs(own):
    return own[0]


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "tiny"
    done = cascade("export", runs / "sr256", runs / "base64", runs / "sr1024", out)
    assert json.loads(done.stdout)["stages"] == ["base64", "sr256", "sr1024"]
    return out


def test_the_notebook_goes_on_with_a_killed_run_and_draws(own):
    folder, notebook, total = own
    assert pictures(notebook) == 4
    # `!` lines do not raise: what they run says that it is done.
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert "error:" not in text and text.count("done: ") >= 3
    rows = [json.loads(x) for x in (folder / "base64/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == total
    assert [r["images"] for r in rows] == sorted({r["images"] for r in rows})


def test_train_kill_resume_export_sample(model, tmp_path):
    done = cascade("sample", "a red circle", "--model", model, "--out", tmp_path)
    for side in (64, 256, 1024):
        with Image.open(tmp_path / f"0000_{side}.png") as image:
            assert image.size == (side, side)
            assert np.asarray(image).std() > 0
    record = json.loads((tmp_path / "0000.json").read_text())
    assert record["stages"]["sr1024"]["steps"] == 3 and len(record["model_sha256"]) == 64
    assert json.loads(done.stdout)["files"]["64"] == str(tmp_path / "0000_64.png")


def test_exporting_twice_is_refused(runs, model):
    done = cascade("export", runs / "base64", model, check=False)
    assert done.returncode == 2 and "exists already" in done.stderr


def test_a_damaged_checkpoint_is_a_warning_of_one_line(runs, tmp_path):
    run = shutil.copytree(runs / "base64", tmp_path / "run")
    newest = max(finished(run / "checkpoints"))
    for file in (run / "checkpoints" / str(newest)).rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    done = cascade("export", run, tmp_path / "model")
    (said,) = [line for line in done.stderr.splitlines() if "cannot be read" in line]
    assert said.startswith(f"warning: checkpoint {run / 'checkpoints' / str(newest)} ")
    assert "checkpoint.py" not in done.stderr


def test_stages_that_do_not_meet_make_no_model(runs, tmp_path):
    done = cascade("export", runs / "base64", runs / "sr1024", tmp_path / "m", check=False)
    assert done.returncode == 2 and "they make no cascade" in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_damaged_model_is_one_line(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    os.truncate(tmp_path / "m/base64/model.safetensors", 1000)
    done = cascade("sample", "a", "--model", tmp_path / "m", "--out", tmp_path / "o", check=False)
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    assert "model.safetensors: damaged" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "words,message",
    [
        (["configs/tiny/none.py", "--workdir", "{tmp}/w"], "no such file"),
        (["configs/tiny/base64.py"], "--workdir DIR is missing"),
        (["configs/tiny/base64.py", "--workdir", "setup.cfg/w"], "cannot be made a folder"),
        (
            ["configs/tiny/base64.py", "--workdir", "{tmp}/w", "--imags", "3"],
            "did you mean --images",
        ),
        (["configs/tiny/base64.py", "--workdir", "{tmp}/w", "--mesh.data", "3"], "mesh data=3"),
        (
            ["configs/tiny/base64.py", "--workdir", "{tmp}/w", "--microbatches", "5"],
            "microbatches=5",
        ),
        (
            ["configs/tiny/base64.py", "--workdir", "{tmp}/w", "--text-encoder", "{tmp}"],
            "config.json",
        ),
    ],
)
def test_mistakes_in_training_are_one_line(words, message, tmp_path):
    done = cascade("train", *(w.format(tmp=tmp_path) for w in words), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "w").exists()


def test_a_terminated_run_saves_and_exits_as_one_that_was_stopped(tmp_path):
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    words = ["train", "configs/tiny/base64.py", "--workdir", str(tmp_path), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade", *words, "--save-every-images", "1000000"],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert len(finished(tmp_path / "checkpoints")) == 1
