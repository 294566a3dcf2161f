"""A cascade of stages: prompt -> 64 -> 256 -> 1024 px.

    prompt -> text -> runner -> stage.denoiser -> diffusion.samplers -> images

A model folder holds `config.json` ({"format": "cascade", "stages": [names], ...}), one folder a
stage (`config.json`, `model.safetensors`) and `text_encoder/` in the usual Hugging Face layout,
unless its `text_encoder` names one on the Hugging Face hub. A stage that does not share that
encoder, stable-diffusion-x4-upscaler, has its own in its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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
from cascade.config import from_json, read_json, to_json
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.models import Conditioning
from cascade.published import pipelines as published
from cascade.published.deepfloyd import stage as deepfloyd
from cascade.published.x4_upscaler.unet import UpscalerUNetConfig
from cascade.runner import model_folder as pretrained
from cascade.stage import Edit, Sampling, Stage, StageConfig
from cascade.storage.weights import load_safetensors
from cascade.text import DEFAULT_MAX_TOKENS, T5Encoder, TextEmbedding, TextEncoder
from cascade.text.captions import Captions
from cascade.text.clip import CLIPTextEncoder


@dataclass(frozen=True)
class Picture:
    """One drawn picture at every size, with what made it.

    images: side in pixels -> uint8 [side, side, 3], smallest first.
    """

    prompt: str
    seed: int
    images: dict[int, UInt8[np.ndarray, "s s 3"]]
    metadata: dict[str, Any]

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

    own_encoders: of stages that have their own, by name.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Stage, Mapping[str, Any]]],
        encoder: TextEncoder,
        *,
        name: str = "",
        digest: str = "",
        known_words: Sequence[str] = (),
        own_encoders: Mapping[str, TextEncoder] = {},
    ):
        """known_words: all the words that training captions had, if that is a closed list."""
        self.stages = list(stages)
        self.encoder, self.own_encoders = encoder, dict(own_encoders)
        self.name, self.digest, self.known_words = name, digest, frozenset(known_words)
        for (below, _), (stage, _) in zip(self.stages, self.stages[1:], strict=False):
            if stage.config.lowres_resolution != below.config.resolution:
                raise UserError(
                    f"model {name}: stage {stage.config.name} enlarges "
                    f"{stage.config.lowres_resolution} px, but {below.config.name} before it draws "
                    f"{below.config.resolution} px"
                )

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
        """The cascade that ships (`scenes`), one from a folder that `cascade export` or `cascade
        convert` wrote, or DeepFloyd IF in diffusers' layout: its stages' folders, or their names
        on the Hugging Face hub, with a comma between them.

        text_encoder: name or folder of another encoder of the same width. dtype: of DeepFloyd IF's
        weights and what it and its text encoder compute in. t5_int8: keep the text encoder's
        matrices in a byte a weight. offload: keep all weights in the host's memory, and on the
        device only those of the text encoder or stage that is at work. Runs no code from the
        folder. Raises UserError that says what is missing or damaged.
        """
        names = str(name_or_dir).split(",")
        if published.is_pipeline(names[0]):
            return cls._of_pipelines(names, text_encoder, dtype, t5_int8, offload)
        folder = pretrained.find(name_or_dir)
        described = pretrained.described(folder)
        stages, own_encoders, digest, held = [], {}, hashlib.sha256(), _held(offload)
        for stage_name in described["stages"]:
            where = folder / stage_name
            config = from_json(
                StageConfig, read_json(where / "config.json"), f"{where}/config.json"
            )
            file = where / "model.safetensors"
            if config.published:
                config = deepfloyd.computing_in(config, dtype)
                stages.append((Stage(config), held(deepfloyd.read_converted(where, config))))
                own_encoders |= _own_encoder(config, where, dtype)
            else:
                stage = Stage(config)
                stages.append((stage, held(load_safetensors(file, stage.abstract()))))
            _update(digest, file)
        own = described.get("text_encoder") or str(folder / "text_encoder")
        encoder = _shared_encoder(
            stages,
            own_encoders,
            text_encoder,
            own,
            max_tokens=described.get("max_tokens", DEFAULT_MAX_TOKENS),
            captions=from_json(Captions, described.get("captions", "verbatim"), "captions"),
            compute_dtype=dtype,
            int8=t5_int8,
        )
        _hold([encoder, *own_encoders.values()], held)
        return cls(
            stages,
            encoder,
            name=str(name_or_dir),
            digest=digest.hexdigest(),
            known_words=described.get("known_words", ()),
            own_encoders=own_encoders,
        )

    @classmethod
    def _of_pipelines(
        cls,
        names: Sequence[str],
        text_encoder: str | None,
        dtype: Any,
        t5_int8: bool,
        offload: bool,
    ) -> Cascade:
        stages, own_encoders, digest, held = [], {}, hashlib.sha256(), _held(offload)
        pipelines = published.pipelines(names)
        for pipeline in pipelines:
            config = deepfloyd.computing_in(pipeline.config, dtype)
            stages.append((Stage(config), held(pipeline.params(dtype))))
            own_encoders |= _own_encoder(config, pipeline.folder, dtype)
            for file in pipeline.files:
                _update(digest, file)
        encoder = _shared_encoder(
            stages,
            own_encoders,
            text_encoder,
            pipelines[0].folder,
            max_tokens=deepfloyd.MAX_TOKENS,
            captions=deepfloyd.CAPTIONS,
            compute_dtype=dtype,
            int8=t5_int8,
        )
        _hold([encoder, *own_encoders.values()], held)
        return cls(
            stages,
            encoder,
            name=",".join(names),
            digest=digest.hexdigest(),
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
        init: UInt8[np.ndarray, "ih iw 3"] | None = None,
        mask: UInt8[np.ndarray, "mh mw"] | None = None,
        strength: Sequence[float] | None = None,
        negative: str | None = None,
        settings: Sequence[Sampling] | None = None,
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
        init: draw this picture anew (its central square, at every stage's size); mask: of its
        size, 0 where it stays and 255 where it is drawn anew. strength: `Edit.strength` of each
        stage that draws; None is `default_strength`.
        settings: one Sampling for each stage that draws (see `select`). batch_size: pictures drawn
        together; None is `default_batch_size()`. share: (i, n) draws batches i, i + n, ... of all,
        the pictures that `numbers` names, for process i of n. split_rows: so many of this process's
        devices share each picture of the super-resolution stages by its rows of pixels, for the
        memory and time of 1024 px; the pictures are the same, but for rounding. progress: called
        with (stage's name, pictures) after each stage of each batch.
        """
        stages = self.select(until=until, lowres=None if lowres is None else lowres.shape[:2])
        settings = [s.config.sampling for s, _ in stages] if settings is None else list(settings)
        if len(settings) != len(stages):
            raise ValueError(f"settings: {len(settings)} for {len(stages)} stages")
        edits = self._edits(stages, settings, init, mask, strength)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if seed < 0 or seed + num > 2**32:
            raise UserError(f"seed must be in [0, 2^32 - num], got {seed}")
        batch_size = batch_size or default_batch_size()
        placed = _split(stages, split_rows)
        texts = self._texts(stages, prompts, negative)
        jobs = [(p, seed + k) for p in range(len(prompts)) for k in range(num)]
        for start in range(share[0] * batch_size, len(jobs), share[1] * batch_size):
            batch = jobs[start : start + batch_size]
            filled = batch + batch[-1:] * (batch_size - len(batch))
            rows = np.array([p for p, _ in filled])
            seeds = np.array([s for _, s in filled], np.uint32)
            drawn = self._draw_batch(placed, settings, texts, rows, seeds, lowres, edits, progress)
            for i, (p, s) in enumerate(batch):
                pictures = {side: batch_of_side[i] for side, batch_of_side in drawn.items()}
                metadata = self._metadata(
                    prompts[p], s, stages, settings, negative, lowres is not None, edits
                )
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

    def _texts(
        self, stages: Sequence[tuple[Stage, Any]], prompts: list[str], negative: str | None
    ) -> list[tuple[TextEmbedding, TextEmbedding | None]]:
        """For each stage the embeddings of the prompts, and of what guidance moves away from.

        The second is None where that is the null condition, which is no text's embedding.
        """
        embedded: dict[Any, tuple[TextEmbedding, TextEmbedding | None]] = {}
        texts = []
        for stage, _ in stages:
            own = stage.config.name if stage.config.name in self.own_encoders else None
            without = negative or stage.config.network.null_prompt
            if (own, without) not in embedded:
                encoder = self.encoder if own is None else self.own_encoders[own]
                away = None if without is None else encoder([without])
                embedded[own, without] = encoder(prompts), away
            texts.append(embedded[own, without])
        return texts

    def _edits(self, stages, settings, init, mask, strength) -> list[Edit | None]:
        """What each stage begins from, one picture each. UserError for what does not fit."""
        if init is None:
            if mask is not None or strength is not None:
                raise UserError("mask and strength say what becomes of the picture init: give one")
            return [None] * len(stages)
        if mask is not None and mask.shape != init.shape[:2]:
            raise UserError(
                f"the mask is {mask.shape[1]}x{mask.shape[0]} px, the picture "
                f"{init.shape[1]}x{init.shape[0]} px: they must be of one size"
            )
        if strength is None:
            strength = [default_strength(stage.config, mask is not None) for stage, _ in stages]
        if len(strength) != len(stages):
            raise ValueError(f"strength: {len(strength)} for {len(stages)} stages")
        edits = []
        for (stage, _), options, s in zip(stages, settings, strength, strict=True):
            side, repaint = stage.config.resolution, None
            if stage.config.autoencoder is not None:
                raise UserError(
                    f"stage {stage.config.name} draws in latents and begins from no picture: leave "
                    "it out with --until"
                )
            if mask is not None:
                repaint = _square(mask, side)[..., :1] >= 128
            try:
                edit = Edit(
                    picture=images.to_float(_square(init, side)), repaint=repaint, strength=s
                )
                edit.skipped(options.steps)
            except ValueError as e:
                raise UserError(f"stage {stage.config.name}: {e}") from None
            edits.append(edit)
        return edits

    def _draw_batch(self, placed, settings, texts, rows, seeds, lowres, edits, progress):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        low = None if lowres is None else np.broadcast_to(lowres, (len(rows), *lowres.shape))
        drawn = {}
        for (stage, params, place), options, edit, (text, away) in zip(
            placed, settings, edits, texts, strict=True
        ):
            cond, negative = _rows(text, rows), away and _rows(away, np.zeros_like(rows))
            resolution = stage.config.resolution
            x0 = stage.sample(
                params,
                cond,
                # folded by resolution, so that a stage draws the same wherever one starts
                jax.vmap(lambda k, r=resolution: jax.random.fold_in(k, r))(keys),
                settings=options,
                lowres=None if low is None else images.to_float(jnp.asarray(low)),
                negative=negative,
                edit=jax.tree.map(lambda x: np.broadcast_to(x, (len(rows), *x.shape)), edit),
                place=place,
            )
            if not jnp.isfinite(x0).all():
                raise UserError(
                    f"stage {stage.config.name} drew values that are not finite: its weights are "
                    "damaged, or its settings too extreme"
                )
            low = images.to_uint8(x0)
            drawn[resolution] = low
            if progress:
                progress(stage.config.name, len(rows))
        return drawn

    def _metadata(
        self, prompt, seed, stages, settings, negative, from_lowres, edits
    ) -> dict[str, Any]:
        edited: dict[str, Any] | None = None
        if edits[0] is not None:
            names = (stage.config.name for stage, _ in stages)
            strength = {n: e.strength for n, e in zip(names, edits, strict=True)}
            edited = {"masked": edits[0].repaint is not None, "strength": strength}
        return {
            "prompt": prompt,
            "seed": seed,
            "negative": negative,
            "from_lowres": from_lowres,
            "edited": edited,
            "model": self.name,
            "model_sha256": self.digest,
            "stages": {
                stage.config.name: {"resolution": stage.config.resolution, **to_json(s)}
                for (stage, _), s in zip(stages, settings, strict=True)
            },
        }


