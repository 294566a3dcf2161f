"""The networks, both kinds: what they promise whatever their weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade import testing
from cascade.models import (
    EfficientLevel,
    EfficientUNetConfig,
    Level,
    Network,
    NetworkConfig,
    Signals,
    UNetConfig,
    Widths,
)
from cascade.models.blocks import context_of
from cascade.models.signals import PooledText, TimeEmbedding, together
from cascade.models.unet import UNet

BASE = UNetConfig(
    levels=(Level(width=8, blocks=3), Level(width=16, blocks=1, attention=True)), head_width=8
)
SUPER = EfficientUNetConfig(
    levels=(
        EfficientLevel(width=8, blocks=2, stride=1),
        EfficientLevel(width=16, blocks=1, text_attention=True),
    ),
    patch=2,
    head_width=8,
)
WIDTHS = {BASE: Widths(tokens=6), SUPER: Widths(channels=3, tokens=6)}
BOTH = pytest.mark.parametrize("config", [BASE, SUPER], ids=["base", "super"])
TIME = jnp.array([20.0, 700.0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What the networks are told here: a text, and SUPER a picture [b, h, w, 3] and its level."""

    text: Any
    mask: Any
    lowres: Any = None
    level: Any = None

    def null(self):
        blank = {"text": jnp.zeros_like(self.text), "mask": jnp.zeros_like(self.mask)}
        return dataclasses.replace(self, **blank)

    def dropped(self, drop):
        return jax.tree.map(
            lambda null, told: jnp.where(drop.reshape(-1, *[1] * (told.ndim - 1)), null, told),
            self.null(),
            self,
        )


@dataclasses.dataclass(frozen=True)
class Told:
    """A network with the modules that turn a Said into its signals, as a stage puts them
    together; all of them learn."""

    config: NetworkConfig
    widths: Widths

    def build(self, *, rngs):
        return _Told(self.config, self.widths, rngs)


class _Told(nnx.Module):
    def __init__(self, config, widths, rngs):
        self.network = config.build(widths, rngs=rngs)
        emb, sizes = config.embedding_width, {"head_width": 8, "context_width": None}
        self.text = PooledText(6, emb, **sizes, rngs=rngs)
        self.level = TimeEmbedding(config.time_width, emb, rngs) if widths.channels else None

    def __call__(self, x, time, said, key=None):
        signals = [self.text(said.text, said.mask)]
        if self.level is not None:
            signals.append(Signals(channels=(said.lowres,), vectors=(self.level(said.level),)))
        return self.network(x, time, together(signals), key)


def told(config, **changes):
    return Network(Told(dataclasses.replace(config, **changes), WIDTHS[config]))


def inputs(config, size=8, tokens=4):
    """Two noisy images, the second with fewer tokens than the first."""
    k_x, k_text, k_lowres = jax.random.split(jax.random.key(0), 3)
    said = Said(
        text=jax.random.normal(k_text, (2, tokens, 6)),
        mask=jnp.arange(tokens) < jnp.array([[tokens], [2]]),
    )
    if WIDTHS[config].channels:
        lowres = jax.random.uniform(k_lowres, (2, size, size, 3), minval=-1, maxval=1)
        said = dataclasses.replace(said, lowres=lowres, level=jnp.array([10.0, 300.0]))
    return jax.random.normal(k_x, (2, size, size, 3)), said


def signals_of(config, size=8, tokens=4):
    """(x, Signals) of the widths that a network of that config is built for."""
    x, said = inputs(config, size, tokens)
    channels = () if said.lowres is None else (said.lowres,)
    return x, Signals(channels=channels, tokens=said.text, mask=said.mask)


@pytest.fixture(scope="module")
def compiled():
    """config -> (network compiled once, its parameters as initialised, and lively)."""
    cache = {}

    def get(config):
        if config not in cache:
            network = told(config)
            params = jax.jit(network.init)(jax.random.key(2, impl="rbg"))  # compiles sooner
            cache[config] = jax.jit(network.__call__), params, testing.lively(network)
        return cache[config]

    return get


