"""A run's folder belongs to one training at a time: the file `running.json` in it says whose.

The holder renews it every BEAT seconds. One that another machine has not renewed for STALE seconds
is taken over, as is, at once, one whose process on this machine is no more.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from cascade.errors import UserError
from cascade.storage import paths
from cascade.storage.paths import Path

NAME = "running.json"
BEAT, STALE = 10.0, 60.0
SETTLE = 0.5
"""Seconds after which of several that took a folder over at once all see who was the last."""


class Lock:
    """While entered, the folder is this training's; `lost` if another one has taken it over.

    It is a file in the folder, in object storage too. Entering raises UserError while another
    training holds it; where that one is on another machine, it is watched for STALE seconds first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beat: float = BEAT,
        stale: float = STALE,
        held_by: str = "a training",
        way_out: str = "name another --workdir",
    ):
        """held_by, way_out: who holds folders, and what to do but wait for it, for people."""
        self._held_by, self._way_out = held_by, way_out
        self._file, self._beat, self._stale = folder / NAME, beat, stale
        self._own: dict[str, Any] = {}
        self._ended = threading.Event()
        self.lost = False

    def __enter__(self) -> Lock:
        self._own = {
            "owner": _user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "process_begun": _process_begun(os.getpid()),
            "token": uuid.uuid4().hex,
            "beats": 0,
        }
        while not self._created():
            there = self._read()
            if there is not None and self._holds(there):
                raise UserError(
                    f"{self._file.parent}: {self._held_by} holds this folder "
                    f"({there.get('owner')} on {there.get('host')}, process "
                    f"{there.get('process')}, since {there.get('begun')}); wait until it ends, or "
                    f"{self._way_out}"
                )
            self._write()
            if self._is_own_after(SETTLE):
                break
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if (self._read() or {}).get("token") == self._own["token"]:
                self._file.unlink()

    def _created(self) -> bool:
        """Write the file where there is none, and say whether it is there as written."""
        if paths.is_remote(self._file):  # which cannot refuse a second writer
            if self._file.exists():
                return False
            self._write()
            return self._is_own_after(SETTLE)
        try:
            file = open(self._file, "x", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(self._own, file)
        except OSError:  # of a full disk
            self._file.unlink()
            raise
        return True

    def _holds(self, there: dict[str, Any]) -> bool:
        """Whether the training that wrote this is at work, as far as one can see."""
        if there.get("machine") == _machine():
            begun = _process_begun(there.get("process"))
            return begun is not None and begun == there.get("process_begun")
        end = time.monotonic() + self._stale
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat / 4))
            if (now := self._read()) != there:
                return now is not None
        return False

    def _renew(self) -> None:
        while not self._ended.wait(self._beat):
            there = self._read()
            if there is not None and there.get("token") != self._own["token"]:
                self.lost = True
                return
            self._own["beats"] += 1
            with contextlib.suppress(OSError):  # a full disk is told of by what matters more
                self._write()

    def _is_own_after(self, seconds: float) -> bool:
        time.sleep(seconds)
        return (self._read() or {}).get("token") == self._own["token"]

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where there is none, or nobody could have written what is."""
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        with paths.writing(self._file) as file:
            file.write_text(json.dumps(self._own), encoding="utf-8")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return f"user {os.getuid()}"


def _machine() -> str:
    """What names this boot of this machine, and in it the container that numbers processes."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _process_begun(number: Any) -> str | None:
    """What tells a running process from a later one with its number; None if there is none."""
    if type(number) is not int or number < 1:
        return None
    try:
        text = pathlib.Path(f"/proc/{number}/stat").read_text()
        state, *rest = text.rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (OSError, IndexError):
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"
