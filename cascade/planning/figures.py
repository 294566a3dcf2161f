"""The figures of a plan: the bound that follows from what a program moves, and words for people.

A step takes at least as long as the slowest of three things takes alone, and no longer if all else
hides behind it:

    time = max(FLOPs / peak, HBM bytes / HBM bandwidth, bytes sent / interconnect)
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from cascade.planning.topology import Topology

Figures = dict[str, Any]


def figures(
    stage: str,
    topology: Topology,
    mesh: Mesh,
    params: Any,
    measured: Figures,
    *,
    model: float,
    executed: float,
    images: int,
) -> Figures:
    """Returns all figures of a program, by name: those measured, and what follows from them.

    Bytes and seconds are of one chip, FLOPs of all chips together. stage: its name. params: arrays
    or their shapes, which are counted. measured: as `compiled` returns it. executed, model: FLOPs
    of one run with recomputation and without; `mfu` is the share of the chips' peak that the latter
    reach at the bound. images: pictures of one run of the program.
    """
    chip, n = topology.chip, topology.count
    traffic = measured["hbm_traffic_bytes"]
    sent = sum(c["sent_bytes"] for c in measured["collectives"].values())
    times = {
        "compute": executed / n / chip.flops,
        "memory": None if traffic is None else traffic / chip.hbm_bandwidth,
        "interconnect": None if traffic is None else sent / chip.interconnect,
    }
    known = {name: t for name, t in times.items() if t is not None}
    by = max(known, key=lambda name: known[name])
    bound = known[by]
    return {
        "stage": stage,
        "topology": topology.name,
        "chips": n,
        "mesh": dict(mesh.shape),
        "batch": images,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        **measured,
        "hbm_bytes": chip.hbm,
        "flops": executed,
        "model_flops": model,
        **{f"{name}_seconds": t for name, t in times.items()},
        "bound_seconds": bound,
        "bound_by": by,
        "images_per_second": images / bound,
        "mfu": model / n / chip.flops / bound,
    }


def table(f: Figures) -> str:
    """Returns the figures `f` as text for people: on each line a name, its value and its unit."""

    def seconds(value: float | None) -> str:
        return "unknown" if value is None else f"{value * 1e3:#.3g} ms"

    rows = [
        ("topology", f"{f['topology']}, {f['chips']} chips"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items())),
        ("parameters", f"{f['parameters'] / 1e6:.1f} M"),
        ("arguments, each chip", gib(f["argument_bytes"])),
        ("temporaries", gib(f["temporary_bytes"])),
        ("peak", f"{gib(f['peak_bytes'])} of {gib(f['hbm_bytes'])}"),
        ("fits", {True: "yes", False: "NO", None: "unknown"}[f["fits"]]),
        ("FLOPs, all chips", f"{f['flops']:.4g} ({f['model_flops']:.4g} without recomputation)"),
        ("HBM traffic", gib(f["hbm_traffic_bytes"])),
        *(
            (kind, f"{c['count'] or '?'} times, {gib(c['sent_bytes'])} sent")
            for kind, c in f["collectives"].items()
        ),
        ("time of compute", seconds(f["compute_seconds"])),
        ("time of memory", seconds(f["memory_seconds"])),
        ("time of interconnect", seconds(f["interconnect_seconds"])),
        ("bound", f"{seconds(f['bound_seconds'])}, by {f['bound_by']}"),
        ("images/s at the bound", f"{f['images_per_second']:.4g}"),
        ("MFU at the bound", f"{f['mfu']:.1%}"),
    ]
    if (encoder := f.get("text_encoder")) is not None:
        held = f"{gib(encoder['weight_bytes'])}, peak {gib(encoder['peak_bytes'])} with it"
        work = f"{encoder['flops']:.4g}, {seconds(encoder['compute_seconds'])}"
        rows += [
            ("text encoder", f"{encoder['name']}, {encoder['parameters'] / 1e6:.1f} M"),
            ("its weights, each chip", held),
            ("its FLOPs, all chips", work),
            (
                "bound with it",
                f"{seconds(encoder['bound_seconds'])}, {encoder['images_per_second']:.4g} images/s",
            ),
        ]
    if "paper_days" in f:
        rows.append(
            (
                "2.5M steps",
                f"{f['paper_days']:.3g} days, {f['paper_chip_hours']:.4g} chip-hours at least",
            )
        )
    if "settings" in f:
        rows.append(("settings", ", ".join(f"{k}={v}" for k, v in f["settings"].items())))
    if f["compile_seconds"] is not None:
        rows.append(("compiled in", f"{f['compile_seconds']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines + [f"not known: {note}" for note in f["unknown"]])


def gib(size: float | None) -> str:
    """Returns a number of bytes as text in GiB; None becomes "unknown"."""
    return "unknown" if size is None else f"{size / 2**30:#.3g} GiB"


def tree_bytes(tree: Any) -> float:
    """Returns the bytes of all arrays (or ShapeDtypeStructs) of a pytree."""
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def bytes_each(tree: Any, placement: Any) -> float:
    """Returns the bytes that one device holds of a pytree. placement: a sharding for each leaf."""
    parts = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placement
    )
    return float(sum(jax.tree.leaves(parts)))
