"""The console command: which verbs there are, and what it says without waiting for JAX."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cascade
from cascade import cli

FOLDER = Path(cascade.__file__).parent / "commands"
HELP = """\
usage: cascade VERB ...

Text to image by cascaded pixel diffusion.

  sample   draw pictures from prompts
  enlarge  enlarge a picture of any shape, tile by tile
  serve    draw pictures in the browser
  models   what ships, and what a model folder holds
  train    train a stage or a text encoder; the same command resumes
  export   collect trained stages into a model folder for `sample --model`
  convert  public weights (DeepFloyd IF, x4 upscaler) to a model folder
  eval     measure a model: facts right, sweeps, properties
  data     make, inspect, convert or embed a dataset
  plan     what a run needs on a TPU slice or GPUs that are not here
  bench    measure this machine: time to a picture, training speed
"""


def test_help_has_a_line_for_every_verb():
    lines = HELP.rstrip().splitlines()
    assert cli.usage().splitlines()[: len(lines)] == lines
    assert "\n\n`cascade VERB --help` shows what a verb takes" in cli.usage()


def test_the_verbs_are_the_files_of_commands_that_have_a_main():
    files = {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}
    files |= {file.parent.name for file in FOLDER.glob("*/__init__.py")}
    found = {n: told for n, told in cli.verbs().items() if not told[0].startswith("cascade.tasks.")}
    assert list(found) == list(cli.ORDER) and set(found) == files
    for name, (module, line) in found.items():
        imported = importlib.import_module(module)
        assert module == f"cascade.commands.{name}" and callable(imported.main)
        first = (imported.__doc__ or "").splitlines()[0]
        assert line.lower() == first.rstrip(".").lower() and line


def test_a_file_without_a_main_is_no_verb(tmp_path, monkeypatch):
    """Files are read, not imported."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    for room in ("commands", "tasks"):
        (tmp_path / room).mkdir()
    (tmp_path / "commands" / "draw.py").write_text(
        '"""Draw. Much."""\n\ndef main(argv):\n    1 / 0\n'
    )
    (tmp_path / "commands" / "helper.py").write_text("def mainly(argv): ...\n")
    (tmp_path / "tasks" / "acts.py").write_text(
        'raise SystemExit\n"""No."""\ndef main(argv): ...\n'
    )
    (tmp_path / "tasks" / "empty").mkdir()
    assert cli.verbs() == {
        "acts": ("cascade.tasks.acts", ""),
        "draw": ("cascade.commands.draw", "draw. Much"),
    }


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["--version"], ["smaple"]])
def test_what_the_command_says_of_itself_needs_no_jax(words):
    code = f"""
import sys
from cascade import cli
try:
    cli.main({words})
except SystemExit:
    pass
print(sorted(m for m in sys.modules if re.match("jax|flax|cascade.(commands|tasks|runner)", m)))
"""
    code = "import re\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert said == ([] if words == ["smaple"] else said) and "Traceback" not in done.stderr
    if words in (["--help"], ["-h"], []):
        assert "\n".join(said) == cli.usage()
    if words == ["--version"]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", said[0])


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["eval"], ["sample", "--help"]])
def test_a_closed_pipe_ends_it_as_sigpipe_does_and_without_a_word(words):
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "cascade", *words]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")
