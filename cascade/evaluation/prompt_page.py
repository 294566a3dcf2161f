"""One HTML page with all pictures of a set of prompts, by category.

It loads nothing from elsewhere; a few lines of script hide the prompts without a text that is
typed, and without them the page shows all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cascade.evaluation.prompt_sets import Prompt
from cascade.storage import paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture at all its sizes."""

    name: str
    """What its files begin with."""
    seed: int
    """The seed that it was drawn with."""
    files: Mapping[int, str]
    """Side in pixels -> file name, relative to the page."""


def write(
    path: Path,
    prompts: Sequence[Prompt],
    shown: Sequence[Sequence[Shown]],
    *,
    about: Mapping[str, Any],
    samples: int,
) -> None:
    """Write the page. shown: the pictures of each prompt that are there; samples: how many of each
    there will be. about: what run.json says."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.category or "", []).append(i)
    body = [_head(about), _table(groups, shown, samples), _FILTER]
    for number, (name, members) in enumerate(groups.items()):
        articles = "\n".join(_article(prompts[i], shown[i], samples) for i in members)
        title = escape(name or "without a category")
        body.append(f'<section id="c{number}"><h2>{title}</h2>\n{articles}\n</section>')
    page = f"{_HEAD}\n" + "\n".join(body) + f"\n{_SCRIPT}</body></html>\n"
    with paths.writing(path) as file:
        # names of files may have bytes that are no UTF-8
        file.write_text(page, encoding="utf-8", errors="replace")


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Prompts and their pictures</title>
<meta name="viewport" content="width=device-width"><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
h2 { border-bottom: 2px solid #888; margin-top: 2em }
h3 { font-size: 1em; margin: 0 0 .3em; white-space: pre-line }
article { border-top: 1px solid #ccc; padding: .8em 0;
  content-visibility: auto; contain-intrinsic-size: auto 15em }
h2 + article { border-top: 0 }
figure { display: inline-block; vertical-align: top; margin: 0 1.2em .6em 0 }
figcaption, small, details { font-size: .8em; color: #666 }
img { height: 9em; width: 9em; object-fit: contain; background: #eee; margin-right: .2em }
img.few { image-rendering: pixelated }
pre { overflow: auto; max-height: 30em }
input { font: inherit; padding: .3em; width: 20em; max-width: 100% }
</style></head><body>
<h1>Prompts and their pictures</h1>"""

_FILTER = '<p><input id="filter" type="search" placeholder="only prompts with this text"></p>'

_SCRIPT = """<script>
document.getElementById("filter").addEventListener("input", (event) => {
  const text = event.target.value.toLowerCase();
  for (const section of document.querySelectorAll("section")) {
    let any = false;
    for (const one of section.querySelectorAll("article")) {
      one.hidden = !one.textContent.toLowerCase().includes(text);
      any ||= !one.hidden;
    }
    section.hidden = !any;
  }
});
</script>
"""


def _head(about: Mapping[str, Any]) -> str:
    files = ", ".join(
        f'<span title="SHA-256 {escape(file["sha256"])}">{escape(Path(file["file"]).name)}</span>'
        for file in about["files"]
    )
    model = f'<span title="SHA-256 {escape(about["model_sha256"])}">{escape(about["model"])}</span>'
    settings = escape(json.dumps(about, indent=2))
    return (
        f"<p>{files}, drawn by {model} from seed {about['seed']}.</p>"
        f"<details><summary>files, model and settings</summary><pre>{settings}</pre></details>"
    )


def _table(
    groups: Mapping[str, Sequence[int]], shown: Sequence[Sequence[Shown]], samples: int
) -> str:
    rows = ["<tr><th>category<th>prompts<th>pictures<th>to draw yet"]
    sums = [0, 0, 0]
    for number, (name, members) in enumerate(groups.items()):
        there = sum(len(shown[i]) for i in members)
        counts = [len(members), there, len(members) * samples - there]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        title = escape(name or "without a category")
        cells = "".join(f"<td>{count}" for count in counts)
        rows.append(f'<tr><td><a href="#c{number}">{title}</a>{cells}')
    rows.append("<tr><th>all" + "".join(f"<th>{count}" for count in sums))
    return f"<table>{''.join(rows)}</table>"


def _article(prompt: Prompt, shown: Sequence[Shown], samples: int) -> str:
    fields = [
        f"{escape(name)}: {escape(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in prompt.fields.items()
        if value not in ("", None)
    ]
    told = f"<p><small>{'; '.join(fields)}</small></p>" if fields else ""
    figures = []
    for one in shown:
        pictures = "".join(
            f'<a href="{file}"><img src="{file}" loading="lazy" alt="{side} pixels" '
            f'title="{side} pixels"{_few(side)}></a>'
            for side, file in one.files.items()
        )
        caption = f'<a href="{one.name}.json">{one.name}</a>, seed {one.seed}'
        figures.append(f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>")
    if len(shown) < samples:
        figures.append(f"<p><small>{samples - len(shown)} to draw yet</small></p>")
    return f"<article><h3>{escape(prompt.text)}</h3>{told}{''.join(figures)}</article>"


def _few(side: int) -> str:
    return ' class="few"' if side < 128 else ""
