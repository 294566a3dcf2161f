"""A picture drawn anew, as a whole (SDEdit) or where a mask says so (inpainting).

SDEdit (Meng et al. 2022) noises the picture to where the last `strength` of the steps begin, and
draws from there: little noise keeps its layout, much keeps nothing. With a mask, what stays of the
picture is put back after every step, as noisy as x is by then (Song et al. 2021, "Score-Based
Generative Modeling through SDEs", App. I.2).

    cascade("a blue square", init=picture, mask=white_is_new, strength=0.8)

Both can take their steps more than once. SDEdit's repeats noise the finished picture again, and
each time it comes nearer to what the model draws by itself (its alg. 1, K). RePaint (Lugmayr et al.
2022) goes back after every few steps, so that what is drawn in the mask comes to fit what stays.

    cascade("a blue square", init=picture, mask=white_is_new, strength="1:10:2")
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade import images
from cascade.diffusion import process, samplers
from cascade.errors import OptionError, UserError
from cascade.runner.overrides import number
from cascade.stage import Sampling, StageConfig, Start, Steering

MOST_REPEATS = 100
"""So often the steps of an `Edit` are taken, at most."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("picture", "repaint"),
    meta_fields=("strength", "repeats", "jump", "clean"),
)
@dataclass(frozen=True, kw_only=True)
class Edit(Steering):
    """Begin from a picture instead of noise alone, to be drawn anew as a whole or in part."""

    # Any, since transformations also build this pytree of shapes and placeholders.
    picture: Any
    """[b, h, w, 3] in [-1, 1], of the size that is drawn."""
    repaint: Any = None
    """[b, h, w, 1] bool, True where it is drawn anew, False where it stays as it is; None redraws
    all of it."""
    strength: float = 1.0
    """Share of the steps that are taken, in (0, 1]. They are the last ones, and the picture is
    noised to where they begin."""
    repeats: int = 1
    """How often these steps are taken, 1 to 100."""
    jump: int | None = None
    """So many steps at a time; None is all of them."""
    clean: bool = False
    """Whether what stays is left clean, from the start to the end, as DeepFloyd IF's pipelines do;
    other networks have never met a picture whose parts are unequally noisy."""

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"Edit.strength must be in (0, 1], got {self.strength}")
        if not 1 <= self.repeats <= MOST_REPEATS:
            raise ValueError(f"Edit.repeats must be 1 to {MOST_REPEATS}, got {self.repeats}")
        if self.clean and self.repeats > 1 and self.jump is not None:
            raise ValueError(
                "the steps of a network that is given clean what stays are repeated as a whole "
                f"alone, got {self.jump} at a time"
            )

    def check(self, steps: int) -> None:
        if int(steps * self.strength) < 1:
            raise ValueError(
                f"strength {self.strength} of {steps} steps takes none: it must be at least "
                f"1/{steps}"
            )
        if self.jump is not None and not 1 <= self.jump <= int(steps * self.strength):
            raise ValueError(
                f"steps are repeated at least 1 at a time, and at most the "
                f"{int(steps * self.strength)} that are taken, got {self.jump}"
            )

    def start(self, noise, schedule, times):
        steps = len(times) - 1
        times = times[steps - int(steps * self.strength) :]
        picture, repaint = self.picture.astype(jnp.float32), self.repaint

        def at(t):
            return jnp.broadcast_to(schedule.logsnr(t), picture.shape[:1])

        x = process.corrupt(picture, noise, at(times[0]))
        if repaint is None:
            return Start(x, *self._repeated(times, None))

        def after_step(x_s, logsnr_s, keys):
            known = picture
            if not self.clean:
                drawn = samplers.initial_noise(keys, picture.shape[1:])
                noised = process.corrupt(picture, drawn, logsnr_s)
                # The last step ends in pictures, of which the known part is known exactly.
                ends = (logsnr_s >= at(times[-1]))[:, None, None, None]
                known = jnp.where(ends, picture, noised)
            return jnp.where(repaint, x_s, known)

        x = jnp.where(repaint, x, picture) if self.clean else x
        return Start(x, *self._repeated(times, after_step))

    def _repeated(self, times, after_step):
        """What follows x in a Start."""
        return samplers.again(times, self.repeats, self.jump), after_step, self.repeats > 1


def redrawn(stages: Sequence[StageConfig], masked: bool) -> list[StageConfig]:
    """The stages with the settings that they draw a picture anew with, for `overrides.override` to
    lay others over. masked: whether only a part of it."""
    return [dataclasses.replace(s, sampling=s.redrawing(masked)) for s in stages]


