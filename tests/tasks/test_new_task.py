"""A new application is written outside of the package: no file of cascade/ knows it, and nothing
registers it. Its module (`points.py`, beside this file) has a network, a condition that gives
channels and one that gives a vector, a space of points of the plane, a steering and a job."""

import json
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

HERE = Path(__file__).parent
CONFIG = """
from points import Angle, Centre, PerceptronConfig, Plane, Points

from cascade.diffusion.denoise import Threshold
from cascade.stage import Sampling, StageConfig
from cascade.training.job import Optimizer


def config():
    return Points(
        stage=StageConfig(
            name="points",
            space=Plane(),
            conditions=(Centre(), Angle()),
            network=PerceptronConfig(),
            sampling=Sampling(steps=8, guidance=1.0, threshold=Threshold(kind="none")),
        ),
        images=256_000,
        batch_size=256,
        optimizer=Optimizer(learning_rate=5e-3, cooldown_images=128_000),
        ema_decay=0.99,
        log_every_images=25_600,
        save_every_images=128_000,
        preview_every_images=0,
    )
"""


def cascade(folder, *words):
    """The command line in a process of its own, which has imported nothing of the task."""
    return processes.cascade(*words, cwd=folder)


def done(folder, *words):
    ended = cascade(folder, *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the task's module, its config, a run that was stopped half-way and went on, and what
    was exported of it."""
    folder = tmp_path_factory.mktemp("task")
    shutil.copy(HERE / "points.py", folder)
    (folder / "config.py").write_text(CONFIG)
    run = ("train", "config.py", "--workdir", "run", "--trust", "points")
    done(folder, *run, "--until", 128_000)
    done(folder, *run)
    done(folder, "export", "run", "model", "--trust", "points")
    return folder


def test_it_trains_and_goes_on_where_it_was_stopped(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert [row["images"] for row in rows] == list(range(25_600, 256_001, 25_600))
    assert rows[-1]["loss"] < rows[0]["loss"] / 10


def lit(folder, out):
    """(y, x) of the white pixel of each picture."""
    files = sorted((folder / out).glob("*_8.png"))
    found = [np.argwhere(np.asarray(Image.open(file))[..., 0] == 255) for file in files]
    assert all(len(where) == 1 for where in found)
    return [tuple(where[0].tolist()) for where in found]


def test_the_command_line_draws_what_channels_and_vector_tell(folder):
    # The middle of the picture's pixel (i, j) is the point ((j + .5) / 4 - 1, (i + .5) / 4 - 1).
    prompts = ("0.125 0.125 90", "0.125 0.125 180", "-0.375 0.125 90")
    said = done(folder, "sample", *prompts, "--model", "model", "--out", "out", "--trust", "points")
    assert [json.loads(line)["prompt"] for line in said.splitlines()] == list(prompts)
    assert lit(folder, "out") == [(6, 4), (4, 2), (6, 2)]


def test_its_steering_is_an_option_of_the_command_line(folder):
    words = ("sample", "0.125 0.125 90", "--model", "model", "--trust", "points")
    done(folder, *words, "--out", "kept", "--below", 0.125)
    assert lit(folder, "kept") == [(4, 4)]
    assert json.loads((folder / "kept" / "0000.json").read_text())["below"] == 0.125


@pytest.mark.parametrize(
    "words",
    [
        ("export", "run", "other"),
        ("sample", "0 0 0", "--model", "model", "--out", "refused"),
    ],
)
def test_without_trust_its_files_are_refused_and_its_module_is_not_imported(folder, words):
    (folder / "points.py").write_text(
        (HERE / "points.py").read_text() + '\nopen("IMPORTED", "w").close()\n'
    )
    ended = cascade(folder, *words)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "--trust points" in ended.stderr
    assert not (folder / "IMPORTED").exists()
    assert not (folder / words[-1]).exists()


def test_a_module_that_is_not_there_is_told_in_a_line(folder):
    ended = cascade(folder, "sample", "0 0 0", "--model", "model", "--trust", "pionts")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --trust pionts:") and ended.stderr.count("\n") == 1
