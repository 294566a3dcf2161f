"""Accelerators: what one chip computes, moves and holds. Peaks of their makers, not measurements.

TPUs: Google's pages on each generation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). A chip
counts as one device, its cores together. GPUs: NVIDIA's data sheets of the SXM forms, bfloat16
without sparsity. Interconnect is what a chip sends over all its links together, in one direction:
ICI within a TPU slice, NVLink within a GPU server. Bytes of memory are binary for TPUs (their
compiler's limit is a little lower still) and decimal for GPUs, as their makers mean them.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB, GB, T = 2.0**30, 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Chip:
    """flops: bfloat16 a second. hbm: bytes. hbm_bandwidth, interconnect: bytes a second.

    kinds: how JAX's `device_kind` of such a device may begin.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    interconnect: float


CHIPS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        flops=275 * T,
        hbm=32 * GiB,
        hbm_bandwidth=1228 * GB,
        interconnect=300 * GB,
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197 * T,
        hbm=16 * GiB,
        hbm_bandwidth=819 * GB,
        interconnect=200 * GB,
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5",),
        flops=459 * T,
        hbm=95 * GiB,
        hbm_bandwidth=2765 * GB,
        interconnect=600 * GB,
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6",),
        flops=918 * T,
        hbm=32 * GiB,
        hbm_bandwidth=1640 * GB,
        interconnect=400 * GB,
    ),
    Chip(
        name="a100",
        kinds=("NVIDIA A100",),
        flops=312 * T,
        hbm=80 * GB,
        hbm_bandwidth=2039 * GB,
        interconnect=300 * GB,
    ),
    Chip(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),  # not PCIe, nor NVL, which are slower
        flops=989 * T,
        hbm=80 * GB,
        hbm_bandwidth=3350 * GB,
        interconnect=450 * GB,
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        flops=989 * T,
        hbm=141 * GB,
        hbm_bandwidth=4800 * GB,
        interconnect=450 * GB,
    ),
)


def chip_named(name: str) -> Chip | None:
    """By its short name, such as `v5e`."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def chip_of(device_kind: str) -> Chip | None:
    """By JAX's name of a device; None for one that is not in the table."""
    # "TPU v5 lite" begins like "TPU v5", which is another chip: the longest name decides.
    named = [(kind, chip) for chip in CHIPS for kind in chip.kinds]
    fitting = [(len(kind), chip) for kind, chip in named if device_kind.startswith(kind)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
