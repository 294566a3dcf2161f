"""A cascade of stages: prompt -> 64 -> 256 -> 1024 px.

prompt -> conditions -> stage.denoiser -> diffusion.samplers -> space.decode -> pictures
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cascade import images
from cascade.config import to_json
from cascade.devices import sharding
from cascade.errors import OptionError, UserError
from cascade.runner import counts, drawing, inputs, reranking
from cascade.runner.edits import edited, redrawn
from cascade.runner.model_folder import open_model, update_digest
from cascade.runner.overrides import ByStage, override
from cascade.runner.picture import Picture
from cascade.runner.progress import Progress
from cascade.runner.reranking import Judge
from cascade.stage import Sampling, Stage, StageConfig, Steering
from cascade.text import T5Encoder, TextEmbedding, TextEncoder

PROMPTS_AT_ONCE = 64
"""So many prompts are embedded together, or a batch of pictures' if that is more: the embeddings
of all prompts would need memory for each."""


P = ParamSpec("P")


def _listed(draw: Callable[P, Iterator[Picture]]) -> Callable[P, list[Picture]]:
    """The method that returns all pictures of `draw` as a list, with its signature and help."""

    def __call__(*args: P.args, **options: P.kwargs) -> list[Picture]:
        return list(draw(*args, **options))

    own: Any = __call__
    own.__doc__ = draw.__doc__
    own.__signature__ = inspect.signature(draw).replace(return_annotation="list[Picture]")
    return own


class Cascade:
    """A model that draws pictures from prompts: stages, smallest first, and their text encoder.

    `Cascade.load` opens one; to call it draws a list of `Picture`, with all options of `draw`.
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
        captions had, if that is a closed list. own_encoders: those of stages that have their
        own, by the stage's name. Raises UserError unless each stage enlarges what the one
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
        if dtype not in ("float32", "bfloat16"):
            raise OptionError("dtype", dtype, "must be float32 or bfloat16")
        held = functools.partial(jax.tree.map, np.array if offload else jnp.asarray)
        model = open_model(name_or_dir)
        if dtype != "float32" and all(c.computing_in(dtype) is c for c in model.stages):
            warnings.warn(
                f"dtype {dtype}: is for public weights; {model.name} computes in its own types",
                stacklevel=2,
            )
        stages, own_encoders, digest = [], {}, hashlib.sha256()
        for config in model.stages:
            config = config.computing_in(dtype)
            stages.append((Stage(config), held(model.read(config))))
            if (own := model.load_own_text_encoder(config.name, dtype)) is not None:
                own_encoders[config.name] = own
            for file in model.files(config.name):
                update_digest(digest, file)
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

    def draw(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num: int = 1,
        until: int | None = None,
        size: tuple[int, int] | None = None,
        negative: str | Sequence[str] | None = None,
        embeddings: TextEmbedding | None = None,
        noise: Float[np.ndarray, "n _ _ _"] | None = None,
        steps: ByStage | None = None,
        guidance: ByStage | None = None,
        guidance_plan: ByStage | None = None,
        rescale: ByStage | None = None,
        aug_level: ByStage | None = None,
        sampler: ByStage | None = None,
        grid: ByStage | None = None,
        threshold: ByStage | None = None,
        lowres: inputs.Picture | Sequence[inputs.Picture] | None = None,
        init: inputs.Picture | Sequence[inputs.Picture] | None = None,
        mask: inputs.Mask | Sequence[inputs.Mask] | None = None,
        strength: ByStage | None = None,
        best_of: int = 1,
        judge: Judge | None = None,
        frames: int = 0,
        batch_size: int | None = None,
        split_rows: int = 1,
        settings: Sequence[Sampling] | None = None,
        steering: Sequence[Steering | None] | None = None,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Picture]:
        """Draw pictures: `draw` gives one after the other, a call of the model all as a list.

            model = Cascade.load("scenes")
            picture = model("a big red circle", seed=7, steps=8, guidance=3.0, until=64)[0]
            picture.save("circle.png")
            model(["a star", "a ring"], num=4, guidance=[5, 2, 1])  # eight, by stages' weights
            model("a blue square", init=Image.open("photo.jpg"), strength=0.6, until=64)

        What is drawn. prompts: one, or a list. seed: of each prompt's first picture, 0 or more, or
        a list with one for each prompt; the next ones count up, below 2**32. num: pictures of each
        prompt. until: the side in pixels of the last stage that draws; None is all stages. size:
        (height, width) in pixels of the first stage's pictures, if they are not to be its square,
        which it has learned; the others enlarge them alike. negative: a text that guidance moves
        away from, or a list with one for each prompt. embeddings: what the stages are told in place
        of the text encoder's embeddings, a row for each prompt, which then is a name. noise: N(0,
        1) in float32, [prompts * num, s, s, 3], that the first stage that draws begins from, in
        place of the seeds'. The same prompt, seed and settings make the same picture among any
        others.

        How, by stage: one value for all stages, or a list with one for each, smallest first, as for
        the options of `cascade sample` of these names, whose words they take. steps: of sampling, 1
        to 10,000, or a list of entries of a table of 1000 (diffusers' timesteps), as a stage's
        value: [[999, 500, 0]]. guidance: weight
        of classifier-free guidance, 0 or more; 1 is none. guidance_plan: "constant", "interval" or
        "oscillating". rescale: how far guided predictions get back the contrast of unguided ones, 0
        to 1. aug_level: noise on the smaller picture, 0 to 1, by super-resolution stage.
        sampler: "ancestral", "ddim", "ddim-predicted", "dpm++", "dpm++sde", "heun" or "heun-noise".
        grid: spacing of the steps, "uniform", "karras" and others. threshold: "none", "static" or
        "dynamic". None leaves a stage its own.

        From what: a PIL image, or a uint8 array [h, w, 3] of 0..255; one for all prompts, or a list
        with one for each. lowres: the smaller picture to enlarge, resized with a warning unless a
        stage starts from its size (see `fitted`); super-resolution alone then draws. init: the
        picture to draw anew, of any size, its central square. mask: of init's size, white (or True,
        in an array [h, w]) where that is drawn anew, black or transparent where it stays. By
        stage, strength: the share of the steps that is taken from init on, above 0 to 1; None is .7
        in the base stage (1 with a mask), .8 in the others. "0.5:3" takes them three times, as
        SDEdit repeats; "1:10:2" two at a time, ten times each, as RePaint, with a mask.

        best_of: so many candidates are drawn of each picture by the first stage, 1 to 1024, and the
        judge's favourite is kept. judge: a function of pictures, uint8 [n, s, s, 3], and n prompts,
        to n numbers, such as `published.clip.load(NAME).likeness`. Candidate j of seed s is the
        picture of seed best_of * s + j, which is then the picture's.

        frames: so many guesses of each stage at the picture, from noise to the end, are kept in
        `Picture.frames`; at most as many as there are steps.

        On what. batch_size: pictures drawn together, 1 to 4096; None is 1 on a CPU, 8 elsewhere.
        split_rows: so many of this process's devices share each picture of super-resolution by its
        rows of pixels; the pictures are the same but for rounding. settings: a Sampling for each
        stage that draws (see `select`), instead of its own. steering: for each of them what steers
        it, with arrays of one picture, or None. share: (i, n) draws batches i, i + n, ... of all,
        which `numbers` names, for process i of n. progress: called with a `progress.Progress`
        before the first step and after every step of each stage of each batch.

        Raises UserError, a ValueError, naming the option and what it may be, and TypeError for
        pictures and prompts of other types, when it is called. Warns of words that no training
        caption had.
        """
        counts.check(num=num, batch_size=batch_size, split_rows=split_rows, frames=frames)
        if progress is not None and not callable(progress):
            raise TypeError(
                f"progress: must be a function, which is called with a Progress, got {progress!r}; "
                "progress=print shows what it is given"
            )
        prompts = inputs.texts(prompts)
        firsts = inputs.seeds(seed, len(prompts), num)
        several = reranking.best_of(best_of, judge, max(firsts), num)
        small = inputs.lowres(lowres, len(prompts), functools.partial(self.fitted, until=until))
        stages = self.select(until=until, lowres=None if small is None else len(small[0]))
        configs = [stage.config for stage, _ in stages]
        every = [stage.config for stage, _ in self.stages]
        for name, values in (("settings", settings), ("steering", steering)):
            if values is not None and len(values) != len(stages):
                raise ValueError(f"{name}: {len(values)} for {len(stages)} stages")
        if settings is not None:
            configs = [
                dataclasses.replace(c, sampling=s) for c, s in zip(configs, settings, strict=True)
            ]
        elif init is not None:
            configs = redrawn(configs, masked=mask is not None)
        settings = override(
            configs,
            every,
            grid=grid,
            steps=steps,
            guidance=guidance,
            guidance_plan=guidance_plan,
            rescale=rescale,
            aug_level=aug_level,
            sampler=sampler,
            threshold=threshold,
        )
        away = inputs.negative(negative, len(prompts))
        if embeddings is not None:
            inputs.check_embeddings(embeddings, len(prompts), configs)
        sizes = inputs.sizes(size, configs, begun=lowres is not None or init is not None)
        if several is not None:
            for option, value in (("lowres", lowres), ("noise", noise), ("embeddings", embeddings)):
                if value is not None:
                    raise UserError(
                        f"best_of {best_of}: chooses among pictures that the first stage draws "
                        f"from prompts and seeds; leave {option} out"
                    )
        if noise is not None:
            inputs.check_noise(noise, len(prompts) * num, configs[0], sizes[0])
        metadata: dict[str, Any] = {
            "from_lowres": small is not None,
            "from_embeddings": embeddings is not None,
            "from_noise": noise is not None,
        }
        if size is not None:
            metadata["size"] = list(size)
        steered = inputs.alike([None] * len(stages) if steering is None else steering)
        if init is not None:
            if steering is not None:
                raise ValueError("init and steering: both steer the stages; give one of them")
            steered = inputs.redrawing(
                *(init, mask, strength),
                prompts=len(prompts),
                stages=configs,
                every=every,
                settings=settings,
            )
            metadata["edited"] = edited(configs, steered([0]))
        else:
            for option, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise UserError(f"{option}: goes with init, the picture that it is for")
        runs = [
            drawing.PreparedStage(*placed, chosen, sides)
            for placed, chosen, sides in zip(
                _split(stages, split_rows), settings, sizes, strict=True
            )
        ]
        batch_size = batch_size or default_batch_size()
        told = drawing.ToldInParts(
            lambda part: self._told(
                [stage for stage, _ in stages],
                prompts[part],
                away if away is None or len(away) == 1 else away[part],
                None if embeddings is None else jax.tree.map(lambda x: x[part], embeddings),
            ),
            at_once=max(PROMPTS_AT_ONCE, batch_size),
        )
        metadata |= {
            "model": self.name,
            "model_sha256": self.digest,
            "text_encoder_commit": getattr(self.encoder, "commit", None),
            "stages": {
                stage.name: {"resolution": stage.resolution, **to_json(chosen)}
                for stage, chosen in zip(configs, settings, strict=True)
            },
        }
        if share[0] == 0 and embeddings is None:  # with which prompts are names
            self._warn(prompts)

        def drawn() -> Iterator[Picture]:
            total = len(prompts) * num
            for start in range(share[0] * batch_size, total, share[1] * batch_size):
                end = min(start + batch_size, total)
                batch = [(k // num, firsts[k // num] + k % num) for k in range(start, end)]
                b = batch_size
                filled = batch + batch[-1:] * (b - len(batch))
                seeds, rows = np.array([s for _, s in filled], np.uint32), [p for p, _ in filled]
                low = None if small is None else np.stack([small[p % len(small)] for p in rows])
                found = drawing.draw_batch(
                    runs,
                    told(rows),
                    seeds,
                    low,
                    steered(rows),
                    None if noise is None else noise[[min(start + i, end - 1) for i in range(b)]],
                    best_of=several,
                    prompts=[prompts[p] for p in rows],
                    frames=frames,
                    progress=progress,
                    count=len(batch),
                )
                for i, (p, s) in enumerate(batch):
                    own = {}
                    if found.chosen is not None:
                        seeds, scores, best = (x[..., i].tolist() for x in found.chosen)
                        own["best_of"] = {"seed": s, "seeds": seeds, "scores": scores}
                        s = seeds[best]
                    yield Picture(
                        prompts[p],
                        s,
                        {side: pictures[i] for side, pictures in found.sides.items()},
                        {
                            "prompt": prompts[p],
                            "seed": s,
                            "negative": away and away[p % len(away)],
                            **own,
                            **metadata,
                        },
                        {side: path[:, i] for side, path in found.paths.items()},
                    )

        return drawn()

    __call__ = _listed(draw)

    def __repr__(self) -> str:
        stages = [f"{s.config.name} {s.config.resolution} px" for s, _ in self.stages]
        return f"Cascade({self.name!r}: {', '.join(stages)})"

    def select(
        self, *, until: int | None = None, lowres: int | None = None
    ) -> list[tuple[Stage, Any]]:
        """The stages that draw, given the side to stop at and that of the starting picture."""
        sides = [stage.config.resolution for stage, _ in self.stages]
        if until is not None and until not in sides:
            raise OptionError("until", until, f"this model draws {', '.join(map(str, sides))} px")
        stages = [s for s in self.stages if until is None or s[0].config.resolution <= until]
        if lowres is None:
            if self.stages[0][0].config.lowres_resolution is not None:
                raise OptionError("lowres", None, "this model only enlarges pictures; give it one")
            return stages
        return [s for s in stages if (s[0].config.lowres_resolution or 0) >= lowres]

    def fitted(
        self, picture: UInt8[np.ndarray, "h w 3"], *, until: int | None = None
    ) -> UInt8[np.ndarray, "s s 3"]:
        """A picture as a super-resolution stage takes it.

        One of another size than any of them takes is cropped to its central square and resized to
        the nearest size that one takes, with a warning. Raises
        UserError where no stage up to `until` enlarges.
        """
        starts = [s.config.lowres_resolution for s, _ in self.stages if s.config.lowres_resolution]
        h, w = picture.shape[:2]
        if h == w == until:
            raise OptionError("until", until, "the lowres picture has that side already")
        starts = sorted(side for side in starts if until is None or side < until)
        if not starts:
            raise OptionError(
                "lowres",
                f"{w}x{h} px",
                "no stage that draws enlarges it; draw up to a larger one (until)",
            )
        if h == w and h in starts:
            return picture
        side = min(starts, key=lambda start: abs(math.log(min(h, w) / start)))
        warnings.warn(
            f"lowres: of the picture of {w}x{h} px the central square is taken, as {side}x{side} "
            f"px; this model starts from {' or '.join(f'{s}x{s}' for s in starts)}",
            stacklevel=3,
        )
        return images.square(Image.fromarray(picture), side)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; none if the model has no such list."""
        words = re.findall(r"[\w'-]+", prompt.lower()) if self.known_words else []
        return sorted({w for w in words if w not in self.known_words})

    def _warn(self, prompts: Sequence[str]) -> None:
        """Warn of what a prompt says and no picture will show, once for each list of words."""
        encoders = [e for e in (self.encoder, *self.own_encoders.values()) if e is not None]
        found = []
        for prompt in prompts:
            for encoder in encoders:
                cut = encoder.tokenize([prompt]).truncated
                if cut is not None and cut[0]:
                    short = prompt if len(prompt) <= 40 else prompt[:37] + "..."
                    found.append(
                        f"prompt {short!r} is longer than {encoder.max_tokens} tokens; what comes "
                        "after them is not seen"
                    )
                    break
            if unknown := self.unknown_words(prompt):
                listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
                found.append(f"not in the captions that {self.name} was trained on: {listed}")
        for message in dict.fromkeys(found):
            warnings.warn(message, stacklevel=3)

    def _told(
        self,
        stages: Sequence[Stage],
        prompts: Sequence[str],
        negative: Sequence[str] | None = None,
        embeddings: TextEmbedding | None = None,
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each stage what its conditions take of the prompts, a row each, and what guidance
        moves away from where that is not nothing, a row for each prompt or one for all."""
        known = {} if embeddings is None else {tuple(prompts): embeddings}
        embedders = {
            name: drawing.remembering(own, known) for name, own in self.own_encoders.items()
        }
        shared, told = drawing.remembering(self.encoder, known), []
        for stage in stages:
            embed = embedders.get(stage.config.name, shared)
            given = {c.name: c.of_prompts(prompts, embed) for c in stage.config.conditions}
            away = {c.name: c.away(negative, embed) for c in stage.config.conditions}
            told.append(tuple({k: v for k, v in d.items() if v is not None} for d in (given, away)))
        return told


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
        raise OptionError(
            "split_rows",
            count,
            f"must divide the {config.resolution} rows of {config.name}'s pictures",
        )
    return sharding.ByRows(mesh)


def numbers(total: int, batch_size: int, share: tuple[int, int]) -> Iterator[int]:
    """Which of `total` pictures, counted from 0, a share of `Cascade.draw` holds, in its order."""
    for start in range(share[0] * batch_size, total, share[1] * batch_size):
        yield from range(start, min(start + batch_size, total))


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
