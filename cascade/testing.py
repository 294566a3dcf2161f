"""Small stand-ins: a text encoder without weights, and stages of 8 -> 16 -> 32 px.

For tests, and for anybody who wants to try the machinery in seconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade.models import EfficientLevel, EfficientUNetConfig, Level, Network, UNetConfig
from cascade.runner.cascade import Cascade
from cascade.stage import LowRes, Pixels, Sampling, Stage, StageConfig, Text
from cascade.text import TextEmbedding, Tokens


class FakeEncoder:
    """T5Encoder's interface over fixed random vectors, one a word; no order, no context."""

    def __init__(self, width: int = 8, max_tokens: int = 12):
        self.width, self.max_tokens = width, max_tokens

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        words = [text.split() for text in texts]
        ids = np.zeros((len(texts), self.max_tokens), np.int32)
        for row, text in zip(ids, words, strict=True):
            for i, word in enumerate(text[: self.max_tokens]):
                row[i] = 1 + zlib.crc32(word.encode()) % 999
        truncated = np.array([len(text) > self.max_tokens for text in words])
        return Tokens(ids=ids, mask=ids > 0, truncated=truncated)

    def embed(self, tokens: Tokens) -> TextEmbedding:
        table = jax.random.normal(jax.random.key(0), (1000, self.width))
        return TextEmbedding(values=table[jnp.asarray(tokens.ids)], mask=jnp.asarray(tokens.mask))

    def __call__(self, texts: Sequence[str]) -> TextEmbedding:
        return self.embed(self.tokenize(texts))


def base_stage(text_width: int = 8) -> StageConfig:
    """Text -> 8 px."""
    network = UNetConfig(
        levels=(Level(width=8, blocks=1), Level(width=16, blocks=1, attention=True)),
        head_width=8,
    )
    return StageConfig(
        name="base8",
        space=Pixels(resolution=8),
        conditions=_text(text_width),
        network=network,
        sampling=Sampling(steps=3, guidance=2.0),
    )


def smallest_stage(text_width: int = 8) -> StageConfig:
    """Text -> 8 px by one block down and one up, for what traces or compiles a stage often."""
    network = EfficientUNetConfig(
        levels=(EfficientLevel(width=16, blocks=1, stride=1),), head_width=8
    )
    return StageConfig(
        name="base8",
        space=Pixels(resolution=8),
        conditions=_text(text_width),
        network=network,
        sampling=Sampling(steps=2, guidance=1.0),
    )


def super_resolution_stage(lowres: int = 8, text_width: int = 8) -> StageConfig:
    """Text and lowres px -> twice that."""
    network = EfficientUNetConfig(
        levels=(
            EfficientLevel(width=8, blocks=1, stride=1),
            EfficientLevel(width=16, blocks=1, text_attention=text_width > 0),
        ),
        head_width=8,
    )
    return StageConfig(
        name=f"sr{2 * lowres}",
        space=Pixels(resolution=2 * lowres),
        conditions=(LowRes(resolution=lowres), *_text(text_width)),
        network=network,
        sampling=Sampling(steps=2, guidance=1.0, aug_level=0.1),
    )


def _text(width: int) -> tuple[Text, ...]:
    return (Text(width=width, head_width=8),) if width else ()


def lively(of: Stage | Network, seed: int = 0) -> dict[str, Any]:
    """Random parameters, none of them zero: fresh ones, whose outputs are, would hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.1
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + spread * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, of.abstract())


def stage_configs() -> list[StageConfig]:
    """The stages of `cascade`, smallest first."""
    return [base_stage(), super_resolution_stage(8), super_resolution_stage(16)]


def cascade(configs: Sequence[StageConfig] | None = None) -> Cascade:
    """An untrained cascade of these stages on a FakeEncoder; None is 8 -> 16 -> 32 px."""
    stages = [Stage(config) for config in (stage_configs() if configs is None else configs)]
    return Cascade(
        [(stage, lively(stage)) for stage in stages],
        FakeEncoder(),
        name="testing",
    )
