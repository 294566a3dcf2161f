"""Configs that are not what they should be, in Python or in JSON: one line that names the field."""

import processes
import pytest

from cascade import config, testing
from cascade.commands.train import read_job
from cascade.errors import UserError
from cascade.stage import Sampling, StageConfig, Text

HEAD = """
import dataclasses
from cascade import testing
from cascade.scenes.dataset import ScenesData
from cascade.training.stage_training import StageTraining

def config():
    stage = testing.base_stage()
    data = ScenesData()
"""


def job_of(tmp_path, body):
    file = tmp_path / "config.py"
    file.write_text(HEAD + "".join(f"    {line}\n" for line in body.splitlines()))
    return read_job(str(file), [], prog="cascade train")


RETURN = "return StageTraining(stage=stage, data=data, images=8, batch_size=8)"


def test_a_json_file_is_read_up_to_a_limit(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("[" + " " * 98 + "]")
    monkeypatch.setattr(config, "MOST_JSON", 100)
    assert config.read_json(file) == []
    file.write_text("[" + " " * 99 + "]")
    with pytest.raises(UserError, match="a.json: has more than the 100 bytes"):
        config.read_json(file)


def test_the_config_is_a_job_as_it_stands(tmp_path):
    assert job_of(tmp_path, RETURN).stage == testing.base_stage()


@pytest.mark.parametrize(
    "line,message",
    [
        ("raise RuntimeError('no')", r"line \d+: RuntimeError: no"),
        ("raise OSError('x')", r"line \d+: OSError: x"),
        ("assert stage is None", r"line \d+: AssertionError"),
        ("raise SystemExit", r"line \d+: SystemExit"),
        ("return config()", r"line \d+: RecursionError"),
    ],
)
def test_a_config_file_that_is_wrong_is_told_in_a_line(tmp_path, line, message):
    with pytest.raises(UserError, match=rf"^config .*config.py.*{message}"):
        job_of(tmp_path, f"{line}\n{RETURN}")


@pytest.mark.parametrize(
    "line,message",
    [
        ("data = 'pictures'", "data must be a Data, got 'pictures'"),
        ("stage = dataclasses.replace(stage, prediction='x1')", "prediction must be one of"),
        ("data = ScenesData(split='train', seed=1.5)", "seed must be int, got 1.5"),
    ],
)
def test_values_of_another_type_are_told_by_their_field(tmp_path, line, message):
    """In a process of its own: the tests' check every call already."""
    file = tmp_path / "config.py"
    file.write_text(HEAD + f"    {line}\n    {RETURN}\n")
    words = ("train", file, "--workdir", tmp_path / "run")
    done = processes.cascade(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: config {file}") and message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "path,value,message",
    [
        (("conditions",), [{}], r"config.conditions\[0\] must have a type, .* a kind of Condition"),
        (("network",), {}, "config.network must have a type, .* a kind of NetworkConfig"),
        (("space",), {}, "config.space must have a type, .* a kind of Space"),
        (("sampling", "guidance"), 10**400, "guidance must be a float, got a number of 1329 bits"),
        (("sampling", "steps"), 10**12, "Sampling.steps must be at most 10000"),
        (("sampling", "steps"), 10**400, r"steps must be below 2\^63, got a number of 1329 bits"),
        (("sampling", "steps"), 1.5, "steps must be int, got 1.5"),
        (("sampling",), [], "config.sampling must be a Sampling"),
    ],
)
def test_json_that_is_wrong_is_told_by_its_field(path, value, message):
    told = config.to_json(testing.base_stage())
    *to, last = path
    inner = told
    for name in to:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(UserError, match=message):
        config.from_json(StageConfig, told)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "", "NaN]"])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        config.read_json(file)


@pytest.mark.parametrize("name", ["width", "head_width", "context_width"])
def test_widths_of_a_text_are_positive(name):
    with pytest.raises(ValueError, match=f"Text.{name} must be at least 1, got 0"):
        Text(**{"width": 8, name: 0})


def test_steps_are_bounded():
    assert Sampling(steps=10_000).steps == 10_000
    with pytest.raises(ValueError, match="Sampling.steps must be at most 10000, got 10001"):
        Sampling(steps=10_001)
