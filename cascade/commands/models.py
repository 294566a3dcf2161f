"""What ships, and what a model folder holds."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cascade import config


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tell what models are: stages, sizes, parameters, text encoder, captions, licence, digest.

    Without a name it tells of those that ship. Weights are read for their digest alone. It prints a
    line of JSON for each model on stdout, and the same as a table on stderr.
    """

    models: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="MODEL ...", help_behavior_hint=""),
    ] = ()
    """As `cascade sample --model` takes them: folders, or names of public models."""


def main(argv: Sequence[str]) -> None:
    """Run `cascade models` with the words after it. Raises UserError for a person's mistake."""
    options = config.parse(Options, argv, prog="cascade models")
    from cascade.runner.model_folder import shipped

    for name in options.models or shipped():
        told = describe(name)
        print(_table(told), file=sys.stderr)
        print(json.dumps(told), flush=True)


def describe(name: str) -> dict[str, Any]:
    """What a model says of itself, as JSON values. Raises UserError for none, or a damaged one."""
    import jax
    import numpy as np

    from cascade.runner.model_folder import open_model, update_digest
    from cascade.stage import Stage

    model = open_model(name)
    digest, stages = hashlib.sha256(), []
    for stage in model.stages:
        files = model.files(stage.name)
        for file in files:
            update_digest(digest, file)
        leaves = jax.tree.leaves(Stage(stage).abstract())
        stages.append(
            {
                "stage": stage.name,
                "draws": stage.resolution,
                "from": stage.lowres_resolution,
                "told": [condition.name for condition in stage.conditions],
                "parameters": int(sum(np.prod(leaf.shape) for leaf in leaves)),
                "bytes": sum(file.stat().st_size for file in files),
                "steps": stage.sampling.steps,
                "guidance": stage.sampling.guidance,
            }
        )
    known = len(set(model.known_words))
    captions = f"of {known} words alone" if known else "of any words"
    reads = any(stage.text is not None for stage in model.stages)
    return {
        "model": model.name,
        "stages": stages,
        "text_encoder": model.text_encoder if reads else None,
        "max_tokens": model.max_tokens if reads else None,
        "captions": captions if reads else None,
        "licence": _licence(files[0].parents[1]),
        "model_sha256": digest.hexdigest(),
    }


def _licence(folder: Path) -> str | None:
    """What a folder says of its licence: the field of a Hugging Face card, or the first line of a
    file."""
    card = folder / "README.md"
    for file in (card, *sorted(folder.glob("LICEN[CS]E*"))):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as opened:
            text = opened.read(2**16)
        if file != card:
            return text.strip().partition("\n")[0][:200] or None
        if found := re.search(r"^license(?:_name)?: *(.+)$", text, re.MULTILINE):
            return found[1].strip()[:200]
    return None


def _table(told: dict[str, Any]) -> str:
    lines = [f"{told['model']}  (sha256 {told['model_sha256'][:12]}...)"]
    for stage in told["stages"]:
        start = f"{stage['from']} -> " if stage["from"] else ""
        lines.append(
            f"  {stage['stage']:<10} {start + str(stage['draws']):>12} px  "
            f"{stage['parameters'] / 1e6:8.1f} M parameters  {stage['bytes'] / 1e6:8.1f} MB  "
            f"{stage['steps']} steps, guidance {stage['guidance']:g}"
        )
    if told["captions"] is None:
        lines.append("  reads no text")
    else:
        lines.append(f"  reads captions {told['captions']}, up to {told['max_tokens']} tokens")
    lines.append(f"  licence: {told['licence'] or 'the folder says nothing of one'}")
    return "\n".join(lines)
