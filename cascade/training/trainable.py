"""What trains: all weights, adapters beside them, or some of them. The rest is frozen.

Frozen parameters are in no checkpoint, no average and no optimizer; they are what training began
from, and are read or made again when a run goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from cascade.training import lora


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Subclasses say which part of the parameters learns."""

    @property
    def freezes(self) -> bool:
        """Whether anything is left that stays as it was."""
        return True

    def split(self, params: Any, key: Key[Array, ""]) -> tuple[Any, Any]:
        """Parameters -> (what trains, float32; what is frozen). key: for what begins at random."""
        raise NotImplementedError

    def whole(self, trained: Any, frozen: Any) -> Any:
        """The inverse: the parameters that the network is called with."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Weights(Trainable):
    """All of them."""

    @property
    def freezes(self) -> bool:
        return False

    def split(self, params, key):
        return params, {}

    def whole(self, trained, frozen):
        return trained


@dataclass(frozen=True, kw_only=True)
class LoRA(Trainable):
    """Adapters to the projections of attention, instead of the weights (Hu et al. 2022)."""

    rank: int
    """Rank of what is added to each projection, at least 1."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRA.rank must be at least 1, got {self.rank}; Weights() has none")

    def split(self, params, key):
        return lora.adapters(params, self.rank, key), params

    def whole(self, trained, frozen):
        return lora.merged(frozen, trained)


@dataclass(frozen=True, kw_only=True)
class Only(Trainable):
    """The weights whose path a pattern is found in, such as "conditions/" or "attention/"."""

    pattern: str
    """A regular expression, searched for in paths such as network/conv_in/kernel."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(
                f"Only.pattern must be a regular expression, got {self.pattern!r}: {e}"
            ) from None

    def split(self, params, key):
        found = re.compile(self.pattern).search
        trained = _where(params, lambda path: found(path) is not None)
        if not trained:
            raise ValueError(f"Only.pattern {self.pattern!r} is found in no parameter's path")
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        return trained, _where(params, lambda path: found(path) is None)

    def whole(self, trained, frozen):
        return _merged(trained, frozen)


def _where(tree: Mapping[str, Any], holds: Any, path: str = "") -> dict[str, Any]:
    """The part of nested dicts whose leaves' paths hold; branches without any are left out."""
    kept = {}
    for name, value in tree.items():
        where = f"{path}/{name}" if path else name
        if isinstance(value, Mapping):
            if part := _where(value, holds, where):
                kept[name] = part
        elif holds(where):
            kept[name] = value
    return kept


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {**one, **other}
    for name in one.keys() & other.keys():
        both[name] = _merged(one[name], other[name])
    return both
