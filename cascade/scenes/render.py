"""Pictures of scenes at any resolution, whole or one window of them, from one description.

An object is a signed distance function d, in pixels and negative inside; a pixel takes the object's
colour by the coverage clip(1/2 - d, 0, 1) at its centre. A window of a picture costs its own pixels
only, and equals the crop of the whole picture bit for bit.

A finish moves the object's colour between two tones whose mean over the area is the plain colour:
stripes, dots on a square lattice, or a checkerboard, all of period 1/64 of the width in x and y, at
a phase fixed to the frame. A pixel takes the exact mean of the pattern over its square. At 64
pixels one period is one pixel and the finish vanishes, leaving the plain colour; at 256 (4 pixels a
period) and 1024 (16) it shows. So finishes are for super-resolution to draw, out of the caption,
and the 64-pixel picture cannot tell.
"""

import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from cascade.scenes.spec import (
    CROSS_ARM,
    RING_HOLE,
    STAR_NOTCH,
    Background,
    Colour,
    Finish,
    Object,
    Scene,
    Shape,
)

# sRGB. Any two differ by at least 80 in Euclidean distance; two backgrounds, by at least 60.
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (205, 40, 45),
    "orange": (235, 125, 25),
    "yellow": (228, 205, 50),
    "lime": (135, 205, 45),
    "green": (30, 125, 60),
    "cyan": (45, 195, 210),
    "blue": (40, 80, 205),
    "purple": (130, 50, 155),
    "pink": (235, 120, 185),
    "brown": (125, 72, 36),
}
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "gray": (128, 128, 128),
    "white": (242, 242, 242),
    "black": (16, 16, 16),
    "navy": (20, 28, 80),
    "mint": (168, 228, 195),
    "lavender": (195, 180, 240),
}
PERIODS = 64  # of a finish, across the picture


def render(
    scene: Scene, resolution: int, window: tuple[int, int, int] | None = None
) -> UInt8[np.ndarray, "s s 3"]:
    """Draw the scene at `resolution` pixels squared, or a square part of that.

    window: (y0, x0, size) in pixels of that resolution; None is the whole. Raises ValueError where
    it leaves the picture.
    """
    top, left, side = (0, 0, resolution) if window is None else window
    if resolution < 1 or side < 1 or min(top, left) < 0 or max(top, left) + side > resolution:
        raise ValueError(
            f"window (y0, x0, size) must lie in the picture of {resolution} pixels, "
            f"got {(top, left, side)}"
        )
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        _draw(picture, item, resolution, top, left)
    return picture


