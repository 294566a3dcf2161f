"""WORKDIR/skipped.jsonl: the records of its data that a run could not read."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterable
from typing import Any

import jax

from cascade.storage import paths
from cascade.storage.paths import Path

MOST_LINES = 10_000


class Skipped:
    """A line for each record, {"images", "key", "reason"}: the first MOST_LINES of them.

    `images` is how far the run was when it met the record. Of several processes each lists those of
    its own rows, and those after the first have skipped_1.jsonl and so on.
    """

    def __init__(self, workdir: Path, images: int):
        """images: where the run goes on; what it met after that, it will meet again."""
        process = jax.process_index()
        self._file = workdir / (f"skipped_{process}.jsonl" if process else "skipped.jsonl")
        self._lines: dict[str, dict[str, Any]] = {}
        if self._file.is_file():
            for line in self._file.read_bytes().split(b"\n"):
                entry = _parsed(line)
                if entry is not None and entry["images"] <= images:
                    self._lines[entry["key"]] = entry

    @property
    def counts(self) -> dict[str, int]:
        """How many records there are of each reason."""
        return dict(collections.Counter(entry["reason"] for entry in self._lines.values()))

    def add(self, records: Iterable[tuple[str, str]], images: int) -> None:
        """Note the (key, reason) of records, of which those known already count once."""
        known = len(self._lines)
        for key, reason in records:
            if key not in self._lines and len(self._lines) < MOST_LINES:
                if reason not in self.counts:
                    told = f"{key if key.isprintable() else repr(key)}: {reason}"
                    print(f"warning: left out {told}; see {self._file}", file=sys.stderr)
                self._lines[key] = {"images": images, "key": key, "reason": reason}
        if len(self._lines) > known:
            with paths.writing(self._file) as file:
                file.write_text("".join(json.dumps(x) + "\n" for x in self._lines.values()))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        kinds = [type(entry[name]) for name in ("images", "key", "reason")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if kinds == [int, str, str] else None
