"""A run of sampling is changed from outside, by a steering that a reader writes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import testing
from cascade.diffusion import process
from cascade.stage import Sampling, Stage, Start, Steering

CONFIG = dataclasses.replace(
    testing.smallest_stage(text_width=0), sampling=Sampling(steps=4, guidance=1.0)
)
STAGE = Stage(CONFIG)
PARAMS = testing.lively(STAGE)
PICTURES = jax.random.uniform(jax.random.key(9), (2, 8, 8, 3), minval=-1)


def draw(steering, seeds=(1, 2)):
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    return np.asarray(STAGE.sample(PARAMS, {}, keys, settings=CONFIG.sampling, steering=steering))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Elsewhere(Steering):
    """From a picture, in the last steps alone; with a hook, or without."""

    picture: Any
    steps: int = dataclasses.field(metadata={"static": True}, default=4)
    hook: Any = dataclasses.field(metadata={"static": True}, default=None)

    def check(self, steps):
        if self.steps > steps:
            raise ValueError(f"Elsewhere.steps must be at most {steps}, got {self.steps}")

    def start(self, noise, schedule, times):
        times = times[len(times) - 1 - self.steps :]
        x = noise
        if self.picture is not None:
            level = jnp.broadcast_to(schedule.logsnr(times[0]), (len(noise),))
            x = process.corrupt(self.picture, noise, level)
        hook = self.hook
        return Start(x, times, hook and functools.partial(hook, self.picture))


def test_no_steering_and_one_that_starts_where_the_run_would_draw_the_same():
    np.testing.assert_allclose(draw(Elsewhere(None)), draw(None), atol=1e-5)


def test_a_run_can_begin_elsewhere_and_take_fewer_steps():
    plain = draw(None)
    closer = [np.abs(draw(Elsewhere(PICTURES, steps)) - PICTURES).mean() for steps in (1, 4)]
    assert closer[0] < 0.9 * closer[1]
    assert np.abs(draw(Elsewhere(PICTURES, 1)) - plain).mean() > 0.05
    # Other pictures are another beginning, each of its own row alone.
    moved = draw(Elsewhere(PICTURES.at[0].multiply(-1), 1))
    assert np.abs(moved - draw(Elsewhere(PICTURES, 1))).max(axis=(1, 2, 3))[0] > 0.05
    np.testing.assert_allclose(moved[1], draw(Elsewhere(PICTURES, 1))[1], atol=1e-5)


def test_x_is_changed_after_every_step_with_what_the_steering_holds():
    def kept(picture, x, logsnr, keys):
        return jnp.where(jnp.arange(8)[:, None, None] < 4, picture, x)

    drawn, plain = draw(Elsewhere(PICTURES, 4, kept)), draw(Elsewhere(PICTURES, 4))
    np.testing.assert_allclose(drawn[:, :4], PICTURES[:, :4], atol=1e-6)
    # The steps after the first have seen what was put there.
    assert np.abs(drawn[:, 4:] - plain[:, 4:]).max() > 1e-3


def test_the_levels_and_keys_that_a_steering_gets_are_those_of_the_run():
    seen = []

    def note(picture, x, logsnr, keys):
        drawn = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        jax.debug.callback(lambda l, d: seen.append((float(l[0]), np.asarray(d))), logsnr, drawn)
        return x

    jax.block_until_ready(draw(Elsewhere(None, 3, note)))
    jax.effects_barrier()
    times = CONFIG.sampling.grid(4, CONFIG.schedule)
    levels = sorted(level for level, _ in seen)
    np.testing.assert_allclose(levels, CONFIG.schedule.logsnr(times[2:]), atol=1e-3)
    noise = np.concatenate([drawn for _, drawn in seen])  # of 3 steps and 2 pictures
    assert len(np.unique(noise)) == noise.size == 18


def test_a_watcher_is_told_of_the_steps_there_are_with_estimates_and_at_last_the_picture():
    def kept(picture, x, logsnr, keys):
        return jnp.where(jnp.arange(8)[:, None, None] < 4, picture, x)

    for steps in (2, 4):
        told, keys = [], jax.vmap(jax.random.key)(jnp.array([1, 2]))

        def each(i, n, thought, told=told):
            told.append((i, n, None if thought is None else np.asarray(thought())))

        steered = {"settings": CONFIG.sampling, "steering": Elsewhere(PICTURES, steps, kept)}
        drawn = STAGE.sample(PARAMS, {}, keys, **steered, each=each)
        assert [(i, n) for i, n, _ in told] == [(i, steps) for i in range(steps + 1)]
        assert told[0][2] is None
        for _, _, thought in told[1:-1]:
            assert np.abs(thought).max() <= 1  # as the denoiser left it, without the noise of x
            assert np.abs(thought[:, :4] - PICTURES[:, :4]).max() > 1e-3
        np.testing.assert_array_equal(told[-1][2], drawn)
        np.testing.assert_allclose(drawn, draw(Elsewhere(PICTURES, steps, kept)), atol=1e-6)


def test_what_a_steering_refuses_is_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="Elsewhere.steps must be at most 4, got 5"):
        draw(Elsewhere(PICTURES, 5))
