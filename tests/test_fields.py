"""What the fields of configurations say of themselves, in the source and on the command line."""

import ast
import dataclasses
from pathlib import Path

import pytest

from cascade import config

ROOT = Path(__file__).parent.parent / "cascade"


def frozen_dataclasses():
    """(file and class, its ast) of every public frozen dataclass; nothing is imported."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(d) for d in node.decorator_list]
            if any("dataclass(" in d and "frozen=True" in d for d in decorators):
                yield f"{file.relative_to(ROOT.parent)} {node.name}", node


def fields(cls):
    """(name, docstring or None) of every field of a dataclass."""
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        yield ast.unparse(node.target), after.value.value if documented else None


def test_every_field_of_a_public_frozen_dataclass_has_a_sentence_under_it():
    found = {name: dict(fields(cls)) for name, cls in frozen_dataclasses()}
    assert sum(map(len, found.values())) > 200
    ends = (".", ".)", '."')
    lacking = [
        f"{name}.{field}"
        for name, own in found.items()
        for field, doc in own.items()
        if doc is None or not doc.strip().endswith(ends)
    ]
    assert not lacking


def test_no_docstring_begins_with_a_word_that_refers_to_nothing():
    files = sorted(ROOT.rglob("*.py"))
    begun = [
        f"{file.relative_to(ROOT.parent)}, line {node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).strip().split(" ")[0] in ("Of", "That", "Those")
    ]
    assert not begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 3
    """A sentence that ends
    (so) below.

    Another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = Part()
    parts: tuple[Part, ...] = (Part(), Part())


def test_help_breaks_lines_at_its_own_width_and_not_at_the_docstrings(capsys):
    with pytest.raises(SystemExit):
        config.parse(Whole, ["--help"], default=Whole(), prog="x")
    printed = capsys.readouterr().out
    lines = [line.strip("│ ") for line in printed.splitlines()]
    assert sum(line.endswith("A sentence that ends (so) below.") for line in lines) == 3
    assert sum(line.startswith("Another.") for line in lines) == 3
    assert config.parse(Whole, ["--part.size", "4"], default=Whole(), prog="x").part.size == 4
