import math
import os

import jax
import pytest

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


def test_cores_are_held_to_before_anything_starts():
    own = os.sched_getaffinity(0)
    try:
        assert bench_unet._hold(1) == 1 and len(os.sched_getaffinity(0)) == 1
    finally:
        os.sched_setaffinity(0, own)
    with pytest.raises(UserError, match=f"--cores must be in 1..{len(own)}"):
        bench_unet._hold(len(own) + 1)
    with pytest.raises(UserError, match="--repeats must be 1 or more"):
        bench_unet.bench_unet(UNetOptions(repeats=0))
