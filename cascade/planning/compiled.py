"""Compilation of a program for chips that are not here, and what the compiler says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import queue
import re
import tempfile
import threading
import time
from typing import Any

import jax

from cascade.errors import UserError
from cascade.planning import hlo
from cascade.planning.figures import Figures
from cascade.planning.topology import Topology

PATIENCE = 30.0
"""Seconds that a compiler may go on for after it has written all that a plan reads."""


def compiled(jitted: Any, shapes: tuple[Any, ...], topology: Topology) -> Figures:
    """Returns what XLA says of one run of a program on one chip: memory, traffic and collectives.

    jitted: what `jax.jit` returns. shapes: its arguments, as ShapeDtypeStructs in pytrees. Memory
    and traffic are in bytes. A program that is too large for the chip is no error: its `fits` is
    False. Raises UserError for one that the compiler refuses otherwise.

    Most of a TPU compiler's time goes into what follows the assignment of buffers, and tells
    nothing more. So it is asked to write down the optimized program and its buffers, and for the
    least effort at machine code, where libtpu gives up (UNIMPLEMENTED). If it takes long even so,
    as for the routes of all-to-alls between hundreds of chips, nobody waits for it.
    """
    lowered = jitted.lower(*shapes)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {"xla_dump_to": folder}
        if topology.devices and topology.devices[0].platform == "tpu":
            options["xla_jf_llo_level"] = 0
        program = compile_until_written(lowered, options, pathlib.Path(folder))
        if isinstance(program, str) and not program.startswith("UNIMPLEMENTED"):
            return too_large(program) | {"compile_seconds": time.perf_counter() - start}
        if program is None or isinstance(program, str):
            memory = hlo.memory(_written(folder, "after_optimizations-buffer-assignment"))
            text = _written(folder, "after_optimizations")
        else:
            memory, text = _memory_of(program.memory_analysis()), program.as_text()
    seconds, moved = time.perf_counter() - start, hlo.traffic(text)
    return {
        **{name: float(size) for name, size in dataclasses.asdict(memory).items()},
        "fits": memory.peak_bytes <= topology.chip.hbm,
        "hbm_traffic_bytes": moved.hbm_bytes,
        "collectives": {
            kind: {"count": moved.counts[kind], "sent_bytes": moved.sent_bytes[kind]}
            for kind in moved.counts
        },
        "compile_seconds": seconds,
        "unknown": ["memory of the program's machine code, some hundred MB for a large network"],
    }


def compile_until_written(lowered: Any, options: dict[str, Any], folder: pathlib.Path) -> Any:
    """Returns the compiled program, the compiler's error as text, or None if neither comes in time.

    It has PATIENCE seconds from when the last of the files that a plan reads lies in `folder`.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def compile_it() -> None:
        try:
            outcome.put(lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as e:
            outcome.put(str(e))

    threading.Thread(target=compile_it, daemon=True).start()
    written = None
    while written is None or time.perf_counter() - written < PATIENCE:
        with contextlib.suppress(queue.Empty):
            return outcome.get(timeout=1)
        if written is None and list(folder.glob("*.after_optimizations_after_buffer_assignment.*")):
            written = time.perf_counter()
    return None


def too_large(message: str) -> Figures:
    """Returns the figures of a program that does not fit, from the compiler's refusal.

    The refusal says how much memory the program needs. Raises UserError for one that says nothing
    of memory.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    if used is None:
        raise UserError(f"the compiler refused the program: {message.splitlines()[0]}")
    return {
        "argument_bytes": None,
        "temporary_bytes": None,
        "peak_bytes": float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))),
        "fits": False,
        "hbm_traffic_bytes": None,
        "collectives": {},
        "unknown": [
            "traffic and collectives of a program that does not fit: the bound is that of compute"
        ],
    }


def _memory_of(stats: Any) -> hlo.Memory:
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    return hlo.Memory(stats.argument_size_in_bytes, temporary, held + temporary)


def _written(folder: str, what: str) -> str:
    """Returns the compiler's file of one program."""
    files = list(pathlib.Path(folder).glob(f"*.{what}.txt"))
    if len(files) != 1:
        raise UserError(f"the compiler wrote {len(files)} files of {what}, and not one")
    return files[0].read_text()
