"""WORKDIR/skipped.jsonl: the records of its data that a run could not read."""

from __future__ import annotations

import collections
import json
import pathlib
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
        self.counts: collections.Counter[str] = collections.Counter()
        """How many records in the list there are of each reason."""
        if self._file.is_file():
            for line in self._file.read_bytes().split(b"\n")[:MOST_LINES]:
                entry = _parsed(line)
                if entry is not None and entry["images"] <= images:
                    self._lines[entry["key"]] = entry
            self.counts.update(entry["reason"] for entry in self._lines.values())
            self._write(self._lines.values())

    def add(self, records: Iterable[tuple[str, str]], images: int) -> None:
        """Note the (key, reason) of records, of which those known already count once."""
        new = []
        for key, reason in records:
            if key not in self._lines and len(self._lines) < MOST_LINES:
                if reason not in self.counts:
                    told = f"{key if key.isprintable() else repr(key)}: {reason}"
                    print(f"warning: left out {told}; see {self._file}", file=sys.stderr)
                self._lines[key] = {"images": images, "key": key, "reason": reason}
                self.counts[reason] += 1
                new.append(self._lines[key])
        if new and isinstance(self._file, pathlib.Path):
            with self._file.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in new)
        elif new:
            self._write(self._lines.values())

    def _write(self, entries: Iterable[dict[str, Any]]) -> None:
        with paths.writing(self._file) as file:
            file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        kinds = [type(entry[name]) for name in ("images", "key", "reason")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if kinds == [int, str, str] else None