def edits(
    stages: Sequence[StageConfig],
    settings: Sequence[Sampling],
    picture: UInt8[np.ndarray, "h w 3"],
    *,
    mask: UInt8[np.ndarray, "mh mw"] | None = None,
    strength: Sequence[float | int | str] | None = None,
) -> list[Steering | None]:
    """What steers each stage that draws, for `Cascade.draw`.

    picture: its central square is drawn anew, at every stage's size. mask: of its size, 0 where it
    stays and 255 where it is drawn anew. strength: one for each stage, a number, or in words
    STRENGTH:REPEATS or STRENGTH:REPEATS:JUMP as `Edit` has them; None is `default_strength`.
    Raises UserError for what does not fit.
    """
    check_mask(picture, mask)
    warn_of_square(*picture.shape[1::-1])
    if strength is None:
        strength = [default_strength(stage, mask is not None) for stage in stages]
    if len(strength) != len(stages):
        raise ValueError(f"strength: {len(strength)} for {len(stages)} stages")
    found: list[Steering | None] = []
    for stage, options, share in zip(stages, settings, strength, strict=True):
        side = stage.resolution
        if stage.space.shape() != (side, side, 3):
            raise UserError(
                f"stage {stage.name} draws in {type(stage.space).__name__} and begins from no "
                "picture: stop at a smaller size (until)"
            )
        how = walk_of(share)
        try:
            made = Edit(
                picture=images.to_float(_square(picture, side)),
                repaint=None if mask is None else _square(mask, side)[..., :1] >= 128,
                **how,
                clean=not stage.noises_what_is_kept,
            )
            made.check(options.steps)
        except ValueError as e:
            raise UserError(f"stage {stage.name}: {e}") from None
        found.append(made)
    return found


def warn_of_square(w: int, h: int) -> None:
    """Warn that of a picture of that width and height a part is not seen."""
    if h != w:
        warnings.warn(f"of the picture of {w}x{h} px the central square is taken", stacklevel=3)


def check_mask(
    picture: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "mh mw"] | None
) -> None:
    """Raise UserError unless the mask, if there is one, has the picture's size and is white
    somewhere."""
    if mask is None:
        return
    if mask.shape != picture.shape[:2]:
        raise UserError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} px, the picture "
            f"{picture.shape[1]}x{picture.shape[0]} px: they must be of one size"
        )
    if mask.max(initial=0) < 128:
        raise UserError(
            f"the mask is {mask.max()} of 255 where it is brightest, and drawn anew is what has "
            "128 or more: nothing would be; make it white (255) where the picture is to change"
        )


def edited(
    stages: Sequence[StageConfig], steering: Sequence[Steering | None]
) -> dict[str, Any] | None:
    """What a picture's metadata say of `edits`; None if none of the stages has one."""
    own = {s.name: e for s, e in zip(stages, steering, strict=True) if isinstance(e, Edit)}
    if not own:
        return None
    return {
        "masked": any(e.repaint is not None for e in own.values()),
        "strength": {name: _word(e) for name, e in own.items()},
    }


def walk_of(word: float | int | str) -> dict[str, Any]:
    """The fields of `Edit` that a strength says in words; OptionError for one that says none."""
    try:
        share, *counts = str(word).split(":")
        how: dict[str, Any] = {"strength": number(share)}
        if len(counts) > 2 or not all(count.isdecimal() for count in counts):
            raise ValueError(
                "must be a number; behind it may stand how often the steps are taken, as in 0.5:3, "
                "and how many at a time, as in 1:10:2"
            )
        how |= dict(zip(("repeats", "jump"), map(int, counts), strict=False))
    except ValueError as e:
        raise OptionError("strength", word, e) from None
    if not 0 < how["strength"] <= 1:
        raise OptionError("strength", word, "must be above 0, and at most 1")
    if not 1 <= how.get("repeats", 1) <= MOST_REPEATS:
        raise OptionError("strength", word, f"the steps are taken once to {MOST_REPEATS} times")
    return how


def _word(made: Edit) -> float | str:
    """What `walk_of` reads."""
    if made.repeats == 1:
        return made.strength
    jump = "" if made.jump is None else f":{made.jump}"
    return f"{made.strength!r}:{made.repeats}{jump}"


def default_strength(stage: StageConfig, masked: bool) -> float:
    """.7 where there is text alone (1 for a part of the picture), .8 in super-resolution, as
    diffusers' pipelines of DeepFloyd IF have it."""
    if stage.lowres_resolution is not None:
        return 0.8
    return 1.0 if masked else 0.7


def _square(picture: UInt8[np.ndarray, "h w *c"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of a picture or mask at that side, as IF's pipelines shrink them."""
    return images.square(Image.fromarray(picture), side, Image.Resampling.BICUBIC)
