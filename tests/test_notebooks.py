"""The notebooks run from their first cell to their last, and show what they say they show."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).parent.parent / "launch" / "colab"
SHORT = {
    "first_picture": "tiny_images, num, until = 32, 1, 64",
    "own_cascade": """
runs, configs = "runs", "tiny"
words = "--images 8 --batch-size 4 --preview-every-images 0"
""",
}


@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_notebook_runs_from_the_first_cell_to_the_last(name, tmp_path, monkeypatch):
    # One device, not the eight that the other tests simulate.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source += "\n" + SHORT[name]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) >= {"first_picture": 9, "own_cascade": 4}[name]
    # `!` lines do not raise: what they run says that it is done.
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert "error:" not in text and text.count("done: ") >= (3 if name == "own_cascade" else 0)


def pictures(notebook) -> int:
    outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
    return sum("image/png" in o.get("data", ()) for o in outputs)
