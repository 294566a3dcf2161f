"""XLA's flags for training on accelerators: the one place of this project that sets any.

They let collectives (FSDP's gathers and scatters above all) run beside computation instead of
between. XLA reads them once, when it starts, so `apply` comes before anything that touches a
device. A flag that the user's own variable sets already, to whatever value, is left alone.

    GPU  XLA_FLAGS         latency hiding: start collectives early, wait for them late. Pipelined
                           ones start in one iteration of a loop (equal blocks, microbatches) and
                           end in the next.
    TPU  LIBTPU_INIT_ARGS  collectives fused with the matrix products that they feed, carried over
                           several steps of the schedule, and run on the tensor core's side.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
)
TPU = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
VARIABLES = {"gpu": ("XLA_FLAGS", GPU), "tpu": ("LIBTPU_INIT_ARGS", TPU)}


def apply(backend: Literal["cpu", "gpu", "tpu"], environment: MutableMapping[str, str]) -> None:
    """Add the backend's flags to its variable in the environment; none for a CPU."""
    if backend not in VARIABLES:
        return
    variable, flags = VARIABLES[backend]
    given = environment.get(variable, "").split()
    names = {flag.partition("=")[0] for flag in given}
    added = [flag for flag in flags if flag.partition("=")[0] not in names]
    environment[variable] = " ".join([*given, *added])


def expected_backend() -> Literal["cpu", "gpu", "tpu"]:
    """The backend that JAX will start, judged from outside, since asking JAX would start it."""
    chosen = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if chosen:
        return "tpu" if chosen == "tpu" else "gpu" if chosen in ("cuda", "gpu", "rocm") else "cpu"
    if _installed("libtpu") and (_devices("accel[0-9]*") or _devices("vfio/[0-9]*")):
        return "tpu"
    if _devices("nvidia[0-9]*") and (_installed("jax_cuda12_plugin", "jax_cuda13_plugin")):
        return "gpu"
    return "cpu"


def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(name) is not None for name in modules)


def _devices(pattern: str) -> bool:
    return any(Path("/dev").glob(pattern))
