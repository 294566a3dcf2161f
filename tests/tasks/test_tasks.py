"""Tasks are found by lying in cascade/tasks: dropped in and deleted, on copies of the package."""

import dataclasses
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cascade as package
from cascade import cli, tasks, testing
from cascade.commands import sample as sample_command
from cascade.images import load_image
from cascade.runner.cascade import Cascade
from cascade.stage import Start, Steering

COLOURING = '''"""Colour pictures in.

The second line is none of the help's.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What colouring adds."""

    ink: str = "blue"
    """With which ink."""


def main(argv):
    print("coloured", *argv)
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, without what ships with it."""
    return copied(tmp_path)


def copied(folder):
    ignored = shutil.ignore_patterns("__pycache__", "pretrained")
    return shutil.copytree(Path(package.__file__).parent, folder / "cascade", ignore=ignored)


def run(copy, *words):
    """`python -m cascade WORDS` of a copy: what it prints."""
    command = [sys.executable, "-m", "cascade", *words]
    done = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", ["colouring.py", "colouring/__init__.py"])
def test_a_file_or_folder_that_is_dropped_in_is_a_verb_and_adds_options(copy, place):
    file = copy / "tasks" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(COLOURING)
    lines = run(copy, "--help").splitlines()
    assert "  colouring colour pictures in" in lines
    assert lines.index("  colouring colour pictures in") > lines.index(
        next(line for line in lines if line.startswith("  bench "))
    )
    assert run(copy, "colouring", "a", "--b") == "coloured a --b\n"
    shown = run(copy, "sample", "--help")
    assert "--ink STR" in shown and "With which ink. (default: blue)" in " ".join(shown.split())
    assert "--init-image FILE" in shown and "--colouring" not in shown


TASKS = sorted(found.name for found in pkgutil.iter_modules(tasks.__path__))


def flags(options):
    """The words that a task adds to `cascade sample`, as its help names them."""
    return {f"--{field.name.replace('_', '-')} " for field in dataclasses.fields(options)}


@pytest.fixture(scope="module")
def help_of_sample(tmp_path_factory):
    """What `cascade sample --help` prints where every task is there."""
    return run(copied(tmp_path_factory.mktemp("all")), "sample", "--help")


@pytest.mark.parametrize("task", TASKS)
def test_without_a_task_nothing_else_is_missed(copy, help_of_sample, task):
    module = importlib.import_module(f"cascade.tasks.{task}")
    own = flags(module.SampleOptions) if hasattr(module, "SampleOptions") else set()
    others = [importlib.import_module(f"cascade.tasks.{t}") for t in TASKS if t != task]
    left = {f for m in others if hasattr(m, "SampleOptions") for f in flags(m.SampleOptions)}
    assert all(flag in help_of_sample for flag in own | left)
    for place in (copy / "tasks" / f"{task}.py", copy / "tasks" / task):
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            place.unlink()
    after = run(copy, "sample", "--help")
    assert not any(flag in after for flag in own)
    assert all(flag in after for flag in {*left, "--guidance "})
    verb = [line for line in cli.usage().splitlines() if line.startswith(f"  {task} ")]
    assert run(copy, "--help").splitlines() == [
        line for line in cli.usage().splitlines() if line not in verb
    ]
    script = """
import sys
from cascade import cli, testing
from cascade.runner.cascade import Cascade
from cascade.stage import Stage

stage = Stage(testing.smallest_stage())
model = Cascade([(stage, testing.lively(stage))], testing.FakeEncoder())
Cascade.load = classmethod(lambda cls, *a, **k: model)
cli.main(["sample", "a", "--steps", "1", "--no-compilation-cache"])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((copy.parent / "samples" / "0000.json").read_text())
    assert record["prompt"] == "a" and ("edited" in record) == (task != "edit")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grey(Steering):
    def start(self, noise, schedule, times):
        return Start(noise, times, lambda x, logsnr, keys: jnp.zeros_like(x))


def adding(flag, steers):
    """The options of a task with one flag, which steers the stages of that name."""

    def steering(self, stages, every, settings):
        asked.append(([s.name for s in stages], [s.name for s in every], len(settings)))
        on = getattr(self, flag)
        return [Grey() if on and stage.name == steers else None for stage in stages]

    def record(self, stages, steering):
        return {flag: [s.name for s, own in zip(stages, steering, strict=True) if own]}

    asked: list = []
    methods = {"steering": steering, "record": record}
    fields = [(flag, bool, dataclasses.field(default=False))]
    made = dataclasses.make_dataclass(
        "SampleOptions", fields, namespace=methods, frozen=True, kw_only=True
    )
    return made, asked


@pytest.fixture
def two_tasks(monkeypatch):
    """Two tasks that both can steer the first stage."""
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: testing.cascade()))
    (one, asked), (two, _) = adding("grey", "base8"), adding("plain", "base8")
    monkeypatch.setattr(sample_command, "that_have", lambda name: {"one": one, "two": two})
    return asked


def test_the_options_of_a_task_steer_what_is_drawn_and_are_recorded(two_tasks, tmp_path, capsys):
    words = ["a", "--until", "16", "--steps", "1", "--no-compilation-cache", "--out"]
    cli.main(["sample", *words, str(tmp_path), "--grey"])
    cli.main(["sample", *words, str(tmp_path)])
    first, second = (json.loads((tmp_path / f"000{i}.json").read_text()) for i in (0, 1))
    assert (first["grey"], first["plain"]) == (["base8"], [])
    assert (second["grey"], second["plain"]) == ([], [])
    drawn, plain = (np.asarray(load_image(tmp_path / f"000{i}_8.png")) for i in (0, 1))
    assert (drawn == 128).all() and not (plain == 128).all()
    assert two_tasks[0] == (["base8", "sr16"], ["base8", "sr16", "sr32"], 2)


def test_two_tasks_that_steer_one_stage_are_refused(two_tasks, tmp_path, capsys):
    words = ["a", "--until", "8", "--grey", "--plain", "--no-compilation-cache", "--out"]
    with pytest.raises(SystemExit):
        cli.main(["sample", *words, str(tmp_path / "out")])
    assert "two of the options steer the same stage" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
