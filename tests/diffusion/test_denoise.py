import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascade.diffusion.denoise import (
    Constant,
    Interval,
    Oscillating,
    PerStep,
    Threshold,
    dynamic_threshold,
    guide,
    rescale,
    static_threshold,
    thresholded,
)
from cascade.diffusion.process import from_x0, to_x0

SHAPES = [(2, 5), (2, 8, 8, 3), (2, 4, 8, 8, 3)]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_guidance_goes_from_unconditional_through_conditional_and_beyond(shape):
    cond, uncond = normal(0, shape), normal(1, shape)
    np.testing.assert_allclose(guide(cond, uncond, 0.0), uncond)
    np.testing.assert_allclose(guide(cond, uncond, jnp.float32(1)), cond, atol=1e-6)
    np.testing.assert_allclose(guide(cond, uncond, 4.0), 4 * cond - 3 * uncond, atol=1e-5)


def test_guidance_weight_may_differ_between_examples():
    cond, uncond = normal(0, (3, 4, 4, 3)), normal(1, (3, 4, 4, 3))
    out = guide(cond, uncond, jnp.array([0.0, 1.0, 3.0]))
    for example, w in enumerate([0.0, 1.0, 3.0]):
        alone = guide(cond[example : example + 1], uncond[example : example + 1], w)
        np.testing.assert_allclose(out[example], alone[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_guiding_in_the_networks_space_is_guiding_x0(kind):
    cond, uncond, x_t = normal(0, (2, 6)), normal(1, (2, 6)), normal(2, (2, 6))
    logsnr = jnp.array([-2.0, 1.0])
    mixed = guide(cond, uncond, 5.0)
    in_x0 = guide(to_x0(cond, kind, x_t, logsnr), to_x0(uncond, kind, x_t, logsnr), 5.0)
    np.testing.assert_allclose(in_x0, to_x0(mixed, kind, x_t, logsnr), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(from_x0(in_x0, kind, x_t, logsnr), mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "plan, expected",
    [
        (Constant(), [7] * 8),
        # sigma / alpha from e^3.5 to 1: log-SNR -7 to 0
        (Interval(low=np.exp(0.6), high=np.exp(2.1)), [1, 1, 1, 7, 7, 7, 1, 1]),
        (Oscillating(low=2.0, share=0.25), [7, 7, 2, 7, 2, 7, 2, 7]),
        (Oscillating(low=2.0, share=0.0), [2, 7] * 4),
        (PerStep(factors=(1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0)), [7, 3.5, 14, 0, 7, 7, 7, 7]),
    ],
)
def test_guidance_weights_follow_their_plan(plan, expected):
    grid = jnp.arange(-7.0, 1.0)
    np.testing.assert_allclose(plan(jnp.float32(7), grid, grid), expected)
    # Between the steps, where a second-order sampler asks, as at the nearest.
    np.testing.assert_allclose(plan(jnp.float32(7), grid - 0.05, grid), expected)


def test_an_interval_has_its_upper_end_and_not_its_lower():
    clean = jnp.zeros(1)  # sigma / alpha is 1
    for low, high, weight in ((1.0, 2.0, 1.0), (0.5, 1.0, 3.0)):
        assert Interval(low=low, high=high)(3.0, clean, clean)[0] == weight


def test_rescaling_gives_back_the_conditionals_contrast():
    cond, uncond = normal(0, (3, 8, 8, 3)), normal(1, (3, 8, 8, 3)) + 0.2
    mixed = guide(cond, uncond, 7.0)
    full, half, none = (np.asarray(rescale(mixed, cond, phi)) for phi in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(full.std((1, 2, 3)), np.std(cond, (1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(none, mixed, rtol=1e-6)
    np.testing.assert_allclose(half, (full + none) / 2, rtol=1e-4)
    assert np.all(none.std((1, 2, 3)) > 3 * full.std((1, 2, 3)))


def test_rescaling_leaves_the_zeros_of_an_untrained_network_zeros():
    zeros = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_array_equal(rescale(zeros, zeros, 0.7), zeros)


def test_the_first_share_of_the_steps_is_counted_exactly():
    """.07 * 100 is 7.000000000000001."""
    grid = jnp.arange(100.0)
    weights = Oscillating(share=0.07)(jnp.float32(7), grid, grid)
    assert np.flatnonzero(weights == 1)[0] == 7


@pytest.mark.parametrize("percentile", [0.9, 0.995])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 20, 20, 3)])
def test_dynamic_threshold_is_numpys_percentile_of_each_example(shape, percentile):
    x0 = 3 * normal(0, shape) * jnp.linspace(0.2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    out = dynamic_threshold(x0, percentile)
    for image, result in zip(np.asarray(x0, np.float64), out, strict=True):
        s = max(np.percentile(np.abs(image), 100 * percentile), 1)
        np.testing.assert_allclose(result, np.clip(image, -s, s) / s, atol=1e-5)


def test_the_default_percentile_leaves_out_one_value_in_two_hundred():
    # 10000 values of .5, and outliers of 8: 0.4 % of them are clipped away, 0.6 % set the scale.
    few = jnp.full((1, 10000), 0.5).at[0, :40].set(8.0)
    many = jnp.full((1, 10000), 0.5).at[0, :60].set(8.0)
    out = Threshold()(jnp.concatenate([few, many]))
    np.testing.assert_allclose(out[0, -1], 0.5)
    np.testing.assert_allclose(out[1, -1], 0.5 / 8)
    np.testing.assert_allclose(out[:, 0], 1.0)


def test_dynamic_threshold_leaves_images_in_range_alone():
    x0 = jnp.tanh(normal(0, (2, 8, 8, 3)))
    np.testing.assert_array_equal(dynamic_threshold(x0), x0)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_thresholding_is_idempotent_and_stays_in_range(kind):
    once = Threshold(kind=kind)(4 * normal(0, (2, 8, 8, 3)))
    assert float(jnp.max(jnp.abs(once))) == 1.0
    np.testing.assert_array_equal(Threshold(kind=kind)(once), once)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_thresholding_one_example_does_not_touch_another(kind):
    x0 = 2 * normal(0, (2, 8, 8, 3))
    changed = x0.at[1].multiply(100.0)
    out, out_changed = Threshold(kind=kind)(x0), Threshold(kind=kind)(changed)
    np.testing.assert_array_equal(out[0], out_changed[0])
    assert not np.array_equal(out[1], out_changed[1])


def test_cap_bounds_the_rescaling():
    x0 = 10 * normal(0, (2, 8, 8, 3))
    np.testing.assert_array_equal(dynamic_threshold(x0, cap=1.0), static_threshold(x0))
    np.testing.assert_allclose(dynamic_threshold(x0, cap=1.5), jnp.clip(x0 / 1.5, -1, 1), atol=1e-6)


def test_threshold_none_changes_nothing():
    x0 = 10 * normal(0, (2, 6))
    np.testing.assert_array_equal(Threshold(kind="none")(x0), x0)


def test_threshold_comes_after_guidance():
    x, logsnr, clip = normal(0, (2, 8, 8, 3)), jnp.zeros(2), Threshold(kind="static")
    right = thresholded(lambda x_t, _: guide(jnp.tanh(x_t), -jnp.tanh(x_t), 4.0), clip)
    wrong = guide(clip(jnp.tanh(x)), -jnp.tanh(x), 4.0)
    assert float(jnp.max(jnp.abs(right(x, logsnr)))) == 1.0
    assert float(jnp.max(jnp.abs(wrong))) > 2.0


def test_low_precision_images_are_thresholded_in_float32():
    out = jax.eval_shape(dynamic_threshold, jax.ShapeDtypeStruct((2, 8), jnp.bfloat16))
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Interval(low=3.0, high=2.0), "Interval.low"),
        (lambda: Oscillating(share=2.0), "Oscillating.share"),
        (
            lambda: PerStep(factors=(1.0,))(3.0, jnp.zeros(2), jnp.zeros(4)),
            "as many as the steps, 4, got 1",
        ),
    ],
)
def test_impossible_plans_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"percentile": 99.5}, "percentile"),
        ({"percentile": 0.0}, "percentile"),
        ({"cap": 0.5}, "cap"),
        ({"kind": "soft"}, "kind"),
    ],
)
def test_mistakes_are_refused_by_name(fields, match):
    with pytest.raises((ValueError, TypeError), match=match):
        Threshold(**fields)


def test_a_threshold_has_its_percentile():
    x0 = 3 * normal(0, (2, 8, 8, 3))
    np.testing.assert_array_equal(Threshold(percentile=0.6)(x0), dynamic_threshold(x0, 0.6))
