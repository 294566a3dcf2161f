"""What a person fills in to draw from a page, as options of `Cascade.draw`, and back.

Fields hold texts, as they were typed; a picture's metadata, which the page and `cascade sample`
write, fill them again. It knows no browser.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade import images
from cascade.config import from_json
from cascade.diffusion.grids import Chosen
from cascade.errors import OptionError, UserError
from cascade.published.schedulers import Respaced
from cascade.runner import counts
from cascade.runner.cascade import Cascade
from cascade.runner.overrides import by_stage
from cascade.stage import Sampling, StageConfig

MOST_PICTURES = 16
"""One drawing of the page makes at most so many pictures."""
MOST_STEPS = 1000
"""In the page a stage takes at most so many steps."""

_GIVEN = {"from_lowres": "a smaller one", "from_embeddings": "embeddings", "from_noise": "noise"}
"""What a picture's metadata say that it was drawn from, which the page does not take."""
_DRAW = ("cascade-diffusion", "jax", "jaxlib")
"""The packages of which another version may draw other pixels."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the fields of the page hold, and what a repeated picture says beside them."""

    prompt: str
    """What to draw."""
    negative: str
    """What guidance moves away from; nothing if it is empty."""
    seed: Any
    """The first picture's seed, a whole number if it is well filled in."""
    num: Any
    """How many pictures, likewise."""
    until: int
    """The side of the last stage that draws, in pixels."""
    steps: tuple[str, ...]
    """Sampling steps of every stage of the model."""
    guidance: tuple[str, ...]
    """Guidance weight of every stage."""
    aug_level: tuple[str, ...]
    """Noise on the smaller picture, of every super-resolution stage."""
    strength: str = ""
    """How much of `init` changes, a list by stage; the default if it is empty."""
    settings: tuple[Sampling, ...]
    """All settings of every stage, over which the fields are laid: the model's own, or those of a
    picture that is repeated."""
    init: UInt8[np.ndarray, "s s 3"] | None = None
    """The picture to draw anew."""
    mask: UInt8[np.ndarray, "s s"] | None = None
    """Where it is drawn anew, 255, and where it stays, 0."""


def empty(model: Cascade) -> Form:
    """The form before anybody has filled it in: the model's own values."""
    return _filled(model, model.settings, prompt="", negative="", seed=0)


def options(form: Form, model: Cascade) -> dict[str, Any]:
    """What `Cascade.draw` is to be called with. Raises UserError for numbers out of range, and for
    more than the page draws; what else is wrong, `draw` says itself."""
    counts.check(seed=form.seed, num=form.num)
    if form.num > MOST_PICTURES:
        raise OptionError("num", form.num, f"must be at most {MOST_PICTURES} in the page")
    drawn = [stage.config for stage, _ in model.select(until=form.until)]
    every = [stage.config for stage, _ in model.stages]
    own = {stage.name: chosen for stage, chosen in zip(every, form.settings, strict=True)}
    given: dict[str, Any] = {
        "prompts": form.prompt,
        "seed": form.seed,
        "num": form.num,
        "until": form.until,
        "negative": form.negative or None,
        "settings": [own[stage.name] for stage in drawn],
        "steps": form.steps,
        "guidance": form.guidance,
        "init": form.init,
        "mask": form.mask,
        "strength": form.strength.strip() or None,
    }
    if any(stage.lowres is not None for stage in drawn):
        given["aug_level"] = form.aug_level
    for word in by_stage("steps", form.steps, drawn, every).values():
        if str(word).isdecimal() and int(word) > MOST_STEPS:
            raise OptionError("steps", word, f"must be at most {MOST_STEPS} in the page")
    return given


def begun(form: Form) -> dict[str, Any]:
    """What a picture's JSON holds beside its metadata, so that it can be repeated: the picture that
    it began from."""
    return {
        "init_png": None if form.init is None else _to_text(form.init),
        "mask_png": None if form.mask is None else _to_text(form.mask),
    }


def repeating(record: Any, model: Cascade) -> tuple[Form, list[str]]:
    """The form that draws a picture again, given its metadata, and what may make it differ.

    record: of the page's JSON, or of that of `cascade sample`, which anybody may have written.
    Raises UserError for one that is neither, or of another model.
    """
    if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
        raise UserError("this JSON is not of a picture: it names no stages")
    if record.get("model_sha256") != model.digest:
        raise UserError(
            f"this picture is of another model, {str(record.get('model'))[:200]!r}, than the one "
            f"that draws here, {model.name!r}: end the page and start it with --model"
        )
    for key, what in _GIVEN.items():
        if record.get(key):
            raise UserError(
                f"this picture was drawn from {what}, which its JSON does not hold: repeat it by "
                "the command, or from Python"
            )
    stages, names = record["stages"], [stage.config.name for stage, _ in model.stages]
    if not stages or list(stages) != names[: len(stages)]:
        raise UserError(
            f"this picture was drawn by the stages {', '.join(map(str, stages))[:200]!r}, and this "
            f"model draws with {', '.join(names)}"
        )
    settings = [_settings(stage.config, stages.get(stage.config.name)) for stage, _ in model.stages]
    prompt, seed = record.get("prompt"), record.get("seed")
    negative = record.get("negative")
    if not isinstance(prompt, str) or not isinstance(negative, str | None):
        raise UserError("prompt and negative must be texts")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError("seed must be a whole number")
    edited = record.get("edited")
    init, mask = (_from_text(name, record.get(name)) for name in ("init_png", "mask_png"))
    form = _filled(
        model,
        settings,
        prompt=prompt,
        negative=negative or "",
        seed=seed,
        until=model.stages[len(stages) - 1][0].config.resolution,
        strength="" if edited is None else _strengths(edited),
        init=init,
        mask=None if mask is None else mask[..., 0],
    )
    return form, [*_missing(record, init), *_unlike(record)]


