"""Measure a model: facts right, sweeps, properties."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade import config
from cascade.commands.eval import coco, people, pictures, prompts, scenes
from cascade.errors import UserError
from cascade.tasks import that_have

COMMANDS: Mapping[str, tuple[Any, Callable[[Any], dict[str, Any] | None], str]] = {
    **scenes.COMMANDS,
    **pictures.COMMANDS,
    **coco.COMMANDS,
    **prompts.COMMANDS,
    **people.COMMANDS,
}
"""What is measured -> its options, what does it, and its line of help."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade eval` with the words after it. Raises UserError for a person's mistake."""
    argv = list(argv)
    tasks = that_have("evaluate")
    tasks = {name.rpartition(".")[2]: evaluate for name, evaluate in tasks.items()}
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(tasks))
    elif argv[0] in tasks:
        print(json.dumps(tasks[argv[0]](argv[1:]), indent=2))
    elif argv[0] in COMMANDS:
        options_class, command, _ = COMMANDS[argv[0]]
        options = config.parse(options_class, argv[1:], prog=f"cascade eval {argv[0]}")
        report = command(options)
        if report is not None:  # of several processes, the first one has it
            print(json.dumps(report, indent=2))
    else:
        near = config.nearest(argv[0], [*COMMANDS, *tasks])
        raise UserError(f"{argv[0]!r} is no command of cascade eval{near}")


def _usage(tasks: Mapping[str, Callable[..., Any]]) -> str:
    """With what the tasks measure, each told of by the first line of its function's docstring."""
    helps = {name: about for name, (_, _, about) in COMMANDS.items()}
    for name, evaluate in tasks.items():
        line = (evaluate.__doc__ or "").partition("\n")[0]
        helps[name] = f"{line[:1].lower()}{line[1:].rstrip('.')}"
    lines = [f"  {name:<11} {about}" for name, about in helps.items()]
    head = (
        "usage: cascade eval WHAT ...\n\n"
        "Figures of merit as JSON on stdout, pictures and plots into --out.\n"
    )
    more = "`cascade eval WHAT --help` shows what each takes, with units and defaults."
    return "\n".join([head, *lines, "", more])
