"""What the soak of launch/ counts as lost, hung or told badly is that; a clean command is none."""

import subprocess
import sys

import pytest
import soak
from soak import Soak

GOOD = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(exist_ok=True); "
GOOD += "pathlib.Path(sys.argv[1], 'file').write_text('whole')"


class Trial(Soak):
    """A soak of one command, which is Python code that makes a folder with a file."""

    code = GOOD

    def cascade(self, what, out, compiled=True):
        return self.start([sys.executable, "-c", self.code, out])

    def bits_of(self, what, out):
        return (out / "file").read_text()


@pytest.fixture
def trial(tmp_path):
    made = Trial(tmp_path / "soak", 0)
    made.seconds, made.bits = {"data": 0.3}, {"data": "whole"}
    return made


def faults(trial):
    return {kind: trial.counts[kind] for kind in ("lost", "tracebacks", "hangs")}


def test_a_command_that_loses_nothing_counts_as_that(trial):
    trial.killed("data", 3)
    assert faults(trial) == {"lost": 0, "tracebacks": 0, "hangs": 0}


@pytest.mark.parametrize(
    "code,kind",
    [
        (GOOD.replace("'whole'", "'half'"), "lost"),
        ("raise SystemExit(3)", "lost"),
        (GOOD + "; import warnings, sys; print('Traceback', file=sys.stderr)", "tracebacks"),
        (GOOD + "; import time; time.sleep(60)", "hangs"),
    ],
)
def test_a_command_that_does_not_end_as_it_should_is_counted(trial, monkeypatch, code, kind):
    monkeypatch.setattr(soak, "HANGS", 5.0)
    trial.code = code
    trial.whole("data", trial.folder / "x")
    if (trial.folder / "x").exists():
        trial.compare("data", trial.folder / "x")
    assert trial.counts[kind] == 1 and trial.told


def test_a_refused_mutation_is_none_and_a_failed_one_is_counted(trial, monkeypatch):
    for failed in ([], ["case 1"]):
        done = subprocess.CompletedProcess([], 0, stdout=f"{[failed, 9]}\n".replace("'", '"'))
        monkeypatch.setattr(soak.subprocess, "run", lambda *a, done=done, **k: done)
        trial.mutate(1)
        assert trial.counts["tracebacks"] == len(failed)
    assert trial.counts["mutations"] == 2 * soak.CASES


def test_the_script_says_what_it_takes_and_refuses_the_rest():
    def script(*words):
        return subprocess.run(["bash", "launch/soak.sh", *words], capture_output=True, text=True)

    assert "--minutes" in script("--help").stdout
    refused = script("x", "--minutes", "many")
    assert refused.returncode == 2 and "--minutes must be a number" in refused.stderr
    assert "no option '--hours'" in script("x", "--hours", "2").stderr
