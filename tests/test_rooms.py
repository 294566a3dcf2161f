"""The house plan: which room may import which. Reads the source; imports nothing of it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cascade"
BELOW = {
    "ranges": set(),
    "errors": {"ranges"},
    "config": {"errors", "ranges"},
    "devices": {"errors"},
    "diffusion": {"ranges"},
    "models": {"ranges"},
    "storage": {"config", "errors", "models"},
    "images": {"errors", "storage"},
    "text": {"config", "errors", "models", "storage"},
    "data": {"config", "devices", "errors", "images", "storage", "text"},
    "stage": {"diffusion", "images", "models", "ranges"},
    "published": {
        *("config", "diffusion", "errors", "models", "ranges", "stage", "storage", "text"),
    },
    "runner": {
        *("config", "devices", "diffusion", "errors", "images", "models", "published", "ranges"),
        *("stage", "storage", "text"),
    },
    "training": {
        *("config", "data", "devices", "diffusion", "errors", "images", "models", "published"),
        *("ranges", "runner", "stage", "storage", "text"),
    },
    "scenes": {
        *("config", "data", "devices", "errors", "images", "models", "ranges", "storage", "text"),
        "training",
    },
    "planning": {
        *("devices", "errors", "models", "runner", "stage", "storage", "text", "training"),
    },
    "evaluation": {
        *("config", "data", "devices", "diffusion", "errors", "images", "models", "published"),
        *("runner", "scenes", "stage", "storage", "text", "training"),
    },
    "testing": {"diffusion", "models", "runner", "stage", "text"},
}
# What is built upon them. Only the commands ask what tasks there are; nothing asks the commands.
APPLICATIONS = set(BELOW) - {"testing"}
PLAN = BELOW | {
    "tasks": APPLICATIONS,
    "commands": APPLICATIONS | {"tasks"},
    "cli": {"config", "errors"},
    "__init__": {"runner"},
    "__main__": {"cli"},
}
PUBLIC = r"IFUNetConfig|UpscalerUNetConfig|deepfloyd"
"""What only those may name who read public weights."""


def modules_of_ours(file: Path) -> set[str]:
    """What a file imports of cascade, wherever in it the import stands: names with dots."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.startswith("cascade.")}
    return found


def rooms_of(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules}


def rooms() -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in ROOT.rglob("*.py"):
        files.setdefault(file.relative_to(ROOT).parts[0].removesuffix(".py"), []).append(file)
    return files


def tasks() -> dict[str, list[Path]]:
    """The files of each task."""
    found: dict[str, list[Path]] = {}
    for file in rooms()["tasks"]:
        name = file.relative_to(ROOT / "tasks").parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(file)
    return found


VERBS = {"restore"}
"""Tasks whose names are words for what is done elsewhere too: checkpoints are restored."""


def test_every_room_is_on_the_plan():
    assert set(rooms()) == set(PLAN)


def test_modules_are_imported_by_name():
    """So that the plan sees them: the package is not imported whole, nor what a string names."""
    names = ("cli.py", "config.py", "tasks/__init__.py", "text/captions.py")
    by_string = {ROOT / name for name in names}
    for file in ROOT.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*import cascade( as .*)?$", text, re.MULTILINE), file
        assert file in by_string or not re.search(r"import_module|__import__", text), file


def test_the_plan_has_an_up_and_a_down():
    """No room is above itself."""
    list(graphlib.TopologicalSorter(PLAN).static_order())


@pytest.mark.parametrize("room", sorted(PLAN))
def test_imports_point_down_only(room):
    for file in rooms()[room]:
        above = rooms_of(modules_of_ours(file)) - PLAN[room] - {room}
        assert not above, f"{file.relative_to(ROOT.parent)} imports {above}"


def test_the_plan_allows_nothing_that_no_one_needs():
    """The rooms that should know least import exactly what they may."""
    for room in ("cli", "diffusion", "models", "published", "stage", "training"):
        modules = {name for file in rooms()[room] for name in modules_of_ours(file)}
        assert rooms_of(modules) - {room} == PLAN[room], room


def test_public_weights_are_met_in_three_places_alone():
    """Who draws and who trains know what pipelines there are, by what lists of steps they are
    sampled, what a CLIP's folder is, and what earlier versions wrote."""
    doors = {
        f"cascade.published.{name}"
        for name in ("clip", "earlier_versions", "pipelines", "schedulers")
    }
    for room in ("runner", "training"):
        modules = {name for file in rooms()[room] for name in modules_of_ours(file)}
        for name in modules:
            if name.startswith("cascade.published"):
                assert any(f"{name}.".startswith(f"{door}.") for door in doors), (room, name)


def test_a_task_imports_no_other_and_nothing_names_it():
    for name, files in tasks().items():
        for file in files:
            for module in modules_of_ours(file):
                if module.startswith("cascade.tasks"):
                    assert f"{module}.".startswith(f"cascade.tasks.{name}."), (file, module)
        word = rf"\b{name}\b"
        if name in VERBS:  # only as a string, a path or a command does it name the task
            word = rf"[\"']{name}[\"']|[./]{name}\b(?!\()|cascade {name}\b"
        for file in ROOT.rglob("*.py"):
            if file not in files:
                named = re.search(word, file.read_text())
                assert not named, f"{file.relative_to(ROOT.parent)} names the task {name}"


def test_public_weights_are_named_only_where_they_are_read():
    """In code, comments, help texts or files that ship."""
    allowed = {ROOT / "commands" / "bench.py", ROOT / "commands" / "convert.py"}
    for file in ROOT.rglob("*"):
        if file.suffix in (".py", ".json", ".md") and ROOT / "published" not in file.parents:
            named = re.search(PUBLIC, file.read_text())
            assert not named or file in allowed, f"{file.relative_to(ROOT.parent)}: {named}"


def test_no_file_is_longer_than_600_lines_and_few_lie_at_the_top():
    for file in (*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py")):
        assert len(file.read_text().splitlines()) <= 600, file
    assert len(list(ROOT.glob("*.py"))) <= 8
