"""Eight simulated devices; compilation that spends no time on making programs fast, nor on any
program twice."""

import gc
import os
import tempfile
from importlib.metadata import version

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # Without them a program compiles in a third of the time. XLA ends a process that gives it
        # a flag it does not know, so other versions do without this one.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Of this run alone: its processes inherit the name, and its end removes the folder.
    PROGRAMS = tempfile.TemporaryDirectory(prefix="cascade-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# Compilers make objects by the million that are no garbage: to look for it takes a twentieth.
gc.set_threshold(100_000)
