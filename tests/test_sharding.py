import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cascade import sharding
from cascade.errors import UserError
from cascade.sharding import MeshConfig


def specs(tree, mesh, rules=()):
    return jax.tree.map(lambda s: s.spec, sharding.shardings(tree, mesh, rules))


def test_minus_one_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}


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
    got = specs(tree, mesh, [(r"conv/kernel$", P("fsdp", None))])
    assert got["params"]["conv"]["kernel"] == got["mu"]["conv"]["kernel"] == P("fsdp", None)


def test_batches_are_split_over_all_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    batch = sharding.shard_batch({"x": np.arange(16.0).reshape(16, 1)}, mesh)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 1)}
    assert np.array_equal(batch["x"][:, 0], np.arange(16))
