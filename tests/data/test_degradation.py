"""Degraded small pictures: operations against closed forms, and what the chain promises."""

import itertools
import pickle

import jax.image
import numpy as np
import pytest

from cascade import config, images
from cascade.data import degradation
from cascade.data.degradation import BSR, Blur, Degradation

KINDS = [Blur(share=1.0), BSR(), BSR(light=False)]


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(side=64, seed=0):
    """Smooth shapes and an edge, away from black and white."""
    y, x = np.mgrid[:side, :side] / side
    waves = [128 + 60 * np.sin(7 * x + 3 * y + seed), 90 + 80 * (x > y), 60 + 120 * x * y]
    return np.stack(waves, axis=-1).astype(np.uint8)


def means(image, factor):
    return images.downsample(image.astype(np.float32), factor)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


# The operations.


def test_an_impulse_becomes_the_kernel():
    kernel = degradation.gaussian_kernel(7, (2.0, 0.5), angle=0.6, shift=0.7)
    impulse = np.zeros((15, 15, 3), np.float32)
    impulse[7, 7] = 1, 2, 3
    blurred = degradation.correlate(impulse, kernel)
    for channel in range(3):
        seen = blurred[4:11, 4:11, channel]
        np.testing.assert_allclose(seen, (channel + 1) * kernel[::-1, ::-1], atol=1e-6)
    np.testing.assert_allclose(blurred.sum((0, 1)), [1, 2, 3], rtol=1e-5)


@pytest.mark.parametrize("h,w", [(9, 6), (3, 1)])
def test_correlation_is_the_sum_over_the_mirrored_neighbourhood(h, w):
    image, kernel = rng().random((h, w, 3), np.float32), rng(1).random((5, 5), np.float32)
    fold = [np.abs((np.arange(-2, n + 2) + n - 1) % max(1, 2 * n - 2) - (n - 1)) for n in (h, w)]
    mirrored = image[np.ix_(*fold)]
    wanted = np.zeros_like(image)
    for i, j in itertools.product(range(5), repeat=2):
        wanted += kernel[i, j] * mirrored[i : i + h, j : j + w]
    np.testing.assert_allclose(degradation.correlate(image, kernel), wanted, rtol=1e-4)


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_a_kernel_has_the_mean_and_covariance_asked_for(angle):
    kernel = degradation.gaussian_kernel(61, (9.0, 2.0), angle=angle, shift=1.5).astype(float)
    y, x = np.mgrid[-30:31, -30:31]
    points = np.stack([x.ravel(), y.ravel()])
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wanted = axes @ np.diag([9.0, 2.0]) @ axes.T
    np.testing.assert_allclose(np.cov(points, aweights=kernel.ravel(), ddof=0), wanted, atol=1e-3)
    np.testing.assert_allclose(points @ kernel.ravel(), [1.5, 1.5], atol=1e-4)


@pytest.mark.parametrize("size", [(4, 9), (12, 23), (30, 8)])
@pytest.mark.parametrize(
    "method,name,antialias",
    [("bilinear", "linear", False), ("bicubic", "cubic", False), ("antialiased", "cubic", True)],
)
def test_interpolation_agrees_with_jax(size, method, name, antialias):
    image = rng().random((12, 16, 3), np.float32)
    wanted = jax.image.resize(image, (*size, 3), name, antialias=antialias)
    np.testing.assert_allclose(degradation.resize(image, size, method), wanted, atol=2e-6)


