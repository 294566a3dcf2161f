"""A cascade of stages: prompt -> 64 -> 256 -> 1024 px.

prompt -> conditions -> stage.denoiser -> diffusion.samplers -> space.decode -> pictures
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade import images
from cascade.config import to_json
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.runner.model_folder import open_model
from cascade.stage import Sampling, Stage, StageConfig, Steering
from cascade.storage import paths
from cascade.text import T5Encoder, TextEmbedding, TextEncoder
from cascade.text.embedding import no_encoder

PROMPTS_AT_ONCE = 64
"""So many prompts are embedded together, or a batch of pictures' if that is more: the embeddings
of all prompts would need memory for each."""


@dataclass(frozen=True)
class Picture:
    """One drawn picture at every size, with what made it."""

    prompt: str
    """What it is to show."""
    seed: int
    """The seed of all its random numbers, in 0..2**32 - 1."""
    images: dict[int, UInt8[np.ndarray, "s s 3"]]
    """Side in pixels -> the picture of that size, smallest first."""
    metadata: dict[str, Any]
    """All that made it, as JSON values: prompt, seed, model, and the settings of each stage."""

    @property
    def image(self) -> UInt8[np.ndarray, "s s 3"]:
        """The largest."""
        return self.images[max(self.images)]

    def pil(self, size: int | None = None) -> Image.Image:
        """As a PIL image; size None is the largest."""
        return Image.fromarray(self.images[size or max(self.images)])

    def _repr_png_(self) -> bytes | None:
        return self.pil()._repr_png_()


class Cascade:
    """Stages in the order they draw, smallest first, and the text encoder they share.

    own_encoders: those of stages that have their own, by the stage's name.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Stage, Mapping[str, Any]]],
        encoder: TextEncoder | None,
        *,
        name: str = "",
        digest: str = "",
        known_words: Sequence[str] = (),
        own_encoders: Mapping[str, TextEncoder] = {},
    ):
        """encoder: None for stages that read no text. known_words: all the words that training
        captions had, if that is a closed list. UserError unless each stage enlarges what the one
        before it draws."""
        self.stages = list(stages)
        self.encoder, self.own_encoders = encoder, dict(own_encoders)
        self.name, self.digest, self.known_words = name, digest, frozenset(known_words)
        check_chain([stage.config for stage, _ in self.stages])

    @classmethod
    def load(
        cls,
        name_or_dir: str | Path = "scenes",
        *,
        text_encoder: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        t5_int8: bool = False,
        offload: bool = False,
    ) -> Cascade:
        """A model by its name or folder, as `open_model` finds it.

        text_encoder: name or folder of another encoder of the same width. dtype: of public weights
        and what they and their text encoder compute in. t5_int8: keep the text encoder's matrices
        in a byte a weight. offload: keep all weights in the host's memory, and on the device only
        those of the text encoder or stage that is at work. Runs no code from the folder. Raises
        UserError that says what is missing or damaged.
        """
        # NumPy arrays stay on the host, and a compiled program that is given them has them on its
        # device for as long as it runs.
        held = functools.partial(jax.tree.map, np.array if offload else jnp.asarray)
        model = open_model(name_or_dir)
        stages, own_encoders, digest = [], {}, hashlib.sha256()
        for config in model.stages:
            config = config.computing_in(dtype)
            stages.append((Stage(config), held(model.read(config))))
            if (own := model.load_own_text_encoder(config.name, dtype)) is not None:
                own_encoders[config.name] = own
            for file in model.files(config.name):
                _update(digest, file)
        encoder: T5Encoder | None = None
        reading = {s.config.name: s.config.text for s, _ in stages if s.config.text is not None}
        sharing = {name: text for name, text in reading.items() if name not in own_encoders}
        if not sharing and text_encoder:
            own = "has its own" if own_encoders else "reads no text"
            raise UserError(f"text encoder {text_encoder}: this model {own} and takes no other")
        if sharing:
            chosen = text_encoder or model.text_encoder
            encoder = T5Encoder.load(
                chosen,
                model.max_tokens,
                captions=model.captions,
                compute_dtype=dtype,
                int8=t5_int8,
            )
            for name, text in sharing.items():
                try:
                    text.check_encoder(encoder.width, chosen, name)
                except ValueError as e:
                    raise UserError(str(e)) from None
        loaded: list[Any] = [e for e in (encoder, *own_encoders.values()) if e is not None]
        for one in loaded:
            one.params = held(one.params)
        return cls(
            stages,
            encoder,
            name=model.name,
            digest=digest.hexdigest(),
            known_words=model.known_words,
            own_encoders=own_encoders,
        )

    @property
    def settings(self) -> list[Sampling]:
        """The stages' own sampling settings, in cascade order."""
        return [stage.config.sampling for stage, _ in self.stages]

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Picture]:
        """All of `draw`'s pictures as a list."""
        return list(self.draw(prompts, **options))

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        num: int = 1,
        until: int | None = None,
        lowres: UInt8[np.ndarray, "h w 3"] | None = None,
        negative: str | None = None,
        settings: Sequence[Sampling] | None = None,
        steering: Sequence[Steering | None] | None = None,
        batch_size: int | None = None,
        share: tuple[int, int] = (0, 1),
        split_rows: int = 1,
        progress: Callable[[str, int], None] | None = None,
    ) -> Iterator[Picture]:
        """Draw `num` pictures of each prompt, prompts in order, with seeds seed .. seed + num - 1.

        The same (prompt, seed, settings) is the same picture among any others: every random number
        comes from the picture's own seed, and batches have one fixed size, filled up at the end.
        until: stop at the stage that draws this many pixels. lowres: start from this picture (its
        side chooses the stage) instead of from text alone. negative: what guidance moves away from.
        settings: one Sampling for each stage that draws (see `select`). steering: for each stage
        that draws what steers it, with arrays of one picture, or None. batch_size: pictures drawn
        together; None is `default_batch_size()`. share: (i, n) draws batches i, i + n, ... of all,
        the pictures that `numbers` names, for process i of n. split_rows: so many of this process's
        devices share each picture of the super-resolution stages by its rows of pixels, for the
        memory and time of 1024 px; the pictures are the same, but for rounding. progress: called
        with (stage's name, pictures) after each stage of each batch.
        """
        stages = self.select(until=until, lowres=None if lowres is None else lowres.shape[:2])
        settings = [s.config.sampling for s, _ in stages] if settings is None else list(settings)
        steering = [None] * len(stages) if steering is None else list(steering)
        for name, given in (("settings", settings), ("steering", steering)):
            if len(given) != len(stages):
                raise ValueError(f"{name}: {len(given)} for {len(stages)} stages")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if seed < 0 or seed + num > 2**32:
            raise UserError(f"seed must be in [0, 2^32 - num], got {seed}")
        batch_size = batch_size or default_batch_size()
        told = _ToldInParts(
            lambda part: self._told([stage for stage, _ in stages], part, negative),
            prompts,
            at_once=max(PROMPTS_AT_ONCE, batch_size),
        )
        runs = [
            _PreparedStage(*placed, chosen, steered)
            for placed, chosen, steered in zip(
                _split(stages, split_rows), settings, steering, strict=True
            )
        ]
        total = len(prompts) * num
        for start in range(share[0] * batch_size, total, share[1] * batch_size):
            end = min(start + batch_size, total)
            batch = [(k // num, seed + k % num) for k in range(start, end)]
            filled = batch + batch[-1:] * (batch_size - len(batch))
            seeds = np.array([s for _, s in filled], np.uint32)
            rows = told([p for p, _ in filled])
            drawn = self._draw_batch(runs, rows, seeds, lowres, progress)
            for i, (p, s) in enumerate(batch):
                pictures = {side: batch_of_side[i] for side, batch_of_side in drawn.items()}
                metadata = {
                    "prompt": prompts[p],
                    "seed": s,
                    "negative": negative,
                    "from_lowres": lowres is not None,
                    "model": self.name,
                    "model_sha256": self.digest,
                    "text_encoder_commit": getattr(self.encoder, "commit", None),
                    "stages": {
                        stage.config.name: {
                            "resolution": stage.config.resolution,
                            **to_json(chosen),
                        }
                        for (stage, _), chosen in zip(stages, settings, strict=True)
                    },
                }
                yield Picture(prompts[p], s, pictures, metadata)

    def select(
        self, *, until: int | None = None, lowres: tuple[int, int] | None = None
    ) -> list[tuple[Stage, Any]]:
        """The stages that draw, given the side to stop at and the size of the starting picture."""
        sides = [stage.config.resolution for stage, _ in self.stages]
        if until is not None and until not in sides:
            raise UserError(f"until={until}: this model draws {', '.join(map(str, sides))} px")
        stages = [s for s in self.stages if until is None or s[0].config.resolution <= until]
        if lowres is None:
            if self.stages[0][0].config.lowres_resolution is not None:
                raise UserError("this model only enlarges pictures; give one with --lowres")
            return stages
        starts = [s.config.lowres_resolution for s, _ in stages if s.config.lowres_resolution]
        if lowres[0] == lowres[1] == until:
            raise UserError(f"until={until}: the lowres picture has that side already")
        if lowres[0] != lowres[1] or lowres[0] not in starts:
            raise UserError(
                f"lowres picture is {lowres[1]}x{lowres[0]} px; this model starts from "
                f"{' or '.join(f'{s}x{s}' for s in starts) or 'text only'}: resize or crop it first"
            )
        return [s for s in stages if (s[0].config.lowres_resolution or 0) >= lowres[0]]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; none if the model has no such list."""
        words = re.findall(r"[\w'-]+", prompt.lower()) if self.known_words else []
        return sorted({w for w in words if w not in self.known_words})

    def _told(
        self, stages: Sequence[Stage], prompts: Sequence[str], negative: str | None
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each stage what its conditions take of the prompts, a row each, and what guidance
        moves away from where that is not nothing, one row."""
        embedders = {name: _remembering(encoder) for name, encoder in self.own_encoders.items()}
        shared, told = _remembering(self.encoder), []
        for stage in stages:
            embed = embedders.get(stage.config.name, shared)
            given = {c.name: c.of_prompts(prompts, embed) for c in stage.config.conditions}
            away = {c.name: c.away(negative, embed) for c in stage.config.conditions}
            told.append(tuple({k: v for k, v in d.items() if v is not None} for d in (given, away)))
        return told

    def _draw_batch(self, runs, told, seeds, lowres, progress):
        """told: for each stage what it is given and led away from, with a row a picture."""
        count = len(seeds)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        low = None if lowres is None else np.broadcast_to(lowres, (count, *lowres.shape))
        drawn = {}
        for run, (given, away) in zip(runs, told, strict=True):
            config = run.stage.config
            if low is not None:
                small = images.to_float(jnp.asarray(low))
                enlarged = {c.name: c.of_lowres(small) for c in config.conditions}
                given = given | {k: v for k, v in enlarged.items() if v is not None}
            resolution = config.resolution
            x0 = run.stage.sample(
                run.params,
                given,
                # folded by resolution, so that a stage draws the same wherever one starts
                jax.vmap(lambda k, r=resolution: jax.random.fold_in(k, r))(keys),
                settings=run.settings,
                negative=away,
                steering=jax.tree.map(
                    lambda x: np.broadcast_to(x, (count, *x.shape)), run.steering
                ),
                place=run.place,
            )
            if not jnp.isfinite(x0).all():
                raise UserError(
                    f"stage {config.name} drew values that are not finite: its weights are "
                    "damaged, or its settings too extreme"
                )
            low = images.to_uint8(x0)
            drawn[resolution] = low
            if progress:
                progress(config.name, count)
        return drawn


@dataclass(frozen=True)
class _PreparedStage:
    """One stage of a drawing."""

    stage: Stage
    params: Any
    place: sharding.ByRows | None
    settings: Sampling
    steering: Steering | None


class _ToldInParts:
    """What stages are told of many prompts, embedded part by part as the prompts come up.

    The two parts that were asked for last are kept: all that one batch can need.
    """

    def __init__(
        self,
        told: Callable[[Sequence[str]], list[tuple[dict[str, Any], dict[str, Any]]]],
        prompts: Sequence[str],
        *,
        at_once: int,
    ):
        """told: `Cascade._told` of some prompts. at_once: how many prompts make a part, at least as
        many as a batch has rows."""
        self._at_once = at_once
        self._part = functools.lru_cache(maxsize=2)(
            lambda i: told(prompts[i * at_once : (i + 1) * at_once])
        )

    def __call__(self, rows: Sequence[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each stage what it is given and led away from, a row for each of these prompts.

        rows: places in the list of all prompts, in order.
        """
        first, last = rows[0] // self._at_once, rows[-1] // self._at_once
        parts = [self._part(i) for i in range(first, last + 1)]
        within = np.array(rows) - first * self._at_once
        same = np.zeros_like(within)
        told = []
        for stage in zip(*parts, strict=True):
            given = jax.tree.map(lambda *x: _joined(x)[within], *(given for given, _ in stage))
            told.append((given, jax.tree.map(lambda x: x[same], stage[0][1])))
        return told


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def check_chain(stages: Sequence[StageConfig]) -> None:
    """UserError unless each stage enlarges what the one before it draws, under its own name."""
    names = [stage.name for stage in stages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two stages are named {twice[0]}: a cascade has one of each name")
    for below, above in itertools.pairwise(stages):
        if above.lowres_resolution is None:
            raise UserError(
                f"stages {below.name} and {above.name} make no cascade: {above.name} draws from "
                "text alone, as only the first may; leave out one of them"
            )
        if above.lowres_resolution != below.resolution:
            raise UserError(
                f"stage {above.name} enlarges {above.lowres_resolution} px, but {below.name} "
                f"before it draws {below.resolution} px: they make no cascade"
            )


def default_batch_size() -> int:
    """Pictures drawn together: 1 on a CPU, 8 elsewhere."""
    return 1 if jax.default_backend() == "cpu" else 8


def by_rows(
    config: StageConfig, count: int, devices: Sequence[Any] | None = None
) -> sharding.ByRows | None:
    """Where `split_rows` puts the pictures of a stage, None for those that are not split: it is
    super-resolution that shares them. devices: to choose from, None is those of this process.
    """
    if count == 1:
        return None
    mesh = sharding.rows_mesh(count, devices)
    if config.lowres_resolution is None:
        return None
    if config.resolution % count:
        raise UserError(
            f"split_rows={count}: must divide the {config.resolution} rows of {config.name}'s "
            "pictures"
        )
    return sharding.ByRows(mesh)


def numbers(total: int, batch_size: int, share: tuple[int, int]) -> Iterator[int]:
    """Which of `total` pictures, counted from 0, a share of `Cascade.draw` holds, in its order."""
    for start in range(share[0] * batch_size, total, share[1] * batch_size):
        yield from range(start, min(start + batch_size, total))


def with_options(settings: Sequence[Sampling], **options: Sequence[Any]) -> list[Sampling]:
    """Settings with fields replaced stage by stage: with_options(s, steps=(20, 8, 4))."""
    return [
        dataclasses.replace(s, **{k: v[i] for k, v in options.items()})
        for i, s in enumerate(settings)
    ]


def _split(
    stages: Sequence[tuple[Stage, Any]], count: int
) -> list[tuple[Stage, Any, sharding.ByRows | None]]:
    """Each stage with its weights, for super-resolution a copy on each of `count` devices, and
    where its pictures go."""
    placed = []
    for stage, params in stages:
        place = by_rows(stage.config, count)
        if place is not None:
            params = jax.device_put(params, sharding.replicated(place.mesh))
        placed.append((stage, params, place))
    return placed


def _update(digest: Any, file: Path) -> None:
    """With the bytes of a file that may be larger than memory."""
    paths.check_regular(file)
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)


def _remembering(encoder: Any) -> Callable[[Sequence[str]], TextEmbedding]:
    """The encoder, which encodes the same texts once; None where no condition will ask it."""
    encoder = encoder or no_encoder
    known: dict[tuple[str, ...], TextEmbedding] = {}

    def embed(texts: Sequence[str]) -> TextEmbedding:
        if tuple(texts) not in known:
            known[tuple(texts)] = encoder(texts)
        return known[tuple(texts)]

    return embed
