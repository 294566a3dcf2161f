"""LoRA: fine-tuning that leaves the weights alone and learns what to add to some of them.

    W' = W + A B,   A [in, r] ~ N(0, 1 / in),   B [r, out] = 0 to begin with

for every projection of every attention layer (Hu et al. 2022, "LoRA", with alpha = r). The sum is
formed ahead of the network, which knows nothing of it: trained weights and merged ones are the same
numbers, and any network with attention can be adapted. Of equal blocks, which are stacked, each has
its own A and B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

PROJECTIONS = re.compile(r"attentions?/.*kernel$")
"""Searched for in a parameter's path, such as mid_block/attentions/0/to_q/kernel."""


def adapters(params: Mapping[str, Any], rank: int, key: Key[Array, ""]) -> dict[str, Any]:
    """{"a": A, "b": B}, float32, in the place of every projection; the sum is W to begin with.

    params: nested dicts of the network's arrays (or shapes). Raises ValueError when none attends.
    """
    found = _adapters(params, rank, key, "")
    if not found:
        raise ValueError("LoRA: this network has no attention whose projections to adapt")
    return found


def merged(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The weights with what was learned added, in float32, and in their own dtype again."""
    whole = dict(params)
    for name, part in adapters.items():
        weight = params[name]
        if isinstance(weight, Mapping):
            whole[name] = merged(weight, part)
        else:
            added = jnp.matmul(part["a"], part["b"], precision="highest")
            whole[name] = (weight.astype(jnp.float32) + added).astype(weight.dtype)
    return whole


def _adapters(params, rank, key, path):
    made = {}
    for i, (name, value) in enumerate(sorted(params.items())):
        k, where = jax.random.fold_in(key, i), f"{path}/{name}"
        if isinstance(value, Mapping):
            if part := _adapters(value, rank, k, where):
                made[name] = part
        elif PROJECTIONS.search(where):
            *stacked, inputs, outputs = value.shape
            a = jax.random.normal(k, (*stacked, inputs, rank)) * inputs**-0.5
            made[name] = {"a": a, "b": jnp.zeros((*stacked, rank, outputs))}
    return made
