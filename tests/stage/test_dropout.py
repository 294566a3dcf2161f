"""Dropout in the network of a stage, where a batch is trained on in parts."""

import dataclasses

import jax
import numpy as np

from cascade import testing
from cascade.diffusion import loss as noise
from cascade.stage import Stage


def test_parts_of_a_batch_drop_out_other_values(monkeypatch):
    """With the noise of the first part for all, the parts of equal rows differ by dropout alone."""
    config, key = testing.smallest_stage(), jax.random.key(3)
    rng, text = np.random.default_rng(0), testing.FakeEncoder()(["red", "blue"])
    image = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    batch = {"image": image, "text": text.values, "text_mask": text.mask}
    monkeypatch.setattr(noise, "draw", lambda draw, shape, part: draw(shape))
    losses = []
    for dropout in (0.0, 0.5):
        network = dataclasses.replace(config.network, dropout=dropout)
        stage = Stage(dataclasses.replace(config, network=network))
        params = testing.lively(stage)
        loss = jax.jit(lambda rows, i, s=stage, p=params: s.loss(p, rows, key, (i, 2))[0])
        losses.append([float(loss(batch, i)) for i in range(2)])
    (same, again), (one, other) = losses
    assert same == again and one != other
