"""Judged pictures, and one HTML page with all of them, the worst first.

The page has no scripts and loads nothing from elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

from cascade.scenes.captions import Caption
from cascade.scenes.edges import Edge
from cascade.scenes.judge import CATEGORIES, Verdict

# "seen" draws from training's distribution but from a stream of its own; see spec.sample_scene.
Set = Literal["seen", "unseen", "long"]
SETS: tuple[Set, ...] = get_args(Set)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """One picture at all its sizes."""

    set: str
    """The set that its prompt is of, one of SETS or of another evaluation's."""
    seed: int
    """The seed that the picture was drawn with."""
    prompt: Caption
    """What it was to show, and the facts in that."""
    files: dict[int, str]
    """Side in pixels -> file name, relative to the folder of results."""
    verdicts: dict[int, list[Verdict]]
    """Side in pixels -> verdicts; a side that the judge does not read is missing."""
    edges: dict[int, list[Edge]]
    """Side in pixels -> outlines, likewise."""


def write(path: Path, judged: Sequence[Judged], report: dict[str, Any]) -> None:
    """Write the page. It links pictures by their relative file names.

    report: {set: {side: judge.summary, with "edges": edges.summary}}.
    """
    worst_first = sorted(judged, key=_share_right)
    body = [_tables(report), *map(_article, worst_first)]
    page = f"{_HEAD}\n" + "\n".join(body) + "\n</body></html>\n"
    path.write_text(page, encoding="utf-8")


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Pictures and their prompts</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
article { border-top: 1px solid #bbb; padding: 1em 0 }
h2 { font-size: 1em; margin: 0 0 .5em }
figure { display: inline-block; vertical-align: top; margin: 0 1em 0 0; width: 15em }
img { width: 100%; image-rendering: pixelated }
ul { list-style: none; margin: 0; padding: 0; font-size: .85em; color: #666 }
.wrong { color: #b00020; font-weight: 600 }
</style></head><body>
<h1>Pictures and their prompts, worst first</h1>"""


def _tables(report: dict[str, Any]) -> str:
    columns = ["prompts wholly right", "facts right", *CATEGORIES, "unseen pairs"]
    columns.append("outlines off by, px")
    rows = ["<tr><th>set<th>px" + "".join(f"<th>{name}" for name in columns)]
    for name, sides in report.items():
        for side, one in sides.items():
            categories = [one["categories"].get(category) for category in CATEGORIES]
            shares = [one["prompts"], one["facts"], *categories, one.get("unseen")]
            rows.append(f"<tr><td>{escape(name)}<td>{side}" + "".join(map(_cell, shares)))
            rows.append(_outlines(one["edges"]))
    return f"<table>{''.join(rows)}</table>"


def _cell(share: dict[str, Any] | None) -> str:
    if share is None:
        return "<td>"
    low, high = share["interval"]
    about = f"{share['right']} of {share['n']}; 95 % interval {low:.1%} to {high:.1%}"
    return f'<td title="{about}">{share["share"]:.1%}'


def _outlines(edges: dict[str, Any]) -> str:
    if edges["distance"] is None:
        return "<td>"
    about = ", ".join(f"{shape} {own['distance']:.2f}" for shape, own in edges["shapes"].items())
    return f'<td title="{about}; {edges["outlines"]} outlines">{edges["distance"]:.2f}'


def _article(one: Judged) -> str:
    figures = []
    for side, file in one.files.items():
        lines = [
            f'<li class="{"right" if v.right else "wrong"}">{escape(v.category)}: '
            f"{escape(v.claim)}" + ("" if v.right else f" (seen: {escape(v.seen)})")
            for v in sorted(one.verdicts.get(side, []), key=lambda v: v.right)
        ]
        figures.append(
            f'<figure><a href="{escape(file)}"><img src="{escape(file)}" loading="lazy" '
            f'alt="{side} pixels"></a><ul>{"".join(lines)}</ul></figure>'
        )
    title = f"{escape(one.prompt.text)} <small>({escape(one.set)}, seed {one.seed})</small>"
    return f"<article><h2>{title}</h2>{''.join(figures)}</article>"


def _share_right(one: Judged) -> float:
    rights = [v.right for verdicts in one.verdicts.values() for v in verdicts]
    return sum(rights) / len(rights)