def test_area_is_the_mean_over_each_new_pixel():
    row = np.array([1, 2, 4], np.float32)[None, :, None] * np.ones((6, 1, 3), np.float32)
    shrunk = degradation.resize(row, (2, 2), "area")
    np.testing.assert_allclose(shrunk[..., 0], [[4 / 3, 10 / 3]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(
        degradation.resize(row, (6, 6), "area")[0, :, 0].round(), [1, 1, 2, 2, 4, 4]
    )
    image = rng().random((12, 8, 3), np.float32)
    np.testing.assert_allclose(
        degradation.resize(image, (3, 2), "area"), means(image, 4), atol=1e-6
    )


def test_noise_is_of_three_kinds_with_the_levels_asked_for():
    grey, independent, correlated, sigmas = 0, 0, 0, []
    for seed in range(400):
        noise = degradation.gaussian_noise((24, 24), rng(seed), (2, 25)).reshape(-1, 3)
        assert np.abs(noise.mean(0)).max() < 6 * 25 / 24
        covariance, kind = np.cov(noise.T), rng(seed).random()
        if np.array_equal(noise[:, 0], noise[:, 1]) and np.array_equal(noise[:, 0], noise[:, 2]):
            grey += 1
            sigmas.append(noise[:, 0].std())
        elif kind < 0.8:
            independent += 1
            sigmas.append(noise.std())
            assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.2
        else:
            correlated += 1
            assert (np.diag(covariance) < 1.3 * 25**2).all() and covariance.min() > -100
    assert abs(grey - 160) < 40 and abs(independent - 160) < 40 and abs(correlated - 80) < 32
    assert 1.8 < min(sigmas) < 3 and 24 < max(sigmas) < 27.5
    np.testing.assert_allclose(np.mean(sigmas), 13.5, atol=1.5)


def test_correlated_noise_has_correlated_channels():
    seeds = [seed for seed in range(60) if rng(seed).random() > 0.8]
    noise = [degradation.gaussian_noise((64, 64), rng(seed), (2, 25)) for seed in seeds]
    shared = [np.corrcoef(n.reshape(-1, 3).T)[np.triu_indices(3, 1)].mean() for n in noise]
    assert len(seeds) > 5 and 0.15 < np.mean(shared) < 0.9


def test_jpeg_is_the_better_the_higher_its_quality():
    image = picture().astype(np.float32)
    quality = [psnr(image, degradation.jpeg(image, q)) for q in (30, 50, 70, 80, 95)]
    assert quality == sorted(quality) and quality[0] > 25 and quality[-1] > quality[0] + 3


# The whole.


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize(
    "h,w,factor", [(16, 16, 1), (16, 24, 2), (24, 12, 3), (64, 64, 4), (8, 8, 8)]
)
def test_the_output_has_the_low_resolution(kind, h, w, factor):
    image = rng().integers(0, 256, (h, w, 3), np.uint8)
    for seed in range(10):
        low = kind(image, rng(seed), factor)
        assert low.shape == (h // factor, w // factor, 3) and low.dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_generator_decides_and_the_picture_is_degraded(kind):
    image = picture()
    kept = image.copy()
    first, again, other = (kind(image, rng(seed), 4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.02
    changed = [(kind(image, rng(i), 4) != means(image, 4).round()).mean() for i in range(20)]
    assert min(changed) > 0.02


def test_light_is_milder_than_full():
    image = picture()
    light, full = (
        np.mean([psnr(means(image, 4), BSR(light=light)(image, rng(i), 4)) for i in range(40)])
        for light in (True, False)
    )
    assert full + 3 < light < 45


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("factor", [2, 4])
def test_the_picture_stays_where_it_was(kind, factor):
    # On a ramp, a shift of half a high-resolution pixel changes levels by 2.
    ramp = np.broadcast_to(np.arange(8, 248, 4)[None, :, None], (60, 60, 3)).astype(np.uint8)
    margin = 20 // factor
    inside = np.s_[margin:-margin, margin:-margin]
    shift = [
        np.mean(kind(turned, rng(i), factor)[inside] - means(turned, factor)[inside])
        for i in range(60)
        for turned in (ramp, ramp.transpose(1, 0, 2))
    ]
    assert abs(np.mean(shift)) < 0.5


@pytest.mark.parametrize("light", [True, False])
def test_bsr_draws_from_the_published_ranges_in_random_order(light, monkeypatch):
    calls, kernels, noises, qualities, orders, shrinking = [], [], [], [], [], []
    original = {
        name: getattr(degradation, name)
        for name in ("correlate", "resize", "gaussian_noise", "jpeg", "gaussian_kernel")
    }

    def kernel(size, variances, **options):
        kernels.append((size, *variances, options.get("angle", 0.0), "shift" in options))
        return original["gaussian_kernel"](size, variances, **options)

    def spy(name, note):
        def call(*args):
            calls.append(name)
            note(*args)
            return original[name](*args)

        monkeypatch.setattr(degradation, name, call)

    monkeypatch.setattr(degradation, "gaussian_kernel", kernel)
    spy("correlate", lambda *_: None)
    spy("resize", lambda image, size, _: shrinking.append((image.shape[0], size[0])))
    spy("gaussian_noise", lambda size, generator, levels: noises.append(levels))
    spy("jpeg", lambda image, quality: qualities.append(quality))
    image = picture(32)
    for seed in range(200):
        calls.clear()
        shrinking.clear()
        BSR(light=light)(image, rng(seed), 2)
        orders.append(tuple(calls))
        *before, (_, last) = shrinking
        assert last == 16 and all(old == 32 and 8 <= new <= 32 for old, new in before)
        assert calls[-1] == "jpeg" and calls.count("gaussian_noise") == 1
    assert len(set(orders)) > 20
    doubled = np.mean([order.count("jpeg") == 2 for order in orders])
    strided = np.mean([order.count("resize") == 1 for order in orders])
    assert 0.82 < doubled < 0.97 and abs(strided - (0.2 if light else 0.25)) < 0.09

    blurs = [k for k in kernels if not k[-1]]
    assert len(blurs) == 200 * (1 if light else 2)
    turned = [k for k in blurs if k[1] != k[2]]
    round_ = [k for k in blurs if k[1] == k[2]]
    assert abs(len(turned) / len(blurs) - 0.5) < 0.12
    part = 0.25 if light else 1.0
    assert {k[0] for k in turned} == set(range(5 if light else 7, 16 if light else 26, 2))
    assert {k[0] for k in round_} == ({5, 7} if light else set(range(7, 26, 2)))
    limits = [(turned, 1, 6 * part), (turned, 2, 6 * part), (turned, 3, np.pi)]
    limits += [(round_, 1, (2.4 * part) ** 2)]
    for drawn, field, limit in limits:
        values = [k[field] for k in drawn]
        assert 0 < min(values) < 0.1 * limit and 0.9 * limit < max(values) < limit
    assert {k[0] for k in kernels if k[-1]} == {25}
    assert set(noises) == {(1, 2) if light else (2, 25)}
    low = 80 if light else 30
    assert low <= min(qualities) < low + 4 and 92 < max(qualities) <= 95


def test_a_factor_of_four_is_sometimes_taken_in_two_halves(monkeypatch):
    resize, halved = degradation.resize, []

    def spy(image, size, method):
        halved.append(method == "antialiased")
        assert method != "antialiased" or size == (16, 16)
        return resize(image, size, method)

    monkeypatch.setattr(degradation, "resize", spy)
    for seed in range(200):
        BSR()(picture(32), rng(seed), 4)
    assert abs(sum(halved) / 200 - 0.125) < 0.07


def test_blur_blurs_the_block_means_by_its_sigma_on_its_share_of_the_pictures():
    point = np.zeros((76, 76, 3), np.uint8)
    point[36:40, 36:40] = 255
    kind = Blur(sigma=(0.8, 1.2), share=0.3)
    y, widths = np.arange(19) - 9.0, []
    for seed in range(200):
        low = kind(point, rng(seed), 4)[..., 0].astype(float)
        widths.append(np.sqrt((low.sum(1) @ y**2) / low.sum()))
    blurred = [width for width in widths if width > 0]
    assert abs(len(blurred) / 200 - 0.3) < 0.1
    assert 0.75 < min(blurred) < 0.9 and 1.1 < max(blurred) < 1.25


def test_degradations_pickle_and_are_configs():
    for kind in (Blur(sigma=(1.0, 2.0)), BSR(light=False)):
        assert pickle.loads(pickle.dumps(kind)) == kind
        assert config.from_json(Degradation, config.to_json(kind)) == kind


@pytest.mark.parametrize(
    "fields", [{"sigma": (0.0, 1.0)}, {"sigma": (2.0, 1.0)}, {"share": 0.0}, {"share": 1.5}]
)
def test_a_blur_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValueError, match=f"Blur.{next(iter(fields))}"):
        Blur(**fields)


def test_sides_that_are_no_multiple_of_the_factor_are_refused():
    with pytest.raises(ValueError, match="factor=4"):
        BSR()(picture(30), rng(), 4)
