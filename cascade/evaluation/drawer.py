"""What an evaluation draws with: a cascade, its settings fixed, one picture at a time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cascade.runner.cascade import Cascade
from cascade.runner.reranking import Judge
from cascade.stage import Sampling
from cascade.text import TextEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawer:
    """A cascade with fixed settings, which draws one picture at a time."""

    cascade: Cascade
    """The model."""
    settings: Mapping[str, Sampling]
    """Stage name -> the settings it samples with; of every stage that draws."""
    null_text_in_sr: bool = False
    """Whether super-resolution stages get the null condition in place of the prompt, and so must
    draw from the small picture alone."""
    best_of: int = 1
    """So many candidates are drawn of a picture, of which the judge keeps one."""
    judge: Judge | None = None
    """Who chooses the candidate; None where there is only one."""

    def __call__(
        self,
        prompt: str,
        seed: int,
        *,
        until: int | None = None,
        lowres: UInt8[np.ndarray, "h w 3"] | None = None,
    ) -> dict[int, UInt8[np.ndarray, "s s 3"]]:
        """Draw the prompt from its own seed: side in pixels -> picture, as `Cascade.draw`.

        until: the side in pixels of the last stage that draws; None draws with all. lowres: the
        picture that the stages above its size start from; None starts from the prompt.
        """
        if lowres is not None:
            return self._draw(prompt, seed, until, lowres)
        sides = [stage.config.resolution for stage, _ in self.cascade.select(until=until)]
        if not self.null_text_in_sr or len(sides) == 1:
            return self._draw(prompt, seed, until, None)
        small = self._draw(prompt, seed, sides[0], None)
        return {**small, **self._draw(prompt, seed, until, small[sides[0]])}

    def replaced(self, stages: Sequence[str], **fields: Any) -> "Drawer":
        """This drawer, with these fields of the named stages' settings replaced."""
        changed = {name: dataclasses.replace(self.settings[name], **fields) for name in stages}
        return dataclasses.replace(self, settings={**self.settings, **changed})

    def _draw(self, prompt, seed, until, lowres) -> dict[int, np.ndarray]:
        cascade = self.cascade
        if lowres is not None and self.null_text_in_sr:
            cascade = Cascade(cascade.stages, _NoText(cascade.encoder))
        stages = cascade.select(until=until, lowres=None if lowres is None else len(lowres))
        settings = [self.settings[stage.config.name] for stage, _ in stages]
        several = {}
        if lowres is None and self.judge is not None:
            several = {"best_of": self.best_of, "judge": self.judge}
        pictures = cascade.draw(
            prompt, seed=seed, until=until, lowres=lowres, settings=settings, **several
        )
        return next(iter(pictures)).images


class _NoText:
    """A text encoder whose every embedding is the null condition."""

    def __init__(self, encoder: Any):
        self._encoder = encoder
        self.width, self.max_tokens = encoder.width, encoder.max_tokens
        self.tokenize = encoder.tokenize

    def embed(self, tokens) -> TextEmbedding:
        text = self._encoder.embed(tokens)
        return TextEmbedding(values=jnp.zeros_like(text.values), mask=jnp.zeros_like(text.mask))

    def __call__(self, texts) -> TextEmbedding:
        return self.embed(self.tokenize(texts))
