"""What one chip computes, moves and holds: the peaks that its maker states, not measurements."""

from __future__ import annotations

from dataclasses import dataclass

GiB, GB, T = 2.0**30, 1e9, 1e12


@dataclass(frozen=True)
class Chip:
    """One line of the table below."""

    name: str
    """The short name, as `cascade plan --topology` takes it."""
    kinds: tuple[str, ...]
    """How JAX's `device_kind` of such a device may begin."""
    flops: float
    """Peak bfloat16 FLOPs a second, without sparsity."""
    hbm: float
    """Bytes of memory: binary for TPUs (their compiler's limit is a little lower still) and decimal
    for GPUs, as their makers mean them."""
    hbm_bandwidth: float
    """Bytes a second between the chip and its memory."""
    interconnect: float
    """Bytes a second that the chip sends over all its links together, in one direction: ICI within
    a TPU slice, NVLink within a GPU server."""


# Columns: name; kinds; flops; hbm; hbm_bandwidth; interconnect.
#
# TPUs: Google's pages on each generation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). A chip
# counts as one device, its cores together. GPUs: NVIDIA's data sheets of the SXM forms; the H100s
# of PCIe and NVL, which are slower, are not in the table.
# fmt: off
CHIPS = (
    Chip("v4",   ("TPU v4",),                275 * T,  32 * GiB, 1228 * GB, 300 * GB),
    Chip("v5e",  ("TPU v5 lite", "TPU v5e"), 197 * T,  16 * GiB,  819 * GB, 200 * GB),
    Chip("v5p",  ("TPU v5",),                459 * T,  95 * GiB, 2765 * GB, 600 * GB),
    Chip("v6e",  ("TPU v6",),                918 * T,  32 * GiB, 1640 * GB, 400 * GB),
    Chip("a100", ("NVIDIA A100",),           312 * T,  80 * GB,  2039 * GB, 300 * GB),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989 * T,  80 * GB,  3350 * GB, 450 * GB),
    Chip("h200", ("NVIDIA H200",),           989 * T, 141 * GB,  4800 * GB, 450 * GB),
)
# fmt: on


def chip_named(name: str) -> Chip | None:
    """Returns the chip of a short name, such as `v5e`; None for one that is not in the table."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX `device_kind`; None for one that is not in the table."""
    # "TPU v5 lite" begins like "TPU v5", which is another chip: the longest name decides.
    named = [(kind, chip) for chip in CHIPS for kind in chip.kinds]
    fitting = [(len(kind), chip) for kind, chip in named if device_kind.startswith(kind)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