def coverage(
    item: Object, resolution: int, rows: tuple[int, int], columns: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
    """How much of each pixel the object covers, in [0, 1].

    The picture has `resolution` pixels squared; rows, columns: half-open ranges of them.
    """
    # Pixel centres are halves: exact in float32, whatever the window.
    y = np.arange(*rows, dtype=np.float32)[:, None] + (0.5 - item.y * resolution)
    x = np.arange(*columns, dtype=np.float32)[None, :] + (0.5 - item.x * resolution)
    distance = signed_distance(item.shape, x, y, item.radius * resolution)
    return np.clip(0.5 - distance, 0, 1)


def signed_distance(shape: Shape, x: Any, y: Any, radius: Any, xp: Any = np) -> Any:
    """How far points at (x, y) from the centre of a shape are outside its outline; inside < 0.

    All in one unit of length, of shapes that broadcast. xp: numpy, or jax.numpy for arrays of JAX.
    """
    return _DISTANCES[shape](x, y, radius, xp)


@functools.lru_cache(maxsize=8)
def finish_pattern(finish: Finish, resolution: int) -> Float[np.ndarray, "s s"]:
    """The finish over the whole picture of `resolution` pixels squared, in [-1, 1].

    Each pixel is the mean over its square of a pattern of +1 and -1, whose mean over every period
    is 0. The array is read-only, for it is shared.
    """
    edges = np.arange(resolution + 1) * (PERIODS / resolution)  # in periods
    if finish == "striped":
        wave = np.diff(_square_wave_integral(edges)) * (resolution / PERIODS)
        pattern = np.broadcast_to(wave[:, None], (resolution, resolution))
    elif finish == "checkered":
        wave = np.diff(_square_wave_integral(edges)) * (resolution / PERIODS)
        pattern = wave[:, None] * wave[None, :]
    elif finish == "dotted":
        area = _dots_integral(edges[None, :], edges[:, None])
        share = np.diff(np.diff(area, axis=0), axis=1) * (resolution / PERIODS) ** 2
        # The integral is a sum of up to 64 x 64 dots: its differences are good to 1e-10 or so.
        pattern = np.round(2 * share - 1, 8)
    else:
        pattern = np.zeros((resolution, resolution))
    pattern = np.ascontiguousarray(pattern, dtype=np.float32)
    pattern.flags.writeable = False
    return pattern


def tones(colour: Colour) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """(the colour, how far a finish moves it up and down), in levels 0..255.

    It moves each channel by 64 levels, or as far as the gamut allows both ways.
    """
    base = np.array(COLOURS[colour], np.float32)
    return base, np.minimum(np.minimum(base, 255 - base), 64).astype(np.float32)


def _draw(picture: np.ndarray, item: Object, resolution: int, top: int, left: int) -> None:
    """Draw the object over `picture`, whose first pixel is (top, left) of the whole."""
    side = len(picture)
    rows, columns = (
        (
            max(int((centre - item.radius) * resolution) - 1, start),
            min(int((centre + item.radius) * resolution) + 2, start + side),
        )
        for centre, start in ((item.y, top), (item.x, left))
    )
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        return
    alpha = coverage(item, resolution, rows, columns)[..., None]
    colour, swing = tones(item.colour)
    if item.finish != "plain" and PERIODS % resolution != 0:
        pattern = finish_pattern(item.finish, resolution)[slice(*rows), slice(*columns)]
        colour = colour + swing * pattern[..., None]
    region = picture[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
    region[:] = region + alpha * (colour - region) + 0.5


# Signed distances to the outlines: x and y from the centre; r, a Python float, leaves float32 so.
# xp: numpy, or jax.numpy for the pictures of device.py.


def _circle(x, y, r, xp):
    return xp.sqrt(x * x + y * y) - r


def _ring(x, y, r, xp):
    distance = xp.sqrt(x * x + y * y)
    return xp.maximum(distance - r, RING_HOLE * r - distance)


def _square(x, y, r, xp):
    return xp.maximum(xp.abs(x), xp.abs(y)) - r


def _diamond(x, y, r, xp):
    return (xp.abs(x) + xp.abs(y) - r) * math.sqrt(1 / 2)


def _triangle(x, y, r, xp):
    # Equilateral, one corner up: 2 r wide, so sqrt(3) r high, half of it below the centre.
    half_height = r * math.sqrt(3) / 2
    side = (xp.abs(x) * math.sqrt(3) - y - half_height) / 2
    return xp.maximum(side, y - half_height)


def _cross(x, y, r, xp):
    x, y = xp.abs(x), xp.abs(y)
    return xp.maximum(xp.maximum(x, y) - r, xp.minimum(x, y) - CROSS_ARM * r)


def _heart(x, y, r, xp):
    # A square standing on its corner, and a disc around the middle of each upper side.
    side = 2 * r / (1 + math.sqrt(1 / 2))
    across = side * math.sqrt(1 / 8)  # from the centre line to a disc's centre
    height = side / 2 + 3 * across  # from the tip to the top of a disc
    x, up = xp.abs(x), height / 2 - y
    body = xp.maximum(x - up, x + up - side * math.sqrt(2)) * math.sqrt(1 / 2)
    x, up = x - across, up - 3 * across
    return xp.minimum(body, xp.sqrt(x * x + up * up) - side / 2)


def _star(x, y, r, xp):
    # Fold the ten half-points onto one, a corner at (0, circumradius) and a notch 36 degrees away;
    # then one edge is left.
    circumradius = r / math.sin(math.radians(72))
    sine, cosine = math.sin(math.radians(36)), math.cos(math.radians(36))
    x, up = xp.abs(x), circumradius * (1 - cosine) / 2 - y  # its box is centred, not its corners
    for _ in range(2):
        beyond = xp.maximum(x * cosine - up * sine, 0)
        x, up = xp.abs(x - 2 * cosine * beyond), up + 2 * sine * beyond
    across, along = 1 - STAR_NOTCH * cosine, STAR_NOTCH * sine
    return (x * across + (up - circumradius) * along) / math.hypot(across, along)


def _square_wave_integral(u: np.ndarray) -> np.ndarray:
    """Integral from 0 to u of a wave of period 1, +1 in its first half and -1 in its second."""
    return 0.5 - np.abs(u - np.floor(u) - 0.5)


def _dots_integral(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Area in [0, x] x [0, y] of discs of area 1/2 at the centres of unit squares; x, y >= 0."""
    i, j = np.floor(x), np.floor(y)
    radius = np.sqrt(0.5 / np.pi)
    a, b = ((u - np.floor(u) - 0.5) / radius for u in (x, y))
    end = np.array(1.0)
    whole, column, row, corner = (
        radius**2 * _disc_quadrant(*c) for c in ((end, end), (a, end), (end, b), (a, b))
    )
    return i * j * whole + j * column + i * row + corner


def _disc_quadrant(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area of the part of the unit disc where x < a and y < b."""

    def half(t):  # Integral of sqrt(1 - t^2) from 0 to t.
        return (t * np.sqrt(1 - t * t) + np.arcsin(t)) / 2

    # The part beyond |y| = |b|, on one side, up to x = a: a piece of a circular segment of
    # half-chord c.
    b = np.clip(b, -1, 1)
    chord = np.sqrt(1 - b * b)
    upto = np.clip(a, -chord, chord)
    segment = half(upto) + half(chord) - np.abs(b) * (upto + chord)
    left = 2 * (half(np.clip(a, -1, 1)) + np.pi / 4)
    return np.where(b < 0, segment, left - segment)


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "diamond": _diamond,
}
