"""What a person gives `Cascade.draw` beside numbers: texts, and PIL images or arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cascade import images, ranges
from cascade.errors import OptionError, UserError
from cascade.runner import counts
from cascade.runner.edits import check_mask, edits
from cascade.runner.overrides import ByStage, by_stage
from cascade.stage import Sampling, StageConfig, Steering
from cascade.text import TextEmbedding

Picture = Image.Image | UInt8[np.ndarray, "_ _ 3"]
"""A picture as a person gives it."""
Mask = Picture | UInt8[np.ndarray, "_ _"] | Bool[np.ndarray, "_ _"]
"""Which part of a picture is drawn anew, as a person gives it: the white one."""
Steered = Callable[[Sequence[int]], list[Steering | None]]
"""(numbers of prompts, a row each) -> what steers each stage, whose arrays have a row each."""


def texts(prompts: Any) -> list[str]:
    """The prompts, one or more. Raises TypeError for what is no text, UserError for no word."""
    many = hasattr(prompts, "__iter__") and not isinstance(prompts, str)
    listed: list[Any] = list(prompts) if many else [prompts]
    for prompt in listed:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: must be a text or a list of texts, got {prompt!r:.80}")
    counts.check_prompts(listed)
    return [str(prompt) for prompt in listed]


def seeds(given: Any, prompts: int, num: int) -> list[int]:
    """The seed of each prompt's first picture: one for all of them, or a list with one for each.

    Raises OptionError as `counts.check` does, and UserError for another number of them.
    """
    if not isinstance(given, (list, tuple)):
        counts.check(seed=given, num=num)
        return [int(given)] * prompts
    listed = list(given)
    if len(listed) != prompts:
        raise UserError(
            f"seed: {len(listed)} for {prompts} prompt{'s' * (prompts != 1)}; give one for each, "
            "or a single one for all"
        )
    for seed in listed:
        counts.check(seed=seed, num=num)
    return [int(seed) for seed in listed]


def negative(given: str | Sequence[str] | None, prompts: int) -> list[str] | None:
    """What guidance moves away from: one text for all prompts, or one for each; None for nothing.

    Raises TypeError for what is no text, UserError for another number of them, or one of a list
    that has no word.
    """
    if given is None or given == "":
        return None
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"negative: must be a text or a list of texts, got {text!r:.80}")
    if len(listed) not in (1, prompts):
        raise UserError(
            f"negative: {len(listed)} texts for {prompts} prompt{'s' * (prompts != 1)}; give one "
            "for each, or a single one for all"
        )
    if len(listed) > 1:
        counts.check_prompts(listed, [f"negative {i + 1}" for i in range(len(listed))])
    return listed


def check_embeddings(given: TextEmbedding, prompts: int, stages: Sequence[StageConfig]) -> None:
    """Raise UserError unless they are a row for each prompt, as wide as the stages take them."""
    if not isinstance(given, TextEmbedding):
        raise TypeError(
            f"embeddings: must be a TextEmbedding, as model.encoder(prompts) gives, got "
            f"{type(given).__name__}"
        )
    if len(given.values) != prompts:
        raise UserError(
            f"embeddings: {len(given.values)} rows for {prompts} prompt{'s' * (prompts != 1)}; "
            "give one for each"
        )
    for stage in stages:
        if stage.text is not None:
            try:
                stage.text.check_encoder(given.width, "given as embeddings", stage.name)
            except ValueError as e:
                raise UserError(str(e)) from None


def sizes(
    given: tuple[int, int] | None, stages: Sequence[StageConfig], *, begun: bool
) -> list[tuple[int, int] | None]:
    """Height and width of the pictures of each stage, None for the square of its resolution.

    given: those of the first stage. begun: whether it begins from a picture, whose square is taken.
    Raises OptionError where that is no size, or a network cannot draw it.
    """
    if given is None:
        return [None] * len(stages)
    if not isinstance(given, (tuple, list)):
        raise OptionError("size", given, "must be a height and a width in pixels, such as (64, 96)")
    word = "x".join(map(str, given))
    if begun:
        raise OptionError("size", word, "goes with prompts alone; of pictures the square is drawn")
    if len(given) != 2 or not all(ranges.is_whole(side) and side >= 1 for side in given):
        raise OptionError("size", word, "must be a height and a width in pixels, both 1 or more")
    found: list[tuple[int, int] | None] = []
    for stage in stages:
        factor = stage.resolution // stages[0].resolution
        h, w = given[0] * factor, given[1] * factor
        if h * w > images.MOST_PIXELS:
            raise OptionError(
                "size", word, f"stage {stage.name} would draw more than {images.MOST_PIXELS} pixels"
            )
        try:
            stage.network.check_sides(*stage.space.shape((h, w))[:2])
        except ValueError as e:
            raise OptionError("size", word, f"stage {stage.name} of {h}x{w} px: {e}") from None
        found.append((h, w))
    return found


def check_noise(
    given: Float[np.ndarray, "n _ _ _"],
    pictures: int,
    stage: StageConfig,
    sides: tuple[int, int] | None,
) -> None:
    """Raise UserError unless it is noise for so many pictures of the stage, of those sides."""
    if not hasattr(given, "dtype") or not jnp.issubdtype(given.dtype, jnp.floating):
        kind = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"noise: must be an array of floats, N(0, 1), got {kind}")
    if not np.isfinite(np.asarray(given, np.float32)).all():
        raise UserError("noise: must be finite, and has values that are not")
    shape = (pictures, *stage.space.shape(sides))
    if given.shape != shape:
        raise UserError(
            f"noise: stage {stage.name} begins {pictures} picture{'s' * (pictures != 1)} from "
            f"noise of shape {list(shape)}, got {list(given.shape)}"
        )


def lowres(
    given: Picture | Sequence[Picture] | None,
    prompts: int,
    fitted: Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "s s 3"]],
) -> list[UInt8[np.ndarray, "s s 3"]] | None:
    """The pictures to enlarge, one for all prompts or one for each, all of one size.

    fitted: makes a picture one that a stage takes.
    """
    if given is None:
        return None
    pictures = [fitted(images.rgb(one, "lowres")) for one in _listed("lowres", given, prompts)]
    sizes = {f"{p.shape[1]}x{p.shape[0]}" for p in pictures}
    if len(sizes) > 1:
        raise UserError(f"lowres: must be pictures of one size, got {', '.join(sorted(sizes))} px")
    return pictures


def redrawing(
    init: Picture | Sequence[Picture],
    mask: Mask | Sequence[Mask] | None,
    strength: ByStage | None,
    *,
    prompts: int,
    stages: Sequence[StageConfig],
    every: Sequence[StageConfig],
    settings: Sequence[Sampling],
) -> Steered:
    """What steers the stages that draw these pictures anew, one for all prompts or one for each.

    prompts: how many. every: all stages of the model, as lists count them. Raises UserError for
    what does not fit, of any of them, before it returns.
    """
    pictures = [images.rgb(one, "init") for one in _listed("init", init, prompts)]
    masks: list[Any] = [None]
    if mask is not None:
        masks = [images.mask(one, "mask") for one in _listed("mask", mask, prompts)]
    shares = None
    if strength is not None:
        shares = list(by_stage("strength", strength, stages, every).values())

    def pair(prompt: int) -> tuple[Any, Any]:
        return pictures[prompt % len(pictures)], masks[prompt % len(masks)]

    count = max(len(pictures), len(masks))
    for i in range(count):
        check_mask(*pair(i))

    @functools.lru_cache(maxsize=2)
    def steering(prompt: int) -> list[Steering | None]:
        picture, own = pair(prompt)
        return edits(stages, settings, picture, mask=own, strength=shares)

    def steered(rows: Sequence[int]) -> list[Steering | None]:
        if count == 1 or len(set(rows)) == 1:
            return alike(steering(rows[0] % count))(rows)
        return jax.tree.map(lambda *x: np.stack(x), *(steering(row) for row in rows))

    steering(0)
    return steered


def alike(steering: Sequence[Steering | None]) -> Steered:
    """What steers all pictures as one. steering: with arrays of one picture."""

    def steered(rows: Sequence[int]) -> list[Steering | None]:
        return [None if one is None else one.repeated(len(rows)) for one in steering]

    return steered


def _listed(option: str, given: Any, prompts: int) -> list[Any]:
    """One for all prompts, or one for each of them."""
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(listed) not in (1, prompts):
        raise UserError(
            f"{option}: {len(listed)} pictures for {prompts} prompt{'s' * (prompts != 1)}; give "
            "one for each, or a single one for all"
        )
    return listed
