"""A steering puts something around the denoiser: after guidance, before the threshold."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cascade import testing
from cascade.diffusion.denoise import Threshold, changed
from cascade.runner import inputs
from cascade.stage import Sampling, Stage, Start, Steering, TextInput

CONFIG = testing.smallest_stage()
STAGE = Stage(CONFIG)
PARAMS = testing.lively(STAGE)
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
LOGSNR = jnp.array([-1.0, 1.0])
NONE, STATIC = Threshold(kind="none"), Threshold(kind="static")


def text(b=2):
    values = jax.random.normal(jax.random.key(1), (b, 3, 8))
    return {"text": TextInput(values, jnp.ones((b, 3), bool))}


def estimate(**options):
    return jax.jit(STAGE.denoiser(PARAMS, text(), **options))(X, LOGSNR)


def raised(x0, x_t, logsnr):
    return x0 + 0.5 * jnp.sin(3 * x_t)


def around(denoiser):
    return changed(denoiser, raised)


def test_what_is_around_is_given_the_guided_estimate_and_its_own_is_thresholded():
    def x0(threshold, **options):
        return estimate(guidance=4.0, threshold=threshold, **options)

    guided = x0(NONE)
    assert np.abs(guided).max() > 1.2  # so that the order matters
    wanted = jnp.clip(raised(guided, X, LOGSNR), -1, 1)
    np.testing.assert_allclose(x0(STATIC, around=around), wanted, atol=1e-6)
    other_order = raised(jnp.clip(guided, -1, 1), X, LOGSNR)
    assert np.abs(wanted - other_order).max() > 0.2
    # and it is not the conditional half alone that is changed
    plain = estimate(threshold=STATIC, around=around)
    assert np.abs(plain - wanted).max() > 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Towards(Steering):
    """x0 goes a part of the way to a colour; the weights are shared."""

    share: Any
    weights: Any

    def repeated(self, b):
        return dataclasses.replace(self, share=np.broadcast_to(self.share, (b,)))

    def start(self, noise, schedule, times):
        def change(x0, x_t, logsnr):
            share = self.share[:, None, None, None]
            return (1 - share) * x0 + share * self.weights

        return Start(noise, times, around=lambda denoiser: changed(denoiser, change))


def draw(steering, seeds=(1, 2), guidance=1.0):
    settings = Sampling(steps=3, guidance=guidance, threshold=STATIC)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    given = {"text": TextInput(*(x[: len(seeds)] for x in text()["text"]))}
    drawn = STAGE.sample(PARAMS, given, keys, settings=settings, steering=steering)
    return np.asarray(drawn)


def test_a_run_is_sampled_with_what_is_around_its_denoiser():
    plain = draw(None)
    weights = jnp.array([2.0, -0.5, 0.25])
    whole = draw(Towards(jnp.array([1.0, 0.0]), weights))
    np.testing.assert_allclose(whole[0], np.broadcast_to([1.0, -0.5, 0.25], (8, 8, 3)), atol=1e-6)
    np.testing.assert_allclose(whole[1], plain[1], atol=1e-5)
    half = draw(Towards(jnp.array([0.5, 0.5]), weights), guidance=3.0)
    assert np.abs(half - draw(None, guidance=3.0)).max() > 0.1


def test_a_picture_depends_on_its_own_row_alone():
    steering = Towards(jnp.array([0.3, 0.7]), jnp.ones(3))
    first = draw(Towards(jnp.array([0.3]), jnp.ones(3)), seeds=(1,))
    np.testing.assert_allclose(draw(steering)[0], first[0], atol=1e-5)


def test_a_batch_repeats_the_rows_and_not_what_pictures_share():
    own = Towards(np.float32(0.5), np.ones(3, np.float32))
    one, none = inputs.alike([own, None])([0, 0, 0])
    assert none is None and one.share.shape == (3,) and one.weights is own.weights
    # By default all arrays have a row a picture.
    plain = Steering.repeated(own, 3)
    assert plain.share.shape == (3,) and plain.weights.shape == (3, 3)
