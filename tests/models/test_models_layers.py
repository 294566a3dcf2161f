"""The layers, each against a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cascade.models import blocks, layers
from cascade.models.signals import sinusoids


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention(masked):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 12)).astype(np.float32) for n in (5, 7, 7))
    mask = np.arange(7) < np.array([[7], [3]]) if masked else None
    expected = np.zeros_like(q)
    for b in range(2):
        seen = mask[b] if masked else np.full(7, True)
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for n in range(5):
                logits = k[b, seen, part] @ q[b, n, part] / 2
                weights = np.exp(logits) / np.exp(logits).sum()
                expected[b, n, part] = weights @ v[b, seen, part]
    actual = layers.attend(
        *map(jnp.asarray, (q, k, v)), mask if mask is None else jnp.asarray(mask), 4
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("image", [True, False])
def test_attention_appends_text_to_the_keys_of_the_image(image):
    """A token is visible from every pixel, and pixels from each other only with image=True."""
    module = blocks.Attention(8, 4, image=image, token_width=6, rngs=nnx.Rngs(0))
    module.out.kernel[...] = jax.random.normal(jax.random.key(0), (8, 8))
    x, text = jax.random.normal(jax.random.key(1), (1, 2, 2, 8)), jnp.ones((1, 3, 6))
    mask = jnp.array([[True, True, False]])

    def run(text):
        context = blocks.Context(jnp.zeros((1, 4)), text, mask)
        return jax.jit(module.__call__)(x, context) - x

    y = run(text)
    assert (abs(run(text.at[0, 1].set(-2.0)) - y).max(axis=-1) > 1e-3).all()
    np.testing.assert_array_equal(run(text.at[0, 2].set(-2.0)), y)
    # All visible tokens are equal, so pure cross-attention returns one value at every pixel.
    assert (abs(y - y[:, :1, :1]).max() > 1e-3) == image


@pytest.mark.parametrize("coordinates", [False, True])
def test_attention_with_coordinates_alone_asks_by_place(coordinates):
    """Of two tokens, pixels that all show the same see the one more, the further along they are."""
    module = blocks.Attention(
        8, 4, image=False, token_width=6, coordinates=coordinates, rngs=nnx.Rngs(0)
    )
    module.out.kernel[...] = jnp.eye(8)
    text = jax.random.normal(jax.random.key(0), (1, 2, 6))
    context = blocks.Context(jnp.zeros((1, 4)), text, jnp.ones((1, 2), bool))
    y = jax.jit(module.__call__)(jnp.zeros((1, 4, 4, 8)), context)[0]
    # A head's output lies on the line between two values: steps along a column have one sign.
    steps = jnp.diff(y, axis=0)
    assert (jnp.sign(steps) == jnp.sign(steps[:1])).all()
    assert (abs(steps).min() > 1e-4) == coordinates
    np.testing.assert_allclose(layers.coordinates(jnp.ones((1, 2, 4, 1)))[0, 1, 0], (0.5, -0.75))


def test_coordinates_tell_all_rows_of_a_large_picture_apart_in_bfloat16():
    rows = layers.coordinates(jnp.ones((1, 256, 1, 1), jnp.bfloat16))[0, :, 0, 0]
    assert rows.dtype == jnp.bfloat16 and len(np.unique(np.asarray(rows, np.float32))) == 256


@pytest.mark.parametrize("width", [24, 128])
def test_group_norm_agrees_with_flax(width):
    x = 2 * jax.random.normal(jax.random.key(0), (2, 4, 6, width)) + 1
    ours = layers.GroupNorm(width)
    theirs = nnx.GroupNorm(width, num_groups=ours.groups, epsilon=1e-5, rngs=nnx.Rngs(0))
    ours.scale[...] = theirs.scale[...] = jax.random.normal(jax.random.key(1), (width,))
    ours.bias[...] = theirs.bias[...] = jax.random.normal(jax.random.key(2), (width,))
    expected = theirs(x)
    np.testing.assert_allclose(ours(x), expected, atol=1e-4)
    scale, shift = jax.random.normal(jax.random.key(3), (2, 2, width))
    film = jnp.concatenate([scale, shift], axis=-1)
    expected = expected * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(ours(x, film), expected, atol=1e-4)
    np.testing.assert_allclose(ours(x, film, activate=True), jax.nn.silu(expected), atol=1e-4)


@pytest.mark.parametrize("width,groups", [(8, 2), (16, 4), (96, 24), (128, 32), (192, 32)])
def test_groups_hold_four_channels_until_there_are_32(width, groups):
    assert layers.group_count(width) == groups


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_conv3x3_are_those_jax_derives(stride):
    """On a CPU ours are written by hand; also inside a loop."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 5))

    def reference(x, kernel, stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    def gradients(conv):
        loss = lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel, stride)))  # noqa: E731
        return jax.jit(lambda: (loss(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)))()

    for ours, theirs in zip(gradients(layers.conv3x3), gradients(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_stacked_blocks_run_one_after_the_other_each_with_its_skip():
    make = lambda rngs: blocks.Block(blocks.ResBlock(16, 8, 4, rngs=rngs))  # noqa: E731
    stacked = layers.stack(make, 3, nnx.Rngs(0))
    graphdef, params = nnx.split(stacked)
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    h = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    skips = list(jax.random.normal(jax.random.key(1), (3, 1, 4, 4, 8)))
    context = blocks.Context(jnp.ones((1, 4)), None, None)
    expected = []
    for i in range(3):
        block = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))
        expected.append(block(expected[-1] if expected else h, context, skips[i]))
    last, outputs = layers.run_stack(nnx.merge(graphdef, params), False, h, context, skips)
    np.testing.assert_allclose(last, expected[-1], atol=1e-5)
    np.testing.assert_allclose(jnp.stack(outputs), jnp.stack(expected), atol=1e-5)


def test_space_to_depth_keeps_squares_together_and_round_trips():
    x = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
    packed = layers.space_to_depth(x, 4)
    assert packed.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(packed[1, 1, 2].reshape(4, 4, 3), x[1, 4:8, 8:12])
    np.testing.assert_array_equal(layers.depth_to_space(packed, 4), x)


def test_shrink_averages_and_enlarge_repeats_squares():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.shrink(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(layers.enlarge(x, 3), x.repeat(3, axis=1).repeat(3, axis=2))


def test_sinusoids_tell_neighbouring_times_apart():
    time = jnp.array([0.0, 1.0, 2.0, 500.0, 999.0, 1000.0])
    waves = sinusoids(time, 16)
    assert waves.shape == (6, 16)
    np.testing.assert_allclose(waves[0], [1] * 8 + [0] * 8, atol=1e-6)
    np.testing.assert_allclose(waves[1, 0], np.cos(1), atol=1e-6)
    distance = jnp.linalg.norm(waves[:, None] - waves[None], axis=-1)
    assert (distance + 10 * jnp.eye(6)).min() > 0.5
