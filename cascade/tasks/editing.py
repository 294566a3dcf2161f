"""Editing: a picture drawn anew, as a whole (SDEdit) or where a mask says so (inpainting).

SDEdit (Meng et al. 2022) noises the picture to where the last `strength` of the steps begin, and
draws from there: little noise keeps its layout, much keeps nothing. With a mask, what stays of the
picture is put back after every step, as noisy as x is by then (Song et al. 2021, "Score-Based
Generative Modeling through SDEs", App. I.2).

    cascade sample "a blue square" --init-image photo.png --mask hole.png --strength 0.8

    stages = [stage.config for stage, _ in cascade.select(until=64)]
    cascade("a blue square", until=64, steering=edits(stages, cascade.settings[:1], picture))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import UInt8
from PIL import Image

from cascade import images
from cascade.diffusion import process, samplers
from cascade.errors import UserError
from cascade.runner.overrides import by_stage, number
from cascade.stage import Sampling, StageConfig, Start, Steering


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("picture", "repaint"),
    meta_fields=("strength", "clean"),
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
    clean: bool = False
    """Whether what stays is left clean, from the start to the end, as DeepFloyd IF's pipelines do;
    other networks have never met a picture whose parts are unequally noisy."""

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"Edit.strength must be in (0, 1], got {self.strength}")

    def check(self, steps: int) -> None:
        if int(steps * self.strength) < 1:
            raise ValueError(
                f"strength {self.strength} of {steps} steps takes none: it must be at least "
                f"1/{steps}"
            )

    def start(self, noise, schedule, times):
        steps = len(times) - 1
        times = times[steps - int(steps * self.strength) :]
        picture, repaint = self.picture.astype(jnp.float32), self.repaint

        def at(t):
            return jnp.broadcast_to(schedule.logsnr(t), picture.shape[:1])

        x = process.corrupt(picture, noise, at(times[0]))
        if repaint is None:
            return Start(x, times)

        def after_step(x_s, logsnr_s, keys):
            known = picture
            if not self.clean:
                drawn = samplers.initial_noise(keys, picture.shape[1:])
                noised = process.corrupt(picture, drawn, logsnr_s)
                # The last step ends in pictures, of which the known part is known exactly.
                ends = (logsnr_s >= at(times[-1]))[:, None, None, None]
                known = jnp.where(ends, picture, noised)
            return jnp.where(repaint, x_s, known)

        return Start(jnp.where(repaint, x, picture) if self.clean else x, times, after_step)


def edits(
    stages: Sequence[StageConfig],
    settings: Sequence[Sampling],
    picture: UInt8[np.ndarray, "h w 3"],
    *,
    mask: UInt8[np.ndarray, "mh mw"] | None = None,
    strength: Sequence[float] | None = None,
) -> list[Steering | None]:
    """What steers each stage that draws, for `Cascade.draw`.

    picture: its central square is drawn anew, at every stage's size. mask: of its size, 0 where it
    stays and 255 where it is drawn anew. strength: one for each stage; None is `default_strength`.
    Raises UserError for what does not fit.
    """
    if mask is not None and mask.shape != picture.shape[:2]:
        raise UserError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} px, the picture "
            f"{picture.shape[1]}x{picture.shape[0]} px: they must be of one size"
        )
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
                "picture: leave it out with --until"
            )
        try:
            edit = Edit(
                picture=images.to_float(_square(picture, side)),
                repaint=None if mask is None else _square(mask, side)[..., :1] >= 128,
                strength=share,
                clean=not stage.noises_what_is_kept,
            )
            edit.check(options.steps)
        except ValueError as e:
            raise UserError(f"stage {stage.name}: {e}") from None
        found.append(edit)
    return found


def default_strength(stage: StageConfig, masked: bool) -> float:
    """.7 where there is text alone (1 for a part of the picture), .8 in super-resolution, as
    diffusers' pipelines of DeepFloyd IF have it."""
    if stage.lowres_resolution is not None:
        return 0.8
    return 1.0 if masked else 0.7


File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What editing adds to `cascade sample`."""

    init_image: File = None
    """Redraw this picture (its central square; any size), as much as --strength says."""
    mask: File = None
    """Which part of --init-image, in a picture of its size: white is drawn anew, black stays."""
    strength: Annotated[str | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="")] = None
    """How much of --init-image changes, by stage: the share of the steps taken, above 0 to 1.
    Default: .7 in the base stage (1 with --mask), .8 in the others."""

    def __post_init__(self):
        for flag, value in (("--mask", self.mask), ("--strength", self.strength)):
            if value is not None and self.init_image is None:
                raise UserError(f"{flag} {value}: goes with --init-image, which is missing")

    def steering(
        self,
        stages: Sequence[StageConfig],
        every: Sequence[StageConfig],
        settings: Sequence[Sampling],
    ) -> list[Steering | None]:
        """For each stage that draws; every: all stages of the model, as lists count them."""
        if self.init_image is None:
            return [None] * len(stages)
        picture = np.asarray(images.load_image(self.init_image))
        mask = None
        if self.mask is not None:
            mask = np.asarray(images.load_image(self.mask).convert("L"))
        strength = None
        if self.strength is not None:
            words = by_stage("--strength", self.strength, stages, every)
            try:
                strength = [number(word) for word in words.values()]
            except ValueError as e:
                raise UserError(f"--strength {self.strength}: {e}") from None
        return edits(stages, settings, picture, mask=mask, strength=strength)

    def record(
        self, stages: Sequence[StageConfig], steering: Sequence[Steering | None]
    ) -> dict[str, Any]:
        """What the JSON beside a picture says of it. steering: of the stages that draw."""
        own = {s.name: e for s, e in zip(stages, steering, strict=True) if isinstance(e, Edit)}
        edited = {
            "masked": any(e.repaint is not None for e in own.values()),
            "strength": {name: e.strength for name, e in own.items()},
        }
        return {
            "edited": edited if own else None,
            "init_image": None if self.init_image is None else str(self.init_image),
            "mask": None if self.mask is None else str(self.mask),
        }


def _square(picture: UInt8[np.ndarray, "h w *c"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of a picture or mask at that side, as IF's pipelines shrink them."""
    return images.square(Image.fromarray(picture), side, Image.Resampling.BICUBIC)
