"""One batch of pictures through all stages, and what the stages are told of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32

from cascade import images
from cascade.devices import sharding
from cascade.errors import UserError
from cascade.runner.progress import Progress
from cascade.stage import Sampling, Stage
from cascade.text import TextEmbedding
from cascade.text.embedding import no_encoder


@dataclass(frozen=True)
class PreparedStage:
    """One stage of a drawing."""

    stage: Stage
    """The stage."""
    params: Any
    """Its parameters, where they are needed."""
    place: sharding.ByRows | None
    """Where its pictures go; None is one device."""
    settings: Sampling
    """How it samples."""
    sides: tuple[int, int] | None = None
    """Height and width of its pictures; None is its resolution's square."""


class Batch(NamedTuple):
    """One batch of pictures, with a row for each."""

    sides: dict[int, UInt8[np.ndarray, "b _ _ 3"]]
    """Side in pixels -> the pictures."""
    paths: dict[int, UInt8[np.ndarray, "n b _ _ 3"]]
    """Side in pixels -> what the stage thought they were, from noise to the end."""
    chosen: Chosen | None
    """Which candidates they are, where several were drawn of each."""


class Chosen(NamedTuple):
    """The candidates that a batch was chosen from."""

    seeds: UInt32[np.ndarray, "n b"]
    """The seeds of all of them."""
    scores: Float[np.ndarray, "n b"]
    """What the judge gave them."""
    best: Int[np.ndarray, " b"]
    """The number of the one that was kept, from 0."""


def draw_batch(
    runs, told, seeds, low, steering, noise, *, best_of, prompts, frames, progress, count
):
    """Draw the pictures of a batch: -> Batch.

    told: for each stage what it is given and led away from; this and all else has a row a picture.
    noise: what the first stage begins from, or None. best_of: how the first stage's are chosen from
    several, by their prompts, or None. count: how many of the rows are pictures, the others filling
    the batch.
    """
    drawn, paths, chosen = {}, {}, None
    for run, (given, away), steered in zip(runs, told, steering, strict=True):
        config = run.stage.config
        if low is not None:
            small = images.to_float(jnp.asarray(low))
            enlarged = {c.name: c.of_lowres(small) for c in config.conditions}
            given = given | {k: v for k, v in enlarged.items() if v is not None}
        resolution = config.resolution

        how = {"noise": noise, "frames": frames, "progress": progress, "count": count}
        pictures = functools.partial(_drawn, run, given, away, steered, **how)

        if best_of is not None and chosen is None:
            of_all = best_of.seeds(seeds)
            several, thoughts = zip(*map(pictures, of_all), strict=True)
            scores = best_of.scores(np.stack(several), prompts)
            chosen = Chosen(of_all, scores, scores.argmax(axis=0))
            rows = np.arange(len(seeds))
            seeds = of_all[chosen.best, rows]
            low = np.stack(several)[chosen.best, rows]
            if frames:
                path = np.stack(thoughts)[chosen.best, :, rows].swapaxes(0, 1)
        else:
            low, path = pictures(seeds)
        noise = None
        drawn[resolution] = low
        if frames:
            paths[resolution] = path
    return Batch(drawn, paths, chosen)


def _drawn(run, given, away, steered, seeds, *, noise, frames, progress, count):
    """-> (one stage's pictures, what they were thought to be on the way)."""
    config, path = run.stage.config, []
    resolution = config.resolution
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))

    def each(step, steps, thought):
        if progress is not None:
            progress(
                Progress(
                    stage=config.name,
                    resolution=config.resolution,
                    step=step,
                    steps=steps,
                    pictures=count,
                    thought=thought,
                )
            )
        if step - 1 in np.linspace(steps - 1, 0, min(frames, steps)).astype(int):
            path.append(images.to_uint8(thought()))

    x0 = run.stage.sample(
        run.params,
        given,
        # folded by resolution, so that a stage draws the same wherever one starts
        jax.vmap(lambda k: jax.random.fold_in(k, resolution))(keys),
        settings=run.settings,
        negative=away,
        steering=steered,
        sides=run.sides,
        place=run.place,
        noise=noise,
        each=each if frames or progress else None,
    )
    if not jnp.isfinite(x0).all():
        raise UserError(
            f"stage {config.name} drew values that are not finite: its weights are "
            "damaged, or its settings too extreme"
        )
    return images.to_uint8(x0), np.stack(path) if frames else None


class ToldInParts:
    """What stages are told of many prompts, embedded part by part as the prompts come up.

    The two parts that were asked for last are kept: all that one batch can need.
    """

    def __init__(
        self,
        told: Callable[[slice], list[tuple[dict[str, Any], dict[str, Any]]]],
        *,
        at_once: int,
    ):
        """told: `Cascade._told` of a part of the prompts. at_once: how many prompts make a part, at
        least as many as a batch has rows."""
        self._at_once = at_once
        self._part = functools.lru_cache(maxsize=2)(
            lambda i: told(slice(i * at_once, (i + 1) * at_once))
        )

    def __call__(self, rows: Sequence[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each stage what it is given and led away from, a row for each of these prompts.

        rows: places in the list of all prompts, in order.
        """
        first, last = rows[0] // self._at_once, rows[-1] // self._at_once
        parts = [self._part(i) for i in range(first, last + 1)]
        within = np.array(rows) - first * self._at_once
        told = []
        for stage in zip(*parts, strict=True):
            given = jax.tree.map(lambda *x: _joined(x)[within], *(given for given, _ in stage))
            away = jax.tree.map(lambda *x: _of_rows(x, within), *(away for _, away in stage))
            told.append((given, away))
        return told


def _of_rows(parts: Sequence[Any], within: np.ndarray) -> Any:
    """These rows of the parts, of which each may have a single row for all."""
    if all(len(part) == 1 for part in parts):
        return parts[0][np.zeros_like(within)]
    return _joined(parts)[within]


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def remembering(
    encoder: Any, given: Mapping[tuple[str, ...], TextEmbedding] = {}
) -> Callable[[Sequence[str]], TextEmbedding]:
    """The encoder, which encodes the same texts once; None where no condition will ask it.

    given: embeddings of texts that it is not asked for.
    """
    encoder, known = encoder or no_encoder, dict(given)

    def embed(texts: Sequence[str]) -> TextEmbedding:
        if tuple(texts) not in known:
            known[tuple(texts)] = encoder(texts)
        return known[tuple(texts)]

    return embed
