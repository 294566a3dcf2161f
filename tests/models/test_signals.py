"""The three ways in which a network is told things reach it, and nothing else does."""

import dataclasses

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
    Signals,
    UNetConfig,
    Widths,
)
from cascade.models.blocks import context_of
from cascade.models.signals import PooledText, TimeEmbedding, check_signals, together

WIDTHS = Widths(channels=3, tokens=6)
BASE = UNetConfig(levels=(Level(width=8, blocks=1, attention=True),), head_width=8)
SUPER = EfficientUNetConfig(
    levels=(EfficientLevel(width=8, blocks=1, stride=1, text_attention=True),), head_width=8
)
BOTH = pytest.mark.parametrize("config", [BASE, SUPER], ids=["base", "super"])
TIME = jnp.array([20.0, 700.0])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, TOKENS, VISIBLE = normal(0, 2, 4, 4, 3), normal(1, 2, 3, 6), jnp.ones((2, 3), bool)
ONE, TWO = normal(2, 2, 4, 4, 1), normal(3, 2, 4, 4, 2)
TOLD = Signals(channels=(ONE, TWO), vectors=(), tokens=TOKENS, mask=VISIBLE)


@pytest.fixture(scope="module")
def called():
    """(config, params, **changes of TOLD) -> the output; each kind of call compiled once."""
    compiled = {}

    def call(config, params, **changes):
        network = compiled.setdefault(config, jax.jit(Network(config, WIDTHS).__call__))
        return np.asarray(network(params, X, TIME, dataclasses.replace(TOLD, **changes)))

    return call


def changed(params, path, change):
    """The parameters with one of them, by its path, changed."""
    name, _, rest = path.partition("/")
    return params | {name: changed(params[name], rest, change) if rest else change(params[name])}


@BOTH
def test_channels_lie_behind_those_of_x_in_the_order_told(config, called):
    params = testing.lively(Network(config, WIDTHS))
    y = called(config, params)
    together = called(config, params, channels=(jnp.concatenate([ONE, TWO], axis=-1),))
    np.testing.assert_allclose(together, y, atol=1e-5)
    turned = called(config, params, channels=(TWO, ONE))
    assert abs(turned - y).max(axis=(1, 2, 3)).min() > 1e-3
    # The other order is that of the first convolution's inputs.
    order = np.array([0, 1, 2, 5, 3, 4])
    turned_too = changed(params, "conv_in/kernel", lambda k: k.at[:, :, order].set(k))
    np.testing.assert_allclose(called(config, turned_too, channels=(TWO, ONE)), y, atol=1e-5)


@BOTH
def test_vectors_are_added_to_the_embedding_of_time(config, called):
    params, one, two = testing.lively(Network(config, WIDTHS)), normal(4, 32), normal(5, 32)
    both = called(config, params, vectors=tuple(jnp.stack([v, v]) for v in (one, two)))
    biased = changed(params, "time/out/bias", lambda b: b + one + two)
    np.testing.assert_allclose(both, called(config, biased), atol=1e-4)
    assert abs(both - called(config, params)).max(axis=(1, 2, 3)).min() > 1e-3


def test_vectors_are_added_one_after_the_other():
    """In float32, where 1 beside 1e9 is lost, an order is a result of its own."""
    embed = TimeEmbedding(8, 4, nnx.Rngs(0))
    one, large = jnp.ones((2, 4)), jnp.full((2, 4), 1e9)
    late, early = (
        context_of(embed, TIME, Signals(vectors=vectors)).emb
        for vectors in ((large, -large, one), (one, large, -large))
    )
    np.testing.assert_array_equal(late, jax.nn.silu(jnp.ones((2, 4))))
    np.testing.assert_array_equal(early, jnp.zeros((2, 4)))


@BOTH
def test_masked_tokens_are_invisible_and_others_are_not(config, called):
    params, mask = testing.lively(Network(config, WIDTHS)), VISIBLE.at[:, 2].set(False)
    y = called(config, params, mask=mask)
    hidden, seen = (TOKENS.at[:, i].set(1e6) for i in (2, 1))
    np.testing.assert_array_equal(called(config, params, mask=mask, tokens=hidden), y)
    assert abs(called(config, params, mask=mask, tokens=seen) - y).max() > 1e-3
    fewer = called(config, params, mask=VISIBLE[:, :2], tokens=TOKENS[:, :2])
    np.testing.assert_allclose(fewer, y, atol=1e-5)