@BOTH
def test_output_is_zero_before_training_and_not_after(config, compiled):
    network, params, moved = compiled(config)
    x, said = inputs(config)
    assert network(params, x, TIME, said).shape == x.shape
    assert not network(params, x, TIME, said).any()
    assert network(moved, x, TIME, said).std() > 1e-2


@BOTH
def test_padding_changes_nothing_and_tokens_do(config, compiled):
    network, _, params = compiled(config)
    x, said = inputs(config)
    y = network(params, x, TIME, said)
    padded = dataclasses.replace(said, text=jnp.where(said.mask[:, :, None], said.text, 1e6))
    np.testing.assert_array_equal(network(params, x, TIME, padded), y)
    moved = dataclasses.replace(said, text=said.text.at[:, 1].multiply(-1))
    assert abs(network(params, x, TIME, moved) - y).max(axis=(1, 2, 3)).min() > 1e-3


@BOTH
def test_dropped_row_is_the_null_condition_and_the_other_row_is_untouched(config, compiled):
    network, _, params = compiled(config)
    x, said = inputs(config)
    y, null = network(params, x, TIME, said), network(params, x, TIME, said.null())
    dropped = network(params, x, TIME, said.dropped(jnp.array([True, False])))
    np.testing.assert_array_equal(dropped[0], null[0])
    np.testing.assert_array_equal(dropped[1], y[1])
    assert jnp.isfinite(null).all()
    assert abs(y[0] - null[0]).max() > 1e-3


@BOTH
def test_images_of_a_batch_do_not_see_each_other(config, compiled):
    network, _, params = compiled(config)
    x, said = inputs(config)
    y = network(params, x, TIME, said)
    other = network(params, x.at[0].multiply(2), TIME.at[0].set(500.0), said)
    np.testing.assert_array_equal(other[1], y[1])
    assert abs(other[0] - y[0]).max() > 1e-3


@BOTH
def test_time_is_used(config, compiled):
    network, _, params = compiled(config)
    x, said = inputs(config)
    y = network(params, x, TIME, said)
    later = network(params, x, TIME + 100, said)
    assert abs(later - y).max(axis=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("field,change", [("lowres", 0.5), ("level", 200.0)])
def test_super_resolution_uses_the_picture_and_its_level(field, change, compiled):
    network, _, params = compiled(SUPER)
    x, said = inputs(SUPER)
    moved = dataclasses.replace(said, **{field: getattr(said, field) + change})
    difference = network(params, x, TIME, moved) - network(params, x, TIME, said)
    assert abs(difference).max(axis=(1, 2, 3)).min() > 1e-3


@BOTH
def test_gradient_reaches_every_parameter_and_remat_agrees(config, compiled):
    _, _, params = compiled(config)
    x, said = inputs(config)

    def gradients(**changes):
        network = told(config, **changes)
        loss = lambda params: jnp.mean(jnp.square(network(params, x, TIME, said) - x))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain = gradients()
    remat = gradients(remat="nothing_saveable")
    for path, g in jax.tree.leaves_with_path(plain):
        # A bias of keys cancels in the softmax: only then is a gradient of zero right.
        assert abs(g).max() > 1e-8, jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), plain, remat)


@BOTH
def test_bfloat16_is_close_to_float32_and_returns_float32(config, compiled):
    network, _, params = compiled(config)
    x, said = inputs(config)
    y = network(params, x, TIME, said)
    half = told(config, compute_dtype="bfloat16")
    y_half = jax.jit(half.__call__)(params, x, TIME, said)
    assert y.dtype == y_half.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(y_half - y)) / jnp.mean(jnp.square(y)))
    assert 1e-6 < error < 0.05


def test_without_self_attention_it_runs_at_other_sizes_than_its_crop(compiled):
    network, _, params = compiled(SUPER)
    x, said = inputs(SUPER, size=16)
    assert jnp.isfinite(network(params, x, TIME, said)).all()


