import importlib.util
import math
import os

import jax
import pytest
from pipelines import UNETS

from cascade.errors import UserError
from cascade.models import Network
from cascade.published.deepfloyd import bench as bench_unet
from cascade.published.deepfloyd.bench import FIELDS, UNetOptions
from cascade.published.deepfloyd.reader import unet_config


@pytest.mark.parametrize(
    "size,millions", [("S", 8.88), ("M", 82.76), ("IF-I-M", 371.61), ("SR-S", 33.05)]
)
def test_the_networks_that_are_timed_have_the_sizes_announced(size, millions):
    config = unet_config(FIELDS[size])
    shapes = Network(config, config.widths).abstract()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_pass_is_timed_and_where_pytorch_is_it_computes_the_same(name, monkeypatch):
    monkeypatch.setitem(FIELDS, "S", UNETS[name]["config"] | {"sample_size": 4})
    got = bench_unet.bench_unet(UNetOptions(size="S", repeats=1))
    sizes = (math.prod(shape) for shape in UNETS[name]["shapes"].values())
    assert got["parameters"] == sum(sizes)
    assert 0 < got["cascade_fastest_seconds"] <= got["cascade_seconds"]
    there = all(importlib.util.find_spec(module) for module in ("torch", "diffusers"))
    assert ("ratio" in got) == there and got.get("largest_difference", 0) < 1e-4


def test_cores_are_held_to_before_anything_starts():
    own = os.sched_getaffinity(0)
    try:
        assert bench_unet._hold(1) == 1 and len(os.sched_getaffinity(0)) == 1
    finally:
        os.sched_setaffinity(0, own)
    with pytest.raises(
        UserError, match=f"--cores must be 1, or up to the number of cores here, {len(own)}"
    ):
        bench_unet._hold(len(own) + 1)
    with pytest.raises(UserError, match="--repeats must be 1 or more"):
        bench_unet.bench_unet(UNetOptions(repeats=0))
