"""Scenes on the device: arrays that describe them, and the pictures of `render` drawn by JAX.

A GPU draws these faster than any number of workers could send them. Rounding aside (a level of 255
here and there) a picture is the one that `render.render` draws.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from cascade import images
from cascade.scenes import render, spec
from cascade.scenes.spec import Scene

MOST = 4  # objects of a scene


class Layouts(NamedTuple):
    """Scenes as arrays: indices into spec's tuples, lengths in units of the picture's width.

    background int32 [b]; shape, colour and finish int32, x, y and radius float32, all [b, 4] in
    drawing order. An object that is not there has radius 0.
    """

    background: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    finish: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def layouts(scenes: Sequence[Scene]) -> Layouts:
    """The arrays of so many scenes, on the host."""
    found = Layouts(
        np.array([spec.BACKGROUNDS.index(scene.background) for scene in scenes], np.int32),
        *(np.zeros((len(scenes), MOST), np.int32) for _ in range(3)),
        *(np.zeros((len(scenes), MOST), np.float32) for _ in range(3)),
    )
    for row, scene in enumerate(scenes):
        for i, item in enumerate(scene.objects):
            found.shape[row, i] = spec.SHAPES.index(item.shape)
            found.colour[row, i] = spec.COLOURS.index(item.colour)
            found.finish[row, i] = spec.FINISHES.index(item.finish)
            found.x[row, i], found.y[row, i] = item.x, item.y
            found.radius[row, i] = item.radius
    return found


def draw(
    scenes: Layouts,
    resolution: int,
    corner: Int[Array, "b 2"] | None = None,
    size: int | None = None,
) -> UInt8[Array, "b s s 3"]:
    """Pictures at `resolution` pixels squared, or of each a square of `size` pixels at its corner.

    corner: (y, x) of the squares' first pixels; None is the whole picture's.
    """
    side = resolution if size is None else size
    corner = jnp.zeros((len(scenes.background), 2), jnp.int32) if corner is None else corner
    rows, columns = (corner[:, i, None] + jnp.arange(side) for i in (0, 1))
    period = max(resolution // render.PERIODS, 1)
    patterns, grounds, tones = (
        jnp.asarray(table) for table in (_patterns(resolution), _BACKGROUNDS, _TONES)
    )

    def one(background, shape, colour, finish, x, y, radius, rows, columns):
        picture = jnp.broadcast_to(grounds[background], (side, side, 3))
        for i in range(MOST):
            down = (rows + (0.5 - y[i] * resolution))[:, None]
            across = (columns + (0.5 - x[i] * resolution))[None, :]
            distance = jax.lax.switch(shape[i], _DISTANCES, across, down, radius[i] * resolution)
            alpha = jnp.clip(0.5 - distance, 0, 1) * (radius[i] > 0)
            tone, swing = tones[colour[i]]
            pattern = patterns[finish[i]][(rows % period)[:, None], (columns % period)[None, :]]
            drawn = tone + swing * pattern[..., None]
            picture = jnp.floor(picture + alpha[..., None] * (drawn - picture) + 0.5)
        return picture.astype(jnp.uint8)

    given: Any = (*map(jnp.asarray, scenes), rows, columns)
    return jax.vmap(one)(*given)


def block_means(pictures: UInt8[Array, "b h w c"], factor: int) -> UInt8[Array, "b h2 w2 c"]:
    """The means over blocks of factor x factor pixels, rounded, as `transforms.block_means`."""
    means = images.downsample(pictures.astype(jnp.float32), factor)
    return jnp.rint(means).astype(jnp.uint8)


_BACKGROUNDS = np.array([render.BACKGROUNDS[name] for name in spec.BACKGROUNDS], np.float32)
_TONES = np.array([render.tones(name) for name in spec.COLOURS], np.float32)
_DISTANCES = [functools.partial(render.signed_distance, shape, xp=jnp) for shape in spec.SHAPES]


def _patterns(resolution: int) -> np.ndarray:
    """One period of each finish, [finishes, p, p]; a single 0 where finishes vanish."""
    period = max(resolution // render.PERIODS, 1)
    if render.PERIODS % resolution == 0:
        return np.zeros((len(spec.FINISHES), 1, 1), np.float32)
    found = [render.finish_pattern(name, resolution)[:period, :period] for name in spec.FINISHES]
    return np.stack(found)
