import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from cascade import testing
from cascade.devices import flops
from cascade.models.layers import attend, conv3x3
from cascade.stage import Stage


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def sum_of(fn):
    return lambda *args: fn(*args).sum()


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(
        x,
        kernel,
        **{"window_strides": (1, 1), "padding": "SAME", **options},
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_a_matrix_product_is_two_operations_for_every_product():
    assert flops.count(jnp.dot, zeros(3, 5), zeros(5, 7)) == 2 * 3 * 5 * 7
    assert flops.count(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b), zeros(2, 3, 5), zeros(2, 4, 5)
    ) == (2 * 2 * 3 * 4 * 5)


def test_elementwise_work_is_not_counted():
    assert flops.count(lambda x: jnp.exp(x) / x.sum(), zeros(8, 8)) == 0


# Three taps on n pixels with a border of zeros meet 3n - 2 pixels.
@pytest.mark.parametrize(
    "x,kernel,options,expected",
    [
        ((2, 8, 8, 3), (3, 3, 3, 5), {}, 2 * 2 * 22 * 22 * 3 * 5),
        ((2, 8, 8, 3), (3, 3, 3, 5), {"padding": "VALID"}, 2 * 2 * 6 * 6 * 9 * 3 * 5),
        ((2, 8, 8, 3), (1, 1, 3, 5), {}, 2 * 2 * 64 * 3 * 5),
        ((1, 8, 8, 3), (2, 2, 3, 5), {"window_strides": (2, 2)}, 2 * 16 * 4 * 3 * 5),
        ((1, 8, 8, 6), (3, 3, 2, 9), {"feature_group_count": 3}, 2 * 22 * 22 * 2 * 9),
        # A depthwise convolution does the work of one channel for each.
        ((1, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}, 2 * 22 * 22 * 6),
        # Taps two apart: the outer two of three miss one pixel more.
        ((1, 8, 8, 1), (3, 3, 1, 1), {"rhs_dilation": (2, 2)}, 2 * 20 * 20),
        # Transposed: each of 4 pixels meets three taps, but at one border only two.
        (
            (1, 4, 4, 1),
            (3, 3, 1, 1),
            {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))},
            2 * 11 * 11,
        ),
    ],
)
def test_a_convolution_counts_the_products_with_pixels_only(x, kernel, options, expected):
    got = flops.count(lambda x, k: convolve(x, k, **options), zeros(*x), zeros(*kernel))
    assert got == expected


@pytest.mark.parametrize("options", [{}, {"window_strides": (2, 2)}, {"padding": "VALID"}])
def test_both_gradients_of_a_convolution_cost_what_it_costs(options):
    args = zeros(2, 8, 8, 3), zeros(3, 3, 3, 5)

    def energy(x, kernel):
        return jnp.square(convolve(x, kernel, **options)).sum()

    forward = flops.count(energy, *args)
    assert flops.count(jax.grad(energy, argnums=1), *args) == 2 * forward
    assert flops.count(jax.grad(energy, argnums=(0, 1)), *args) == 3 * forward


def test_grouped_gradients_with_batch_groups_cost_the_same():
    args = zeros(2, 8, 8, 6), zeros(3, 3, 2, 9)
    energy = sum_of(lambda x, k: convolve(x, k, feature_group_count=3) ** 2)
    assert flops.count(jax.grad(energy, (0, 1)), *args) == 3 * flops.count(energy, *args)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_accelerators_branch_of_our_convolution_is_counted(stride):
    args = zeros(2, 8, 8, 3), zeros(3, 3, 3, 5)
    energy = sum_of(lambda x, k: conv3x3(x, k, stride) ** 2)
    assert flops.count(jax.grad(energy, (0, 1)), *args) == 3 * flops.count(energy, *args)


def test_attention_is_its_two_products():
    q, kv = zeros(2, 64, 16), zeros(2, 70, 16)
    got = flops.count(lambda q, k, v: attend(q, k, v, None, 8), q, kv, kv)
    assert got == 2 * (2 * 2 * 64 * 70 * 16)


def dense(w, x):
    return jnp.tanh(x @ w)


def test_scanned_blocks_count_as_often_as_they_run():
    def scanned(ws, x):
        return lax.scan(lambda x, w: (dense(w, x), None), x, ws)[0]

    args = zeros(5, 8, 8), zeros(4, 8)
    one = 2 * 4 * 8 * 8
    assert flops.count(scanned, *args) == 5 * one
    assert flops.count(jax.grad(sum_of(scanned), (0, 1)), *args) == 3 * 5 * one
    assert (
        flops.count(
            lambda w, x: lax.fori_loop(0, 7, lambda _, x: dense(w, x), x), zeros(8, 8), zeros(4, 8)
        )
        == 7 * one
    )


def test_recomputed_work_counts_again():
    def two(w, x):
        return dense(w, dense(w, x))

    args, one = (zeros(8, 8), zeros(4, 8)), 2 * 4 * 8 * 8
    kept = jax.value_and_grad(sum_of(two), (0, 1))
    recomputed = jax.value_and_grad(sum_of(jax.checkpoint(two)), (0, 1))
    assert flops.count(kept, *args) == 6 * one
    assert flops.count(recomputed, *args) == 8 * one


def test_a_loop_without_a_fixed_count_is_refused_if_it_works():
    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="trip count"):
        flops.count(loop, zeros(4, 4))
    assert flops.count(lambda x: lax.while_loop(lambda x: x.sum() < 1, jnp.exp, x), zeros(4)) == 0


def test_a_conditional_counts_as_its_largest_branch_in_a_jitted_function_too():
    @jax.jit
    def either(x, w):
        return lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.count(either, zeros(4, 8), zeros(8, 8)) == 2 * 2 * 4 * 8 * 8


def test_work_split_over_devices_counts_on_all_of_them():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    split = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops.count(split, zeros(8, 5), zeros(5, 7)) == 2 * 8 * 5 * 7


def test_a_networks_forward_pass_agrees_with_the_compilers_figure():
    """XLA counts a loop's body once; without loops it differs by elementwise work alone."""
    stage = Stage(testing.base_stage())
    args = stage.abstract(), zeros(4, 8, 8, 3), zeros(4), zeros(4, 12, 8)
    args += (jax.ShapeDtypeStruct((4, 12), bool),)

    def forward(params, x, time, text, mask):
        signals = stage.conditions["text"](params["conditions"]["text"], text, mask)
        return stage.network(params["network"], x, time, signals)

    ours = flops.count(forward, *args)
    theirs = jax.jit(forward).lower(*args).cost_analysis()["flops"]
    assert 0.7 * theirs < ours < theirs
