"""The networks, both kinds: what they promise whatever their weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade import testing
from cascade.errors import UserError
from cascade.models import (
    Conditioning,
    EfficientLevel,
    EfficientUNetConfig,
    Level,
    Network,
    UNetConfig,
)
from cascade.models.unet import UNet

BASE = UNetConfig(
    levels=(Level(width=8, blocks=3), Level(width=16, blocks=1, attention=True)),
    head_width=8,
    text_width=6,
)
SUPER = EfficientUNetConfig(
    levels=(
        EfficientLevel(width=8, blocks=2, stride=1),
        EfficientLevel(width=16, blocks=1, text_attention=True),
    ),
    patch=2,
    head_width=8,
    text_width=6,
    lowres=True,
)
BOTH = pytest.mark.parametrize("config", [BASE, SUPER], ids=["base", "super"])
TIME = jnp.array([20.0, 700.0])


def inputs(config, size=8, tokens=4):
    """Two noisy images, the second with fewer tokens than the first."""
    k_x, k_text, k_lowres = jax.random.split(jax.random.key(0), 3)
    cond = Conditioning(
        text=jax.random.normal(k_text, (2, tokens, config.text_width)),
        text_mask=jnp.arange(tokens) < jnp.array([[tokens], [2]]),
    )
    if config.lowres:
        lowres = jax.random.uniform(k_lowres, (2, size, size, 3), minval=-1, maxval=1)
        cond = dataclasses.replace(cond, lowres=lowres, lowres_time=jnp.array([10.0, 300.0]))
    return jax.random.normal(k_x, (2, size, size, 3)), cond


@pytest.fixture(scope="module")
def compiled():
    """config -> (network compiled once, its parameters as initialised, and lively)."""
    cache = {}

    def get(config):
        if config not in cache:
            network = Network(config)
            params = jax.jit(network.init)(jax.random.key(2, impl="rbg"))  # compiles sooner
            cache[config] = jax.jit(network.__call__), params, testing.lively(network)
        return cache[config]

    return get


@BOTH
def test_output_is_zero_before_training_and_not_after(config, compiled):
    network, params, moved = compiled(config)
    x, cond = inputs(config)
    assert network(params, x, TIME, cond).shape == x.shape
    assert not network(params, x, TIME, cond).any()
    assert network(moved, x, TIME, cond).std() > 1e-2


@BOTH
def test_padding_changes_nothing_and_tokens_do(config, compiled):
    network, _, params = compiled(config)
    x, cond = inputs(config)
    y = network(params, x, TIME, cond)
    padded = dataclasses.replace(cond, text=jnp.where(cond.text_mask[:, :, None], cond.text, 1e6))
    np.testing.assert_array_equal(network(params, x, TIME, padded), y)
    moved = dataclasses.replace(cond, text=cond.text.at[:, 1].multiply(-1))
    assert abs(network(params, x, TIME, moved) - y).max(axis=(1, 2, 3)).min() > 1e-3


@BOTH
def test_dropped_row_is_the_null_condition_and_the_other_row_is_untouched(config, compiled):
    network, _, params = compiled(config)
    x, cond = inputs(config)
    y, null = network(params, x, TIME, cond), network(params, x, TIME, cond.null())
    dropped = network(params, x, TIME, cond.dropped(jnp.array([True, False])))
    np.testing.assert_array_equal(dropped[0], null[0])
    np.testing.assert_array_equal(dropped[1], y[1])
    assert jnp.isfinite(null).all()
    assert abs(y[0] - null[0]).max() > 1e-3


@BOTH
def test_images_of_a_batch_do_not_see_each_other(config, compiled):
    network, _, params = compiled(config)
    x, cond = inputs(config)
    y = network(params, x, TIME, cond)
    other = network(params, x.at[0].multiply(2), TIME.at[0].set(500.0), cond)
    np.testing.assert_array_equal(other[1], y[1])
    assert abs(other[0] - y[0]).max() > 1e-3


@BOTH
def test_time_is_used(config, compiled):
    network, _, params = compiled(config)
    x, cond = inputs(config)
    y = network(params, x, TIME, cond)
    later = network(params, x, TIME + 100, cond)
    assert abs(later - y).max(axis=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("field,change", [("lowres", 0.5), ("lowres_time", 200.0)])
def test_super_resolution_uses_the_picture_and_its_level(field, change, compiled):
    network, _, params = compiled(SUPER)
    x, cond = inputs(SUPER)
    moved = dataclasses.replace(cond, **{field: getattr(cond, field) + change})
    difference = network(params, x, TIME, moved) - network(params, x, TIME, cond)
    assert abs(difference).max(axis=(1, 2, 3)).min() > 1e-3


@BOTH
def test_gradient_reaches_every_parameter_and_remat_agrees(config, compiled):
    _, _, params = compiled(config)
    x, cond = inputs(config)

    def gradients(config):
        network = Network(config)
        loss = lambda params: jnp.mean(jnp.square(network(params, x, TIME, cond) - x))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain = gradients(config)
    remat = gradients(dataclasses.replace(config, remat="nothing_saveable"))
    for path, g in jax.tree.leaves_with_path(plain):
        # A bias of keys cancels in the softmax: only then is a gradient of zero right.
        assert abs(g).max() > 1e-8, jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), plain, remat)


@BOTH
def test_bfloat16_is_close_to_float32_and_returns_float32(config, compiled):
    network, _, params = compiled(config)
    x, cond = inputs(config)
    y = network(params, x, TIME, cond)
    half = Network(dataclasses.replace(config, compute_dtype="bfloat16"))
    y_half = jax.jit(half.__call__)(params, x, TIME, cond)
    assert y.dtype == y_half.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(y_half - y)) / jnp.mean(jnp.square(y)))
    assert 1e-6 < error < 0.05


def test_without_self_attention_it_runs_at_other_sizes_than_its_crop(compiled):
    network, _, params = compiled(SUPER)
    x, cond = inputs(SUPER, size=16)
    assert jnp.isfinite(network(params, x, TIME, cond)).all()


def test_with_coordinates_alone_does_a_plain_picture_differ_beyond_the_reach_of_its_edges():
    def middle(coordinates):
        level = Level(width=8, blocks=1)
        config = UNetConfig(levels=(level,), head_width=8, coordinates=coordinates)
        network = Network(config)
        params = testing.lively(network)
        y = jax.jit(network.__call__)(params, jnp.ones((1, 32, 32, 3)), TIME[:1], Conditioning())
        return np.asarray(y[0, 14:18, 14:18])

    np.testing.assert_allclose(
        middle(False), np.broadcast_to(middle(False)[0, 0], (4, 4, 3)), atol=1e-5
    )
    placed = middle(True)
    assert abs(placed[0] - placed[-1]).min() > 1e-3
    assert abs(placed[:, 0] - placed[:, -1]).min() > 1e-3


def test_dropout_needs_a_key_and_follows_it(compiled):
    network = Network(dataclasses.replace(BASE, dropout=0.5))
    _, _, params = compiled(BASE)
    x, cond = inputs(BASE)
    y = jax.jit(network.__call__)
    a, b = y(params, x, TIME, cond, jax.random.key(0)), y(params, x, TIME, cond, jax.random.key(1))
    np.testing.assert_array_equal(a, y(params, x, TIME, cond, jax.random.key(0)))
    assert abs(a - b).max() > 1e-3
    np.testing.assert_allclose(
        y(params, x, TIME, cond), compiled(BASE)[0](params, x, TIME, cond), atol=1e-5
    )


def test_parameters_are_named_by_strings_and_stacked_blocks_start_out_different(compiled):
    network = Network(BASE)
    _, params, _ = compiled(BASE)
    assert params["encoder"]["0"]["rest"]["residual"]["conv1"]["kernel"].shape == (2, 3, 3, 8, 8)
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), network.abstract())
    kernels = params["encoder"]["0"]["rest"]["residual"]["conv1"]["kernel"]
    assert abs(kernels[0] - kernels[1]).max() > 1e-2


def test_program_does_not_grow_with_depth():
    def lines(blocks):
        network = Network(UNetConfig(levels=(Level(width=8, blocks=blocks),), head_width=8))
        arguments = (network.abstract(), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), Conditioning())
        return jax.jit(network.__call__).lower(*arguments).as_text().count("\n")

    assert lines(12) < 1.3 * lines(3)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: UNetConfig(levels=()), "UNetConfig.levels must hold at least one"),
        (lambda: UNetConfig(levels=(Level(width=12, blocks=1),)), "multiple of 8.*got 12"),
        (lambda: UNetConfig(levels=(Level(width=8, blocks=0),)), r"levels\[0\].blocks.*got 0"),
        (lambda: dataclasses.replace(BASE, head_width=6), r"multiple of head_width=6.*got"),
        (lambda: dataclasses.replace(BASE, patch=0), "patch must be at least 1, got 0"),
        (lambda: dataclasses.replace(BASE, dropout=1.0), r"dropout must be in \[0, 1\), got 1"),
        (lambda: dataclasses.replace(SUPER, text_width=0), "text_attention needs text_width"),
        (
            lambda: EfficientUNetConfig(levels=(EfficientLevel(width=8, blocks=1, stride=0),)),
            "stride must be at least 1, got 0",
        ),
    ],
)
def test_a_config_that_cannot_be_built_says_which_field(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "config,size,drop,message",
    [
        (BASE, 9, None, "multiples of 2 .*got 9x9"),
        (SUPER, 6, None, "multiples of 4 .*got 6x6"),
        (BASE, 8, "text", r"text_width is 6.*\[b, l, 6\].*got None"),
        (SUPER, 8, "lowres", "lowres must be resized to the 8x8"),
    ],
)
def test_a_call_that_cannot_work_says_why(config, size, drop, message):
    x, cond = inputs(config, size)
    if drop:
        cond = dataclasses.replace(cond, **{drop: None})
    network = Network(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.__call__, network.abstract(), x, TIME, cond)


def test_decoder_takes_every_skip_of_the_encoder():
    def made_and_left():
        network = UNet(BASE, nnx.Rngs(0))
        context = network.embed(TIME, inputs(BASE)[1])
        skips = [h := jnp.zeros((2, 8, 8, 8))]
        for level in network.encoder:
            h, outputs = level(h, context, None)
            skips += outputs
        made = len(skips)
        for level in reversed(network.decoder):
            h = level(h, context, skips, None)
        return made, len(skips)

    # conv_in, 3 blocks and a downsampling one, 1 block
    assert nnx.eval_shape(lambda: jnp.zeros(made_and_left())).shape == (6, 0)
