"""Floating-point operations of a program, counted from its trace.

Matrix products and convolutions are counted, a multiplication and its addition as two; all else
(norms, activations, the optimizer) is left out, as is customary for model FLOPs: it runs on other
units and adds little. A multiplication by a zero of padding or dilation is no work, so that a
convolution and each of its two gradients count the same.

The trace is what is counted, not a compiled program: loop bodies times their trip counts, all
devices together, and what rematerialisation computes again counts again. A compiler's own figure
(`cost_analysis`) counts a loop's body once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

OPAQUE = ("pallas_call", "ffi_call", "ragged_dot_general")


def count(fn: Callable[..., Any], *args: Any) -> float:
    """Count the FLOPs of one call fn(*args), which is traced and not run.

    args: arrays or jax.ShapeDtypeStructs, in pytrees; other arguments belong in fn
    (functools.partial). A conditional counts as its largest branch, or if it is on the platform as
    its default branch, which accelerators take. Raises ValueError where work cannot be counted: in
    a while loop without a fixed trip count, and in a kernel that is opaque to JAX.
    """
    return _total(jax.make_jaxpr(fn)(*args).jaxpr)


def _total(jaxpr: Any) -> float:
    # Derivatives written by hand leave equations behind whose results nobody uses, and that
    # compilers drop.
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(sum(map(_of_equation, live.eqns)))


def _of_equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        return _of_convolution(eqn)
    if name in OPAQUE:
        raise ValueError(f"cannot count the FLOPs of {name}, which is opaque to JAX")
    inner = [_total(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in jaxprs_in_params(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "cannot count the FLOPs of a while loop whose trip count is only known when it runs; "
            "use lax.scan, or lax.fori_loop with Python integers as bounds"
        )
    if name == "cond":
        platforms = params.get("branches_platforms")
        return inner[platforms.index(None)] if None in (platforms or ()) else max(inner)
    if name == "shard_map":
        # Inside, shapes are those of one device of the axes that are split by hand.
        return math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"]) * sum(inner)
    return float(sum(inner))


def _of_convolution(eqn: Any) -> float:
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    lhs, kernel = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    channels = out[dims.out_spec[1]] * kernel[dims.rhs_spec[1]]
    products = math.prod(
        _products(lhs[i], kernel[k], out[o], stride, low, gap, kernel_gap)
        for i, k, o, stride, (low, _), gap, kernel_gap in zip(
            dims.lhs_spec[2:],
            dims.rhs_spec[2:],
            dims.out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    return 2.0 * out[dims.out_spec[0]] * channels * products


@functools.cache
def _products(
    size: int, kernel: int, out: int, stride: int, low: int, gap: int, kernel_gap: int
) -> int:
    """Pairs of output place and kernel place, along one axis, that meet an element of the input."""
    places = (o * stride + k * kernel_gap - low for o in range(out) for k in range(kernel))
    return sum(0 <= place < size * gap and place % gap == 0 for place in places)