def default_batch_size() -> int:
    """Pictures drawn together: 1 on a CPU, 8 elsewhere."""
    return 1 if jax.default_backend() == "cpu" else 8


def default_strength(stage: StageConfig, masked: bool) -> float:
    """Of an edit: .7 where there is text alone (1 for a part of the picture), .8 in
    super-resolution, as diffusers' pipelines of DeepFloyd IF have it."""
    if stage.lowres_resolution is not None:
        return 0.8
    return 1.0 if masked else 0.7


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


def numbers(total: int, batch_size: int, share: tuple[int, int]) -> list[int]:
    """Which of `total` pictures, counted from 0, a share of `Cascade.draw` holds, in its order."""
    starts = range(share[0] * batch_size, total, share[1] * batch_size)
    return [k for start in starts for k in range(start, min(start + batch_size, total))]


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


def _held(offload: bool) -> Callable[[Any], Any]:
    """Where weights are kept: NumPy arrays stay on the host, and a compiled program that is given
    them has them on its device for as long as it runs."""
    return functools.partial(jax.tree.map, np.array if offload else jnp.asarray)


def _hold(encoders: Sequence[Any], held: Callable[[Any], Any]) -> None:
    for encoder in encoders:
        encoder.params = held(encoder.params)


def _own_encoder(config: StageConfig, folder: Path, dtype: Any) -> dict[str, TextEncoder]:
    """{name: encoder} of a stage that has its own in its folder, else nothing."""
    if not isinstance(config.network, UpscalerUNetConfig):
        return {}
    return {config.name: CLIPTextEncoder.load(folder, compute_dtype=dtype)}


