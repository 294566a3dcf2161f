"""The update rule: its rate, its clip, its decay, and what it may not be."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.training.job import Optimizer


def test_the_rate_warms_up_stays_and_cools_down():
    rule = Optimizer(learning_rate=1.0, warmup_images=16, cooldown_images=32)
    rates = [float(rule.rate(step, batch_size=8, steps=10)) for step in range(11)]
    assert np.allclose(rates, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_weight_decay_spares_biases_and_norms():
    params = {
        "conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    }
    rule = Optimizer(name="adamw", learning_rate=1.0, weight_decay=0.5).build(8, 8)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    assert float(updates["conv"]["kernel"][0, 0]) == -0.5
    assert float(updates["conv"]["bias"][0]) == float(updates["norm"]["scale"][0]) == 0


@pytest.mark.parametrize(
    "names,values,message",
    [
        (("learning_rate", "clip", "eps"), (0.0, math.nan), "must be above 0, got"),
        (("warmup_images", "cooldown_images"), (-1,), "must be 0 or more, got -1"),
        (("weight_decay",), (-1.0, math.nan), "must be 0 or more, got"),
        (("b1", "b2"), (1.0, -0.1), r"must be in \[0, 1\), got"),
    ],
)
def test_impossible_updates_are_refused(names, values, message):
    for name, value in itertools.product(names, values):
        with pytest.raises(ValueError, match=rf"Optimizer\.{name} {message}"):
            Optimizer(**{name: value})


def test_updates_have_the_size_of_the_rate_and_of_the_clip():
    """Adam that remembers nothing moves every weight by the rate, or by rate g / (|g| + eps)."""
    o = Optimizer(
        learning_rate=2.0, warmup_images=16, cooldown_images=32, b1=0.0, b2=0.0, eps=1e-20
    )
    rule = o.build(batch_size=8, steps=10)
    params = {"w": jnp.array([3.0, -4.0])}
    state, sizes = rule.init(params), []
    for _ in range(10):
        updates, state = rule.update(params, state, params)
        sizes.append(-updates["w"])
    np.testing.assert_allclose(sizes, np.outer([1, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5], [1, -1]))
    clipped = Optimizer(learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, clip=0.5)  # of a norm of 5
    rule = clipped.build(batch_size=8, steps=10)
    updates, _ = rule.update(params, rule.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.3 / 1.3, 0.4 / 1.4], rtol=1e-5)
