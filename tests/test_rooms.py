"""The house plan: which room may import which. Reads the source; imports nothing of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cascade"
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "devices": {"errors"},
    "diffusion": set(),
    "models": {"errors"},
    "storage": {"config", "errors", "models"},
    "images": {"errors", "storage"},
    "text": {"config", "errors", "models", "storage"},
    "data": {"config", "errors", "images", "storage", "text"},
    "scenes": {"config", "data", "errors", "images", "models", "storage", "text"},
    "stage": {"diffusion", "images", "models", "published"},
    "published": {
        *("config", "diffusion", "errors", "models", "runner", "stage", "storage", "text"),
    },
    "runner": {
        *("config", "devices", "errors", "images", "models", "published", "stage", "storage"),
        "text",
    },
    "training": {
        *("config", "data", "devices", "errors", "images", "models", "published", "runner"),
        *("stage", "storage", "text"),
    },
    "planning": {
        *("devices", "errors", "models", "published", "runner", "stage", "storage", "text"),
        "training",
    },
    "evaluation": {
        *("data", "diffusion", "errors", "images", "models", "runner", "scenes", "stage"),
        *("storage", "text", "training"),
    },
    "testing": {"diffusion", "models", "runner", "stage", "text"},
}
DOORS = {"cli", "commands", "tasks", "__init__", "__main__"}


def imports_of_ours(file: Path) -> set[str]:
    """Rooms that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [
                f"{node.module}.{a.name}" if node.module == "cascade" else node.module
                for a in node.names
            ]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n and n.startswith("cascade.")}
    return found


def rooms() -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in ROOT.rglob("*.py"):
        files.setdefault(file.relative_to(ROOT).parts[0].removesuffix(".py"), []).append(file)
    return files


def test_every_room_is_on_the_plan():
    assert set(rooms()) == set(BELOW) | DOORS


@pytest.mark.parametrize("room", sorted(BELOW))
def test_imports_point_down_only(room):
    for file in rooms()[room]:
        above = imports_of_ours(file) - BELOW[room] - {room}
        assert not above, f"{file.relative_to(ROOT.parent)} imports {above}"
