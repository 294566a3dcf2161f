"""What is diffused: pixels, the latents of an autoencoder, or what a reader makes of pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade import images, testing
from cascade.diffusion.denoise import Threshold
from cascade.models import AutoencoderConfig, Network
from cascade.stage import Latents, Pixels, Sampling, Space, Stage

AUTOENCODER = AutoencoderConfig(widths=(8, 8), blocks=1, latent_channels=2, groups=4, scaling=0.5)
LATENTS = Latents(resolution=16, autoencoder=AUTOENCODER)
NONE = Sampling(steps=2, guidance=1.0, threshold=Threshold(kind="none"))


def stage_in(space, **fields):
    config = testing.smallest_stage(text_width=0)
    channels = space.shape()[-1]
    network = dataclasses.replace(config.network, in_channels=channels, out_channels=channels)
    return dataclasses.replace(config, space=space, network=network, sampling=NONE, **fields)


def test_pixels_are_pictures():
    space, rng = Pixels(resolution=8), np.random.default_rng(0)
    assert space.shape() == (8, 8, 3) and space.shape((4, 6)) == (4, 6, 3)
    assert space.bounded and space.trainable and space.init(jax.random.key(0)) == {}
    batch = {"image": rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)}
    (name, image), *others = space.shapes(2, None).items()
    assert (name, image.shape, image.dtype, others) == ("image", (2, 8, 8, 3), np.uint8, [])
    assert space.shapes(2, 4)["image"].shape == (2, 4, 4, 3)
    x0 = space.encode(batch)
    np.testing.assert_array_equal(x0, images.to_float(batch["image"]))
    assert space.decode({}, x0) is x0


def test_latents_are_smaller_and_decoded_by_the_autoencoder():
    assert LATENTS.shape() == (8, 8, 2) and LATENTS.shape((4, 8)) == (2, 4, 2)
    assert not LATENTS.bounded and not LATENTS.trainable
    network = Network(AUTOENCODER)
    params = testing.lively(network)
    assert jax.tree.map(jnp.shape, jax.eval_shape(LATENTS.init, jax.random.key(0))) == jax.tree.map(
        jnp.shape, params
    )
    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    pictures = LATENTS.decode(params, latents)
    assert pictures.shape == (2, 16, 16, 3)
    expected = jax.jit(lambda: network.bind(params).decode(latents))()
    np.testing.assert_allclose(pictures, expected, atol=1e-4)
    assert pictures.std() > 0.05


def test_latents_are_of_pictures_that_the_autoencoder_can_shrink():
    with pytest.raises(ValueError, match=r"Latents.resolution must be a multiple of .*got 15"):
        Latents(resolution=15, autoencoder=AUTOENCODER)


def test_a_stage_in_latents_draws_pictures_of_its_resolution():
    """By the parameters that lie under "space", which are no others' business."""
    stage = Stage(stage_in(LATENTS))
    params = testing.lively(stage)
    assert set(params) == set(jax.eval_shape(stage.init, jax.random.key(0))) == {"network", "space"}
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = stage.sample(params, {}, keys, settings=NONE)
    assert drawn.shape == (2, 16, 16, 3)
    darker = params | {"space": jax.tree.map(lambda x: x / 2, params["space"])}
    assert abs(stage.sample(darker, {}, keys, settings=NONE) - drawn).max() > 1e-3
    assert stage.sample(params, {}, keys, settings=NONE, sides=(8, 12)).shape == (2, 8, 12, 3)


def test_thresholds_are_refused_where_x0_has_no_range():
    config = stage_in(LATENTS)
    for kind in ("static", "dynamic"):
        settings = dataclasses.replace(NONE, threshold=Threshold(kind=kind))
        message = f'Sampling.threshold must be "none" in base8, whose Latents .* got .{kind}.'
        with pytest.raises(ValueError, match=message):
            config.check(settings)
        with pytest.raises(ValueError, match=message):
            Stage(config).sample({}, {}, jax.random.split(jax.random.key(0), 1), settings=settings)
    with pytest.raises(ValueError, match="must be .none. in base8"):
        dataclasses.replace(config, sampling=Sampling())
    stage_in(Pixels(resolution=8)).check(dataclasses.replace(NONE, threshold=Threshold()))


def test_a_space_computes_in_the_type_asked_for():
    assert LATENTS.computing_in("bfloat16").autoencoder.compute_dtype == "bfloat16"
    assert Pixels(resolution=8).computing_in("bfloat16") == Pixels(resolution=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grey(Space):
    """One channel, of half the contrast."""

    def shape(self, sides=None):
        return (*(sides or (self.resolution, self.resolution)), 1)

    def shapes(self, b, crop):
        return Pixels(resolution=self.resolution).shapes(b, crop)

    def encode(self, batch):
        return images.to_float(batch["image"]).mean(axis=-1, keepdims=True) / 2

    def decode(self, params, x0):
        return jnp.broadcast_to(2 * x0, (*x0.shape[:-1], 3))


def test_a_readers_own_space_is_trained_in_and_drawn_from():
    config = stage_in(Grey(resolution=8), prediction="x0")
    stage = Stage(config)
    image = jnp.full((4, 8, 8, 3), 255, jnp.uint8)
    assert set(config.batch_shapes(4, 1)) == {"image"}
    # An untrained network answers 0, where x0 is 1/2 everywhere.
    params = jax.jit(stage.init)(jax.random.key(0, impl="rbg"))
    _, metrics = jax.jit(stage.loss)(params, {"image": image}, jax.random.key(1))
    np.testing.assert_allclose(metrics["x0_mse"], 0.25, rtol=1e-4)
    drawn = stage.sample(
        testing.lively(stage), {}, jax.random.split(jax.random.key(0), 2), settings=NONE
    )
    assert drawn.shape == (2, 8, 8, 3) and drawn.std() > 1e-2
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