def test_with_coordinates_alone_does_a_plain_picture_differ_beyond_the_reach_of_its_edges():
    def middle(coordinates):
        level = Level(width=8, blocks=1)
        config = UNetConfig(levels=(level,), head_width=8, coordinates=coordinates)
        network = Network(config, Widths())
        params = testing.lively(network)
        y = jax.jit(network.__call__)(params, jnp.ones((1, 32, 32, 3)), TIME[:1], Signals())
        return np.asarray(y[0, 14:18, 14:18])

    np.testing.assert_allclose(
        middle(False), np.broadcast_to(middle(False)[0, 0], (4, 4, 3)), atol=1e-5
    )
    placed = middle(True)
    assert abs(placed[0] - placed[-1]).min() > 1e-3
    assert abs(placed[:, 0] - placed[:, -1]).min() > 1e-3


def test_dropout_needs_a_key_and_follows_it(compiled):
    network = told(BASE, dropout=0.5)
    _, _, params = compiled(BASE)
    x, said = inputs(BASE)
    y = jax.jit(network.__call__)
    a, b = y(params, x, TIME, said, jax.random.key(0)), y(params, x, TIME, said, jax.random.key(1))
    np.testing.assert_array_equal(a, y(params, x, TIME, said, jax.random.key(0)))
    assert abs(a - b).max() > 1e-3
    np.testing.assert_allclose(
        y(params, x, TIME, said), compiled(BASE)[0](params, x, TIME, said), atol=1e-5
    )


def test_parameters_are_named_by_strings_and_stacked_blocks_start_out_different(compiled):
    network = Network(BASE, WIDTHS[BASE])
    params = compiled(BASE)[1]["network"]
    assert params["encoder"]["0"]["rest"]["residual"]["conv1"]["kernel"].shape == (2, 3, 3, 8, 8)
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), network.abstract())
    kernels = params["encoder"]["0"]["rest"]["residual"]["conv1"]["kernel"]
    assert abs(kernels[0] - kernels[1]).max() > 1e-2


def test_program_does_not_grow_with_depth():
    def lines(blocks):
        config = UNetConfig(levels=(Level(width=8, blocks=blocks),), head_width=8)
        network = Network(config, Widths())
        arguments = (network.abstract(), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), Signals())
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
        (lambda: SUPER.check(Widths(channels=3)), r"levels\[1\].text_attention needs tokens"),
        (
            lambda: EfficientUNetConfig(levels=(EfficientLevel(width=8, blocks=1, stride=0),)),
            "stride must be at least 1, got 0",
        ),
    ],
)
def test_a_config_that_cannot_be_built_says_which_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "config,size,change,message",
    [
        (BASE, 9, {}, "multiples of 2 .*got 9x9"),
        (SUPER, 6, {}, "multiples of 4 .*got 6x6"),
        (BASE, 8, {"tokens": None}, r"tokens of width 6.*\[b, l, 6\].*got None"),
        (SUPER, 8, {"channels": ()}, r"channels must be \[2, 8, 8, 3\] in all, got none"),
        (SUPER, 8, {"channels": (jnp.zeros((2, 4, 4, 3)),)}, r"\[2, 8, 8, 3\].*got.*\(2, 4, 4, 3"),
        (BASE, 8, {"vectors": (jnp.zeros((2, 1)),)}, r"vectors must be \[2, 32\].*got \(2, 1\)"),
    ],
)
def test_a_call_that_cannot_work_says_why(config, size, change, message):
    x, signals = signals_of(config, size)
    network = Network(config, WIDTHS[config])
    with pytest.raises(ValueError, match=message):
        changed = dataclasses.replace(signals, **change)
        jax.eval_shape(network.__call__, network.abstract(), x, TIME, changed)


def test_decoder_takes_every_skip_of_the_encoder():
    def made_and_left():
        network = UNet(BASE, WIDTHS[BASE], nnx.Rngs(0))
        context = context_of(network.time, TIME, signals_of(BASE)[1])
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
