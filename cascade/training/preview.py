"""What the averaged weights of a stage draw by now, while it trains: previews, and pictures that
are evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cascade import images
from cascade.data.source import Example
from cascade.data.transforms import block_means
from cascade.devices import sharding
from cascade.stage import Stage


def draw(
    stage: Stage, params: Any, batch: Mapping[str, Any], prompts: list[str], embed: Any
) -> UInt8[np.ndarray, "h w 3"] | None:
    """A sheet: a picture for each prompt (base), or rows of low | drawn | true (super-resolution).

    batch: as `Stage.loss` takes it; super-resolution enlarges its first four. embed: texts -> their
    embeddings. None where there is nothing to draw, as where prompts or examples say nothing of a
    condition, and in all processes but the first, which draws alone; fetching weights takes all.
    """
    config, base = stage.config, stage.config.lowres is None
    if base and not prompts:
        return None
    n = len(prompts) if base else min(4, len(next(iter(batch.values()))))
    given: dict[str, Any] = {}
    negative, shown = {}, {} if base else dict(batch)
    for condition in config.conditions:
        if base:
            given[condition.name] = condition.of_prompts(prompts, embed)
            if given[condition.name] is None:
                shape = config.space.shape()
                given[condition.name] = condition.of_steering(None, n, shape)
        away = condition.away(None, embed)
        if away is not None:
            negative[condition.name] = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), away)
    if None in given.values():
        return None
    negative, params, shown, given = sharding.fetch((negative, params, shown, given))
    if jax.process_index() != 0:
        return None
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    options: dict[str, Any] = {"settings": config.sampling, "negative": negative}
    if base:
        return images.grid(images.to_uint8(stage.sample(params, given, keys, **options)))
    shown = {name: value[:n] for name, value in shown.items()}
    given = {c.name: c.of_examples(shown) for c in config.conditions}
    if None in given.values():
        return None
    sides = shown["image"].shape[1:3]
    drawn = images.to_uint8(stage.sample(params, given, keys, sides=sides, **options))
    small = images.to_uint8(images.upsample(images.to_float(shown["lowres"]), sides))
    columns = zip(small, drawn, shown["image"], strict=True)
    return images.grid([image for row in columns for image in row], columns=3)


BATCH = 8
"""Pictures drawn together for an evaluation."""


def of(
    stage: Stage, params: Any, examples: Sequence[Example], embed: Any
) -> UInt8[np.ndarray, "n s s 3"] | None:
    """A picture for each example: of its caption (base), or of its small picture too.

    Picture i has the noise of seed i. embed: texts -> their embeddings. None where examples say
    nothing of a condition, and in all processes but the first, which draws alone; embedding texts
    and fetching weights takes all.
    """
    config, negative = stage.config, {}
    for condition in config.conditions:
        away = condition.away(None, embed)
        if away is not None:
            negative[condition.name] = jax.tree.map(lambda x: jnp.repeat(x, BATCH, axis=0), away)
    given = []
    for start in range(0, len(examples), BATCH):
        some = list(examples[start : start + BATCH])
        some += some[-1:] * (BATCH - len(some))
        batch = {"image": np.stack([example["image"] for example in some])}
        if small := config.lowres_resolution:
            batch["lowres"] = np.stack(
                [block_means(image, config.resolution // small) for image in batch["image"]]
            )
        captions = [example["caption"] for example in some]
        told: dict[str, Any] = {}
        for c in config.conditions:
            value = c.of_prompts(captions, embed)
            told[c.name] = c.of_examples(batch) if value is None else value
        if None in told.values():
            return None
        given.append(told)
    negative, params, given = sharding.fetch((negative, params, given))
    if jax.process_index() != 0:
        return None
    drawn = []
    for number, told in enumerate(given):
        keys = jax.vmap(jax.random.key)(number * BATCH + jnp.arange(BATCH))
        found = stage.sample(params, told, keys, settings=config.sampling, negative=negative)
        drawn.append(images.to_uint8(found))
    return np.concatenate(drawn)[: len(examples)]
