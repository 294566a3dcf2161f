"""Scenes drawn by JAX, against those drawn by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.data.transforms import block_means
from cascade.scenes import device
from cascade.scenes.render import render
from cascade.scenes.spec import FINISHES, SHAPES, scene_at

SCENES = [scene_at(1, i, "unseen") for i in range(24)]


def assert_same(drawn, expected):
    """But for the last bit of a float32, which can be a level of 255."""
    difference = np.abs(np.asarray(drawn).astype(int) - np.stack(expected))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_the_scenes_drawn_have_every_shape_and_finish():
    objects = [item for scene in SCENES for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.finish for item in objects} == set(FINISHES)


@pytest.mark.parametrize("side", [32, 64, 256])
def test_whole_pictures_are_those_of_the_host(side):
    draw = jax.jit(device.draw, static_argnums=1)
    pictures = draw(device.layouts(SCENES), side)
    assert pictures.shape == (24, side, side, 3) and pictures.dtype == jnp.uint8
    assert_same(pictures, [render(scene, side) for scene in SCENES])


def test_windows_are_those_of_the_host():
    corner = np.random.default_rng(0).integers(0, 256 - 64, (24, 2))
    draw = jax.jit(device.draw, static_argnums=(1, 3))
    pictures = draw(device.layouts(SCENES), 256, jnp.asarray(corner, jnp.int32), 64)
    windows = [(int(y), int(x), 64) for y, x in corner]
    assert_same(pictures, [render(s, 256, w) for s, w in zip(SCENES, windows, strict=True)])


def test_means_over_blocks_are_those_of_the_host():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    expected = [block_means(picture, 4) for picture in pictures]
    np.testing.assert_array_equal(device.block_means(jnp.asarray(pictures), 4), expected)
