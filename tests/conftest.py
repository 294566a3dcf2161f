"""Eight simulated devices; compilation that spends no time on making programs fast, nor on any
program twice."""

import gc
import os
import sys
import tempfile
from importlib.metadata import version

import pytest

FASTER = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_disable_hlo_passes=tree_reduction_rewriter",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # Without these a program compiles in two to three times as long. XLA ends a process that
        # gives it a flag it does not know, so other versions do without them.
        *(FASTER if version("jaxlib").startswith("0.10.") else ()),
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


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: some tests wait for processes, and a core would stand idle."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="module", autouse=True)
def plain_curves():
    """Of a run's curve there is the file alone, for matplotlib takes a tenth of a small run.

    Tests of what a curve shows have a fixture of this name, which draws them.
    """
    with pytest.MonkeyPatch.context() as patched:
        if log := sys.modules.get("cascade.training.log"):
            patched.setattr(log, "_plot_loss", _leave_a_picture)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Only the first device is seen: a step on eight that are simulated takes the time of eight."""
    import jax

    alone = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: alone)
        yield


def _leave_a_picture(rows, path, title):
    import numpy as np

    from cascade import images

    images.save_png(path, np.zeros((1, 1, 3), np.uint8))


# A file's tests run in one process, for they share what takes long to make; files are taken up one
# after the other, so the longest come first.
LONGEST = (
    *("notebooks", "processes", "train", "end_to_end", "text", "earlier_versions", "stored_text"),
    *("classify", "text_training", "stage", "python_door", "page_in_browser", "contract"),
    *("finetune_page", "scenes_training", "style", "models", "judge", "tasks", "sr3"),
    *("validation", "inpaint", "storage", "finetuning", "trainable", "launch", "restore"),
    *("upscaler", "deepfloyd", "job", "sample", "page", "skipped", "full_disk", "memory"),
    "without_text",
)


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