@BOTH
def test_a_network_that_is_told_nothing_needs_no_signals(config):
    if config == SUPER:
        level = dataclasses.replace(config.levels[0], text_attention=False)
        config = dataclasses.replace(config, levels=(level,))
    network = Network(config, Widths())
    y = jax.jit(network.__call__)(testing.lively(network), X, TIME, Signals())
    assert y.shape == X.shape and y.std() > 1e-2


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"channels": (ONE, ONE, ONE)}, None),
        ({"channels": (ONE,)}, r"net was built for 3 channels.*\[2, 4, 4, 3\] in all, got.*4, 1"),
        ({"channels": ()}, "3 channels behind those of x.*got none"),
        ({"channels": (ONE, TWO, ONE)}, r"3 channels.*got \[.*1\), .*2\), .*1\)\]"),
        ({"channels": (ONE, TWO[:, :2])}, r"\[2, 4, 4, 3\] in all, got.*\(2, 2, 4, 2\)"),
        ({"channels": (ONE[:1], TWO[:1])}, r"got.*\(1, 4, 4, 1\)"),
        ({"tokens": None, "mask": None}, r"tokens of width 6.*\[b, l, 6\].*got None"),
        ({"tokens": TOKENS[:, :, :5]}, r"\[b, l, 6\].*got \(2, 3, 5\)"),
        ({"mask": None}, "with their mask"),
    ],
)
def test_signals_of_other_widths_than_a_network_was_built_for_are_refused(change, message):
    signals = dataclasses.replace(TOLD, **change)
    if message is None:
        return check_signals("net", WIDTHS, X, signals)
    with pytest.raises(ValueError, match=message):
        check_signals("net", WIDTHS, X, signals)


def test_tokens_are_refused_where_a_network_has_no_place_for_them():
    with pytest.raises(ValueError, match=r"or None where that is 0; got \(2, 3, 6\)"):
        check_signals("net", Widths(channels=3), X, TOLD)


def test_signals_of_several_are_joined_in_order():
    other = Signals(vectors=(normal(6, 2, 8),), tokens=normal(7, 2, 1, 6), mask=VISIBLE[:, :1])
    third = Signals(channels=(TWO,), vectors=(normal(8, 2, 8),))
    joined = together([TOLD, other, third])
    assert [c.shape[-1] for c in joined.channels] == [1, 2, 2]
    assert joined.vectors == (other.vectors[0], third.vectors[0])
    np.testing.assert_array_equal(joined.tokens, jnp.concatenate([TOKENS, other.tokens], axis=1))
    assert joined.mask.shape == (2, 4)
    nothing = together([third, Signals()])
    assert nothing.tokens is None and nothing.mask is None
    assert together([]) == Signals()


@pytest.mark.parametrize("context_width", [None, 5])
def test_a_text_is_pooled_into_a_vector_and_told_token_by_token_behind_a_null_token(context_width):
    pooled = PooledText(6, 16, head_width=8, context_width=context_width, rngs=nnx.Rngs(0))
    mask = VISIBLE.at[1].set(False)
    told = pooled(TOKENS, mask)
    assert told.channels == () and [v.shape for v in told.vectors] == [(2, 16)]
    assert told.tokens.shape == (2, 4, context_width or 6)
    np.testing.assert_array_equal(told.mask, [[True] * 4, [True, False, False, False]])
    # Nothing is left of the text of the second row, neither in the tokens seen nor in the vector.
    other = pooled(TOKENS.at[1].multiply(-3), mask)
    np.testing.assert_array_equal(other.vectors[0], told.vectors[0])
    np.testing.assert_array_equal(other.tokens[1, 0], told.tokens[1, 0])
    np.testing.assert_array_equal(told.tokens[0, 0], told.tokens[1, 0])
    # However much padding there is.
    wider = [jnp.pad(x, ((0, 0), (0, 5), (0, 0))[: x.ndim]) for x in (TOKENS, mask)]
    np.testing.assert_allclose(pooled(*wider).vectors[0], told.vectors[0], atol=1e-6)
    assert jnp.isfinite(told.vectors[0]).all()
    assert abs(pooled(-TOKENS, mask).vectors[0] - told.vectors[0])[0].max() > 1e-3
