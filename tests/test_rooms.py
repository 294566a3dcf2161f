"""The house plan: which room may import which. Reads the source; imports nothing of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cascade"
BELOW = {
    "errors": set(),
    "chips": set(),
    "flops": set(),
    "plan_hlo": set(),
    "xla_flags": set(),
    "paths": {"errors"},
    "distributed": {"errors", "xla_flags"},
    "training_log": {"chips", "errors", "paths"},
    "images": {"errors", "paths"},
    "config": {"errors"},
    "sharding": {"errors"},
    "ema": set(),
    "checkpoint": {"errors", "paths"},
    "diffusion": set(),
    "models": {"errors"},
    "text": {"errors", "models", "paths", "pretrained"},
    "data": {"errors", "images", "paths", "text", "config", "checkpoint"},
    "pretrained": {"config", "errors", "models", "paths"},
    "stage": {"diffusion", "images", "models"},
    "lora": set(),
    "schedulers": {"config", "diffusion", "errors"},
    "upscaler": {"config", "errors", "pretrained", "schedulers", "stage", "text"},
    "deepfloyd": {
        *("config", "diffusion", "errors", "models", "pretrained", "schedulers", "stage"),
        *("checkpoint", "text", "upscaler"),
    },
    "runner": {
        "deepfloyd",
        "stage",
        "text",
        "images",
        "checkpoint",
        "config",
        "errors",
        "models",
        "pretrained",
        "sharding",
    },
    "evaluation": {
        *("data", "runner", "stage", "text", "train"),
        *("checkpoint", "diffusion", "errors", "images", "models"),
    },
    "train": {
        *("data", "deepfloyd", "lora", "stage", "sharding", "checkpoint", "config"),
        *("ema", "errors", "flops", "images", "models", "paths", "pretrained", "text"),
        "training_log",
    },
    "text_pretraining": {"checkpoint", "config", "data", "errors", "models", "text", "train"},
    "testing": {"diffusion", "models", "stage", "text", "runner"},
}
DOORS = {
    "cli",
    "convert",
    "evaluate",
    "sample",
    "export",
    "bench",
    "bench_unet",
    "plan",
    "train_command",
    "__init__",
    "__main__",
}


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
