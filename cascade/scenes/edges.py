"""How true drawn outlines are: their distance from the ideal outline of the shape that was read.

For each object that `reading.read` finds, the shape is moved and scaled until the area between its
outline and the drawn one is least; that area, divided by the length of the outline, is the mean
distance between the two. The drawn outline is where the colour is halfway between the object's and
that around it, between pixels by linear interpolation, so that blur alone costs nothing.

Finishes would hide the outline: from 256 pixels up only plain objects on plain ground count.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage, optimize

from cascade.scenes import spec
from cascade.scenes.reading import Reading, Seen
from cascade.scenes.render import signed_distance
from cascade.scenes.spec import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
    """The outline of one object."""

    shape: Shape
    """The shape that it was read as."""
    distance: float
    """Mean distance between the drawn and the ideal outline, in pixels of the picture."""


def edges(picture: UInt8[np.ndarray, "s s 3"], reading: Reading) -> list[Edge]:
    """The outlines of what a picture shows. reading: what `read` has read in it."""
    side = len(picture)
    found = []
    for seen in reading.objects:
        if seen.shape is not None and _is_bare(seen, reading.objects):
            found.append(
                Edge(shape=seen.shape, distance=_distance(picture, seen.shape, seen) * side)
            )
    return found


def summary(found: Sequence[Sequence[Edge]]) -> dict[str, Any]:
    """Mean distances in pixels, of pictures of one size, as JSON values.

    They are {"outlines": n, "distance": mean, "shapes": {shape: {"outlines", "distance"}}}; of no
    outlines the mean is None.
    """
    every = [edge for one in found for edge in one]

    def mean(some: list[Edge]) -> dict[str, Any]:
        distances = [edge.distance for edge in some]
        distance = round(float(np.mean(distances)), 4) if distances else None
        return {"outlines": len(some), "distance": distance}

    shapes = {shape: [edge for edge in every if edge.shape == shape] for shape in spec.SHAPES}
    return mean(every) | {"shapes": {shape: mean(own) for shape, own in shapes.items() if own}}


# Half the width of the band around an outline in which the drawn one is looked for, in units of the
# picture's width: other objects are twice as far away.
_BAND = spec.GAP / 2
_FINER = {64: 8, 256: 4, 1024: 2}  # side -> fine pixels along each of the picture's
_STEEP = 16  # outlines are compared as ramps of a pixel by this: what is blurred becomes sharp


def _is_bare(seen: Seen, others: Sequence[Seen]) -> bool:
    """Whether no finish touches its outline: its own, that of what holds it or of what it holds."""
    touching = [
        o for o in others if max(abs(o.x - seen.x), abs(o.y - seen.y)) < max(o.radius, seen.radius)
    ]
    return all(o.finish in (None, "plain") for o in touching)


def _distance(picture: np.ndarray, shape: Shape, seen: Seen) -> float:
    """In units of the picture's width."""
    side, reach = len(picture), seen.radius + 2 * _BAND
    rows, columns = (
        slice(max(int((centre - reach) * side), 0), int((centre + reach) * side) + 1)
        for centre in (seen.y, seen.x)
    )
    window = picture[rows, columns].astype(np.float32)
    y = (np.arange(rows.start, rows.start + len(window)) + 0.5)[:, None] / side - seen.y
    x = (np.arange(columns.start, columns.start + len(window[0])) + 0.5)[None, :] / side - seen.x
    # Fine pixels near the outline, between those of the picture.
    finer = _FINER[side]
    v, u = ((np.arange(n * finer) + 0.5) / finer - 0.5 for n in window.shape[:2])
    away = signed_distance(
        shape, (x[0, 0] + u / side)[None, :], (y[0, 0] + v / side)[:, None], seen.radius
    )
    band = np.abs(away) <= _BAND
    away = away[band]
    at = np.stack(np.broadcast_arrays(v[:, None], u[None, :]))[:, band]

    def finely(values: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(values, at, order=1, mode="nearest", prefilter=False)

    colours = np.stack([finely(window[..., c]) for c in range(3)], axis=-1)
    inner = np.median(colours[away < 0.7 * away.min()], axis=0)
    outer = np.median(colours[away > 0.5 * _BAND], axis=0)
    step = inner - outer

    def sharpened(share: np.ndarray) -> np.ndarray:
        return np.clip(0.5 + _STEEP * (share - 0.5), 0, 1)

    drawn = sharpened((colours - outer) @ step / max(step @ step, 1.0))

    def area(change: np.ndarray) -> float:
        dx, dy, grown = change / side
        outside = signed_distance(shape, x - dx, y - dy, seen.radius + grown)
        ideal = sharpened(finely(np.clip(0.5 - side * outside, 0, 1)))
        return float(np.abs(drawn - ideal).sum()) / finer**2

    fit = optimize.minimize(
        area,
        np.zeros(3),
        method="Nelder-Mead",
        options={
            "initial_simplex": side / 128 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
            "xatol": 0.01,
            "fatol": 0.01,
        },
    )
    outline = 2 * _BAND * side  # the band's area for each pixel of its length
    return float(fit.fun) / (len(away) / finer**2 / outline) / side
