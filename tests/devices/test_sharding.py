import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cascade import testing
from cascade.devices import sharding
from cascade.devices.sharding import MeshConfig
from cascade.errors import UserError
from cascade.models import placing
from cascade.stage import Stage


def specs(tree, mesh, rules=()):
    return jax.tree.map(lambda s: s.spec, sharding.shardings(tree, mesh, rules))


def test_minus_one_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("data,fsdp", [(3, 1), (3, -1), (-1, -1), (0, 8), (16, 1)])
def test_impossible_meshes_are_refused(data, fsdp):
    with pytest.raises(UserError, match=f"data={data}"):
        sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp))


def test_the_largest_divisible_axis_is_split_and_small_arrays_are_not():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    tree = {
        "wide": jnp.zeros((3, 3, 32, 64)),
        "odd": jnp.zeros((63, 64)),
        "tie": jnp.zeros((64, 64)),
        "bias": jnp.zeros((64,)),
        "none": jnp.zeros((63, 65)),
    }
    assert specs(tree, mesh) == {
        "wide": P(None, None, None, "fsdp"),
        "odd": P(None, "fsdp"),
        "tie": P(None, "fsdp"),
        "bias": P(),
        "none": P(),
    }


def test_rules_win_over_inference_for_parameters_and_optimizer_state_alike():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    tree = {"params": {"conv": {"kernel": jnp.zeros((64, 64))}}}
    tree["mu"] = tree["params"]
    got = specs(tree, mesh, [(r"conv/kernel$", ("fsdp", None))])
    assert got["params"]["conv"]["kernel"] == got["mu"]["conv"]["kernel"] == P("fsdp", None)


def test_a_rule_is_aligned_at_the_end_and_leaves_out_axes_that_do_not_divide():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = [("kernel$", (("fsdp", "tensor"), None))]
    tree = {
        "kernel": jnp.zeros((3, 3, 8, 8)),
        "two": {"kernel": jnp.zeros((6, 7))},
        "one": {"kernel": jnp.zeros((8,))},  # a statistic of an optimizer that has fewer axes
    }
    assert specs(tree, mesh, rules) == {
        "kernel": P(None, None, ("fsdp", "tensor"), None),
        "two": {"kernel": P("fsdp", None)},
        "one": {"kernel": P()},
    }


@pytest.mark.parametrize("network", [testing.base_stage(), testing.super_resolution_stage()])
def test_pairs_of_layers_split_the_channels_between_them(network):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    stage = Stage(network)
    abstract = stage.abstract()
    placement = sharding.shardings(abstract, mesh)
    split = {
        "/".join(name.split("/")[-3:]): s.spec[-2:]
        for path, s in jax.tree.leaves_with_path(placement)
        if "tensor" in str(s.spec) and (name := sharding.path_name(path))
    }
    assert split["residual/conv1/kernel"] == (None, "tensor")
    assert split["residual/conv2/kernel"] == ("tensor", None)
    assert {name: s for name, s in split.items() if "attention" in name}
    # the biggest part of a network's parameters are in such pairs
    whole = sum(x.size for x in jax.tree.leaves(abstract))
    held = sum(
        np.prod(s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(placement), strict=True)
    )
    assert held < 0.7 * whole


def test_an_efficient_unet_places_its_stream_after_every_change_of_width_or_side():
    """Else XLA may split it like the next weights: gigabytes of partial sums at paper size."""
    stage, streams = Stage(testing.super_resolution_stage()), collections.Counter()

    def place(x, role):
        streams[x.shape[1:]] += role == "stream"
        return x

    batch = {
        "image": jnp.zeros((2, 16, 16, 3), jnp.uint8),
        "lowres": jnp.zeros((2, 8, 8, 3), jnp.uint8),
        "text": jnp.zeros((2, 4, 8)),
        "text_mask": jnp.ones((2, 4), bool),
    }
    with placing(place):
        jax.eval_shape(stage.loss, stage.abstract(), batch, jax.random.key(0))
    # the first convolution, the blocks down, the convolution up, the blocks up
    assert streams[16, 16, 8] == 4
    # the convolution down, and blocks and attention, both down and up
    assert streams[8, 8, 16] == 5


def test_slices_of_a_pod_are_laid_along_data():
    class Chip:
        platform, device_kind = "tpu", "TPU v4"

        def __init__(self, number):
            self.id, self.process_index, self.core_on_chip = number, number // 4, 0
            self.slice_index, i = number % 2, number // 2
            self.coords = (i % 4, i // 4, 0)

    mesh = sharding.make_mesh(MeshConfig(data=-1, tensor=4), [Chip(i) for i in range(16)])
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert slices.shape == (4, 1, 4)
    assert [set(row.flat) for row in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="multiple of the 2 TPU slices"):
        sharding.make_mesh(MeshConfig(data=1, tensor=16), [Chip(i) for i in range(16)])


def test_batches_are_split_over_all_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    batch = sharding.shard_batch({"x": np.arange(16.0).reshape(16, 1)}, mesh)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 1)}
    assert np.array_equal(batch["x"][:, 0], np.arange(16))