def begun_from(
    background: bytes | None, painted: Sequence[bytes], side: int
) -> tuple[UInt8[np.ndarray, "s s 3"] | None, UInt8[np.ndarray, "s s"] | None]:
    """What somebody has put into the page: the picture to draw anew, and where, or None.

    background: an image file. painted: image files of its size, opaque where it is to change.
    side: of the largest picture that is kept, in pixels. Raises UserError for what is no image.
    """
    init, mask = None, None
    if background is not None:
        init = _square(_read("the picture to begin from", background, "white"), side)
    for file in painted:
        layer = _square(_read("the painted mask", file, "black"), side).max(axis=-1)
        layer = np.where(layer >= 128, 255, 0).astype(np.uint8)
        mask = layer if mask is None else np.maximum(mask, layer)
    if mask is not None and not mask.any():
        mask = None
    return init, mask


def _filled(model: Cascade, settings: Sequence[Sampling], **fields: Any) -> Form:
    """A form whose lists show these settings of every stage."""
    every = [stage.config for stage, _ in model.stages]
    return Form(
        **{
            "num": 1,
            "until": every[-1].resolution,
            "steps": tuple(_steps(chosen) for chosen in settings),
            "guidance": tuple(f"{chosen.guidance!r}" for chosen in settings),
            "aug_level": tuple(
                f"{chosen.aug_level!r}"
                for stage, chosen in zip(every, settings, strict=True)
                if stage.lowres is not None
            ),
            "settings": tuple(settings),
            **fields,
        }
    )


def _settings(stage: StageConfig, said: Any) -> Sampling:
    """What a picture's JSON says of a stage; the stage's own where it says nothing."""
    if said is None:
        return stage.sampling
    fields = said if not isinstance(said, dict) else {k: said[k] for k in said if k != "resolution"}
    settings = from_json(Sampling, fields, f"stages.{stage.name}")
    try:
        stage.check(settings)
    except ValueError as e:
        raise UserError(f"stages.{stage.name}: {e}") from None
    return settings


def _steps(settings: Sampling) -> str:
    """The word of a list of steps, its entries, or their number."""
    if isinstance(settings.grid, Chosen):
        return "/".join(map(str, settings.grid.chosen))
    return settings.grid.name if isinstance(settings.grid, Respaced) else str(settings.steps)


def _strengths(edited: Any) -> str:
    shares = edited.get("strength") if isinstance(edited, dict) else None
    if not isinstance(shares, dict) or not all(
        isinstance(v, float | int) or (isinstance(v, str) and re.fullmatch(r"[\d.e:-]+", v))
        for v in shares.values()
    ):
        raise UserError("edited.strength must have a number for each stage")
    return ",".join(map(str, shares.values()))


def _missing(record: Mapping[str, Any], init: Any) -> list[str]:
    if record.get("edited") is None or init is not None:
        return []
    return [
        "this picture began from another one, which its JSON does not hold: put that in, and paint "
        "over what was drawn anew"
    ]


def _unlike(record: Mapping[str, Any]) -> list[str]:
    """What else drew the picture than draws now, of what can change a pixel."""
    told: Any = record.get("versions")
    found = []
    for name in _DRAW if isinstance(told, dict) else ():
        own = version(name)
        if (said := str(told.get(name, own))[:40]) != own:
            found.append(f"{name} {said} drew this picture, and {own} draws now: pixels may differ")
    if record.get("text_encoder") is not None:
        found.append("this picture was drawn with a text encoder of its own (--text-encoder)")
    if record.get("t5_int8"):
        found.append("this picture was drawn with a text encoder in int8 (--t5-int8)")
    return found


def _read(what: str, file: bytes, ground: str) -> Image.Image:
    try:
        return images.decoded(io.BytesIO(file), ground=ground)
    except images.Unreadable as e:
        raise UserError(f"{what} cannot be read as an image ({e})") from None


def _square(picture: Image.Image, side: int) -> UInt8[np.ndarray, "s s 3"]:
    return images.square(picture, min(side, *picture.size))


def _to_text(picture: UInt8[np.ndarray, "s s *c"]) -> str:
    """A PNG as text."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _from_text(name: str, text: Any) -> UInt8[np.ndarray, "s s 3"] | None:
    if text is None:
        return None
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise UserError(f"{name} must be a PNG in base64") from None
    return np.asarray(_read(name, file, "white"))
