"""The three ways in which a network is told things, whatever they are.

    channels  are concatenated to its input: a low-resolution picture, a mask
    vectors   are added to the embedding of time: pooled text, a class, a level of noise
    tokens    are attended to: text, token by token

A network knows no more of them than their widths. Who tells it (`cascade.stage.conditions`) turns
what it has into signals by a small module whose parameters are its own; two such modules are here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cascade.models.layers import Linear, attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
    """What a network is told besides x and the time."""

    # Any, since transformations also build this pytree of shapes, shardings and placeholders.
    channels: Any = ()
    """Arrays [b, *d, c] with the leading dimensions of x, concatenated behind its channels."""
    vectors: Any = ()
    """Arrays [b, e], added to the embedding of time one after the other."""
    tokens: Any = None
    """[b, l, d], or None."""
    mask: Any = None
    """[b, l] bool, False where a token is padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
    """How much a network is told, which decides its shapes."""

    channels: int = 0
    """Channels behind those of x."""
    tokens: int = 0
    """Width of a token; 0 means that there are none."""


def together(signals: Sequence[Signals]) -> Signals:
    """All of them as one: channels and vectors in order, tokens one behind the other."""
    told = [s for s in signals if s.tokens is not None]
    return Signals(
        channels=tuple(c for s in signals for c in s.channels),
        vectors=tuple(v for s in signals for v in s.vectors),
        tokens=jnp.concatenate([s.tokens for s in told], axis=1) if told else None,
        mask=jnp.concatenate([s.mask for s in told], axis=1) if told else None,
    )


def check_signals(network: str, widths: Widths, x: Array, signals: Signals) -> None:
    """Raise ValueError unless the signals have the widths that a network was built for.

    network: what errors call it. x: [b, *d, c], whose leading dimensions the channels must have.
    """
    shapes = [c.shape for c in signals.channels]
    channels = sum(shape[-1] for shape in shapes)
    if channels != widths.channels or any(shape[:-1] != x.shape[:-1] for shape in shapes):
        raise ValueError(
            f"{network} was built for {widths.channels} channels behind those of x: "
            f"Signals.channels must be [{', '.join(map(str, x.shape[:-1]))}, "
            f"{widths.channels}] in all, got {shapes or 'none'}"
        )
    width = 0 if signals.tokens is None else signals.tokens.shape[-1]
    if width != widths.tokens or (width and signals.mask is None):
        got = None if signals.tokens is None else signals.tokens.shape
        raise ValueError(
            f"{network} was built for tokens of width {widths.tokens}: Signals.tokens must be "
            f"[b, l, {widths.tokens}] with their mask, or None where that is 0; got {got}"
        )


class TimeEmbedding(nnx.Module):
    """Sinusoids of a time in 0..1000, then two layers (Ho et al. 2020)."""

    def __init__(self, width: int, emb_width: int, rngs: nnx.Rngs):
        self.width = width
        self.hidden = Linear(width, emb_width, rngs=rngs)
        self.out = Linear(emb_width, emb_width, rngs=rngs)

    def __call__(self, time: Float[Array, " b"]) -> Float[Array, "b e"]:
        return self.out(jax.nn.silu(self.hidden(sinusoids(time, self.width))))


class PooledText(nnx.Module):
    """LayerNorm of the tokens, the null token in front of them, and their attention pooling.

    The null token is learned and always visible, so that a row without text has a finite softmax
    and a learned unconditional embedding. Padding is invisible whatever it holds. The pooling query
    is a projection of the mean of the visible tokens (Saharia et al. 2022, sec. 2.1).
    """

    def __init__(
        self,
        text_width: int,
        emb_width: int,
        *,
        head_width: int,
        context_width: int | None,
        rngs: nnx.Rngs,
    ):
        """context_width: width of the tokens returned, by one projection; None is text_width."""
        self.head_width = head_width
        self.norm = nnx.LayerNorm(text_width, rngs=rngs)
        self.null = nnx.Param(jax.random.normal(rngs.params(), (text_width,)))
        self.query = Linear(text_width, emb_width, rngs=rngs)
        self.keys_values = Linear(text_width, 2 * emb_width, rngs=rngs)
        self.out = Linear(emb_width, emb_width, rngs=rngs)
        self.context = Linear(text_width, context_width, rngs=rngs) if context_width else None

    def __call__(self, text: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Signals:
        """The pooled text is a vector; the tokens, one more than there were, are to be attended."""
        b, _, d = text.shape
        text = self.norm(jnp.where(mask[:, :, None], text.astype(jnp.float32), 0))
        text = jnp.concatenate([jnp.broadcast_to(self.null[...], (b, 1, d)), text], axis=1)
        mask = jnp.concatenate([jnp.ones((b, 1), bool), mask], axis=1)
        mean = jnp.mean(text, axis=1, keepdims=True, where=mask[:, :, None])
        k, v = jnp.split(self.keys_values(text), 2, axis=-1)
        pooled = attend(self.query(mean), k, v, mask, self.head_width)
        tokens = self.context(text) if self.context else text
        return Signals(vectors=(self.out(pooled)[:, 0],), tokens=tokens, mask=mask)


def sinusoids(time: Float[Array, " b"], width: int) -> Float[Array, "b w"]:
    """[cos, sin] of time at width / 2 frequencies from 1 down to almost 1 / 10000 rad per unit."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / half)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
