"""Completion in the shell."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "words,found",
    [
        (("mo",), "models"),
        (("sample", "--ini"), "--init-image"),
        (("train", "configs/tiny/base64.py", "--optimizer.l"), "--optimizer.learning-rate"),
        (("data", "make", "--res"), "--resolution"),
        (("sample", "word"), ""),
        (("data", "ma"), "make"),
        (("eval", "sw"), "sweep"),
        (("sample", "word", "--dtype", "b"), "bfloat16"),
        (("train", "configs/tiny/base64.py", "--stage.prediction", ""), "eps x0 v"),
        (("sample", "--out", "RE"), ""),
    ],
)
def test_the_shell_completes_verbs_options_and_choices(words, found):
    script = f"""
    source launch/completion.bash
    cascade() {{ {sys.executable} -m cascade "$@"; }}
    COMP_WORDS=(cascade "$@"); COMP_CWORD=$#
    _cascade
    echo "${{COMPREPLY[*]}}"
    """
    run = ["bash", "-c", script, "bash", *words]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (found, "")
