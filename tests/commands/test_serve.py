"""The words of `cascade serve`, and what it says when it cannot begin."""

import os
import socket
import subprocess
import sys

import pytest
from test_sample import fails

from cascade import testing
from cascade.runner.cascade import Cascade


def test_a_port_that_is_taken_is_told_with_the_way_out(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = fails(capsys, "serve", "--port", port)
    assert said == (
        f"error: --port {port}: is in use by another program; end that, or give another port, "
        "such as 7861"
    )


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--port", "x"], "--port must be a whole number, got 'x'"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1: is no address of this machine"),
        (["--host", "no such host"], "--host no such host: is no address of this machine"),
        (["--model", ""], "--model is empty"),
        (["--modle", "x"], "--modle"),
    ],
)
def test_bad_words_are_one_line(capsys, argv, message):
    assert message in fails(capsys, "serve", *argv)


def test_a_model_that_is_missing_or_only_enlarges_is_one_line(capsys, monkeypatch):
    pytest.importorskip("gradio")
    before = dict(os.environ)
    assert "model no/such: no such folder" in fails(
        capsys, "serve", "--port", "0", "--model", "no/such"
    )
    whole = testing.cascade()
    above = Cascade(whole.stages[1:], whole.encoder, name="above")
    monkeypatch.setattr(Cascade, "load", classmethod(lambda cls, *a, **k: above))
    said = fails(capsys, "serve", "--port", "0")
    assert "model above only enlarges pictures, and the page draws from text" in said
    assert dict(os.environ) == before


def test_without_gradio_it_says_what_to_install():
    code = """
import sys
sys.modules["gradio"] = None
from cascade import cli
cli.main(["serve", "--port", "0"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "error: the page in the browser needs gradio; pip install 'cascade-diffusion[page]'\n"
    )


def test_help_needs_neither_gradio_nor_jax():
    code = """
import sys
from cascade import cli
try:
    cli.main(["serve", "--help"])
except SystemExit:
    pass
assert not {"jax", "gradio"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