def _shared_encoder(
    stages: Sequence[tuple[Stage, Any]],
    own_encoders: Mapping[str, TextEncoder],
    chosen: str | None,
    default: str | Path,
    *,
    max_tokens: int,
    captions: Captions,
    compute_dtype: Any,
    int8: bool,
) -> TextEncoder:
    """That of the stages without their own, or where all have one, the first of those."""
    sharing = [stage.config for stage, _ in stages if stage.config.name not in own_encoders]
    if not sharing and chosen:
        raise UserError(f"text encoder {chosen}: this model has its own and takes no other")
    if not sharing:
        return own_encoders[stages[0][0].config.name]
    encoder = T5Encoder.load(
        chosen or default,
        max_tokens,
        captions=captions,
        compute_dtype=compute_dtype,
        int8=int8,
    )
    for config in sharing:
        if config.network.text_width not in (0, encoder.width):
            raise UserError(
                f"text encoder {chosen or default}: its embeddings are {encoder.width} wide, stage "
                f"{config.name} was trained on {config.network.text_width}"
            )
    return encoder


def _update(digest: Any, file: Path) -> None:
    """With the bytes of a file that may be larger than memory."""
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)


def _rows(text: TextEmbedding, rows: np.ndarray) -> Conditioning:
    return Conditioning(text=text.values[rows], text_mask=text.mask[rows])


def _square(picture: UInt8[np.ndarray, "h w *c"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of a picture or mask at that side, as IF's pipelines shrink them."""
    return images.square(Image.fromarray(picture), side, Image.Resampling.BICUBIC)
