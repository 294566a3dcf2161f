"""Notebooks of launch/colab, executed from the first cell to the last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from processes import ONE_DEVICE

COLAB = Path(__file__).parent.parent / "launch" / "colab"


def executed(name: str, parameters: str, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder` with these parameters; errors raise."""
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source += "\n" + parameters
    resources = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XLA_FLAGS", ONE_DEVICE)
        return NotebookClient(notebook, timeout=900, resources=resources).execute()


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
    return sum("image/png" in o.get("data", ()) for o in outputs)
