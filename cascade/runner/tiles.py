"""Pictures of any shape, enlarged in overlapping tiles by a super-resolution stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cascade import images
from cascade.errors import UserError
from cascade.runner import counts
from cascade.runner.picture import Picture
from cascade.stage import StageConfig

if TYPE_CHECKING:
    from cascade.runner.cascade import Cascade

SHARED = 4
"""Neighbouring tiles have at least one part in so many of a side in common."""


def enlarge(
    cascade: Cascade,
    prompt: str,
    picture: Image.Image | UInt8[np.ndarray, "h w 3"],
    *,
    seed: int = 0,
    **options: Any,
) -> Picture:
    """Enlarge a picture of any shape by the last stage, which may itself have drawn it.

    Tiles of the size that the stage takes cover the picture and share a quarter of a side or more
    with their neighbours. Each is drawn from its window of one noise for all, so that they agree
    where they meet, and there each fades into the other. The prompt is told to every tile.

    picture: a PIL image, or uint8, at least as large as a tile on both sides, and of at most
    `images.MOST_PIXELS` once it is enlarged. options: of `Cascade.draw`, such as steps, batch_size
    and progress. Raises UserError for a picture that is too small or too large, and as `draw` does.
    """
    counts.check(seed=seed)
    small = images.rgb(picture, "lowres")
    h, w = small.shape[:2]
    placed = corners(cascade, h, w)
    (stage, _) = cascade.stages[-1]
    tile, factor = _sides(stage.config)
    begin = stage.config.space.shape()  # of a tile, in what the stage diffuses
    scale = begin[0] // tile
    key = jax.random.fold_in(jax.random.key(seed), stage.config.resolution)
    noise = np.asarray(jax.random.normal(key, (h * scale, w * scale, begin[2])))
    drawn = type(cascade)(
        cascade.stages[-1:],
        cascade.encoder,
        name=cascade.name,
        digest=cascade.digest,
        known_words=tuple(cascade.known_words),
        own_encoders=cascade.own_encoders,
    ).draw(
        [prompt] * len(placed),
        seed=seed,
        lowres=[small[y : y + tile, x : x + tile] for y, x in placed],
        noise=np.stack(
            [
                noise[y * scale : (y + tile) * scale, x * scale : (x + tile) * scale]
                for y, x in placed
            ]
        ),
        **options,
    )
    ramp = _ramp(tile * factor, tile * factor // SHARED)
    weight = ramp[:, None] * ramp
    total = np.zeros((h * factor, w * factor, 3), np.float32)
    over, metadata = np.zeros(total.shape[:2], np.float32), {}
    for (y, x), one in zip(placed, drawn, strict=True):
        window = np.s_[y * factor : (y + tile) * factor, x * factor : (x + tile) * factor]
        total[window] += weight[..., None] * one.image
        over[window] += weight
        metadata = one.metadata
    whole = np.rint(total / over[..., None]).astype(np.uint8)
    metadata = metadata | {"from_noise": False, "tiles": len(placed)}
    return Picture(prompt, seed, {max(whole.shape[:2]): whole}, metadata)


def corners(cascade: Cascade, h: int, w: int) -> list[tuple[int, int]]:
    """(y, x) of each tile of a picture of h x w pixels.

    Raises UserError where the last stage enlarges none, or not one of that size.
    """
    config = cascade.stages[-1][0].config
    if config.lowres_resolution is None:
        raise UserError(f"model {cascade.name}: its last stage enlarges no picture")
    tile, factor = _sides(config)
    if min(h, w) < tile:
        raise UserError(
            f"the picture has {w}x{h} px: it must have at least {tile} on both sides, a tile of "
            f"{config.name}"
        )
    if h * w * factor**2 > images.MOST_PIXELS:
        raise UserError(
            f"the picture has {w}x{h} px: {factor} times as large on both sides it would have more "
            f"than {images.MOST_PIXELS} pixels; give a smaller one"
        )
    if config.space.shape()[0] % tile:
        raise UserError(f"model {cascade.name}: what {config.name} diffuses is not cut in tiles")
    return [(y, x) for y in starts(h, tile) for x in starts(w, tile)]


def _sides(config: StageConfig) -> tuple[int, int]:
    """The side of a tile in pixels, and how many times larger it is drawn."""
    tile = config.lowres_resolution or config.resolution
    return tile, config.resolution // tile


def starts(length: int, tile: int) -> Sequence[int]:
    """Where tiles begin that cover so many pixels, evenly, sharing a part in SHARED or more."""
    most = tile - tile // SHARED
    count = 1 + math.ceil((length - tile) / most)
    return [round(at) for at in np.linspace(0, length - tile, count)]


def _ramp(length: int, shared: int) -> Float[np.ndarray, " length"]:
    """The weight of a tile's rows: it rises over the shared ones, and falls over the last."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(1, distance / (shared + 1)).astype(np.float32)
