"""Distances of two sets of features, against closed forms and against slow and plain code."""

import zipfile

import numpy as np
import pytest

from cascade.errors import UserError
from cascade.evaluation import distances
from cascade.evaluation.distances import Statistics, frechet, kernel, neighbourhoods, statistics


def gaussian(n=400, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def test_the_statistics_of_parts_are_those_of_the_whole():
    x = gaussian()
    found = statistics([x[:7], x[7:7], x[7:300], x[300:]], "a network")
    assert (found.count, found.network) == (400, "a network")
    assert np.allclose(found.mean, x.astype(np.float64).mean(axis=0), atol=1e-12)
    assert np.allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-12)
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        statistics([x[:1]])


def test_no_digits_are_lost_where_the_mean_is_large():
    """A million beside one: sums of squares alone would leave four digits of sixteen."""
    x = gaussian().astype(np.float64) + 1e6
    expected = np.cov(gaussian().astype(np.float64), rowvar=False)
    assert np.allclose(statistics([x[:9], x[9:]]).covariance, expected, rtol=1e-8, atol=1e-8)


def test_the_frechet_distance_of_shifted_and_scaled_copies_is_the_closed_form():
    x = gaussian(width=4)
    a = statistics([x])
    assert frechet(a, a) < 1e-10
    assert frechet(a, statistics([x + 3])) == pytest.approx(4 * 9)
    assert frechet(a, statistics([3 * x - 3 * x.mean(0) + x.mean(0)])) == pytest.approx(
        4 * np.trace(a.covariance), rel=1e-5
    )
    with pytest.raises(ValueError, match="as many, got 4 and 6"):
        frechet(a, statistics([gaussian()]))


def test_the_frechet_distance_stands_with_fewer_pictures_than_features():
    few, others = gaussian(5, 40), gaussian(5, 40, seed=1)
    a, b = statistics([few]), statistics([others])
    product = np.linalg.eigvals(a.covariance @ b.covariance).astype(complex)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    assert frechet(a, b) == pytest.approx(expected - 2 * np.sqrt(product).real.sum(), rel=1e-5)


def test_statistics_survive_a_file_and_pytorch_fids_are_read(tmp_path):
    found = statistics([gaussian()], "random")
    found.save(tmp_path / "s.npz")
    again = Statistics.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(again.covariance, found.covariance)
    assert (again.count, again.network) == (400, "random")
    np.savez(tmp_path / "theirs.npz", mu=found.mean, sigma=found.covariance)
    theirs = Statistics.load(tmp_path / "theirs.npz")
    constant = np.full((7, 3), 0.1, np.float32)
    rounded = statistics([constant])
    Statistics(mean=rounded.mean, covariance=rounded.covariance - 1e-40).save(tmp_path / "c.npz")
    assert Statistics.load(tmp_path / "c.npz").covariance.max() < 1e-12
    assert (theirs.count, theirs.network) == (None, None) and frechet(theirs, found) < 1e-9


@pytest.mark.parametrize(
    "arrays,said",
    [
        ({"mu": np.zeros(3)}, "has no array 'sigma"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "must be a covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no variance below 0"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": 1}, "count two or more"),
        ({"mu": np.full(2, 1e200), "sigma": np.eye(2)}, "finite number below 1e"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"got \[3\] and \[2, 2\]"),
        ({"mu": np.zeros(2, int), "sigma": np.zeros((2, 2), int)}, "of floats"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "not a finite number"),
        ({"mu": np.array([print], object), "sigma": np.zeros((1, 1))}, "cannot be read"),
    ],
)
def test_what_is_no_statistics_is_refused_and_no_pickle_is_read(arrays, said, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=said):
        Statistics.load(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(b"PK no")
    with pytest.raises(UserError, match="cannot be read"):
        Statistics.load(tmp_path / "s.npz")
    with pytest.raises(UserError, match="no such file"):
        Statistics.load(tmp_path / "none.npz")


def test_no_array_is_read_whose_header_tells_of_too_much(tmp_path):
    """A few bytes of a zip may be gigabytes of zeros."""
    for name, shape in (("mu", (10**9,)), ("sigma", (2**14, 2**14)), ("count", (10**9,))):
        arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "count": np.int64(9)}
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as file:
            for other, array in arrays.items():
                with file.open(f"{other}.npy", "w") as member:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    if other == name:
                        header["shape"] = shape
                    np.lib.format.write_array_header_1_0(member, header)
                    member.write(array.tobytes())
        with pytest.raises(UserError, match=rf"{name}\.npy is .*{shape[0]}.*at most 8192"):
            Statistics.load(tmp_path / "s.npz")


def taken(x):
    return lambda indices: x[indices]


def slow_kernel(x, y):
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n = len(x)
    own = [sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) for z in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    return sum(own) / (n * (n - 1)) - 2 * cross / n**2


def test_the_kernel_distance_is_the_unbiased_sum_over_pairs():
    """A subset as large as the set is the set, in whatever order."""
    x, y = gaussian(12).astype(np.float64), gaussian(12, seed=1).astype(np.float64) + 0.5
    found = kernel(taken(x), taken(y), (12, 12), subsets=2, size=12)
    assert found["mean"] == pytest.approx(slow_kernel(x, y)) and found["std"] < 1e-12
    assert (found["subsets"], found["subset_size"]) == (2, 12)


def test_the_kernel_distance_of_subsets_has_their_mean_and_their_spread():
    x, y = gaussian(9).astype(np.float64), gaussian(30, seed=1).astype(np.float64) + 0.5
    asked = ([], [])
    takes = [
        lambda i, z=z, to=to: to.append(i) or z[i] for z, to in zip((x, y), asked, strict=True)
    ]
    found = kernel(*takes, (9, 30), subsets=4, size=6)
    values = [slow_kernel(x[i], y[j]) for i, j in zip(*asked, strict=True)]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.sqrt(np.mean(np.square(values - np.mean(values)))))
    assert max(map(max, asked[1])) > 9


def test_the_kernel_distance_of_one_distribution_is_zero_in_the_mean():
    """And its subsets are drawn anew, by the seed, without a picture twice."""
    x, y = gaussian(900), gaussian(900, seed=1)
    found = kernel(taken(x), taken(y), (900, 900), subsets=60, size=60)
    assert abs(found["mean"]) < 3 * found["std"] / 60**0.5 + 0.01 and found["std"] > 0
    assert found == kernel(taken(x), taken(y), (900, 900), subsets=60, size=60)
    assert found != kernel(taken(x), taken(y), (900, 900), subsets=60, size=60, seed=1)
    asked = []
    kernel(lambda i: asked.append(i) or x[i], taken(y), (900, 900), subsets=3, size=50)
    assert all(len(set(i)) == 50 for i in asked) and len({tuple(i) for i in asked}) == 3


def slow_neighbourhoods(drawn, true):
    def far(a, b):
        return np.linalg.norm(a - b)

    def radius(z, i, k):
        return sorted(far(z[i], other) for other in z)[k]

    few = [radius(true, i, 3) for i in range(len(true))]
    many = [radius(true, i, 5) for i in range(len(true))]
    own = [radius(drawn, i, 3) for i in range(len(drawn))]
    inside = np.array([[far(d, t) for t in true] for d in drawn])
    return {
        "precision": np.mean([any(row <= few) for row in inside]),
        "recall": np.mean([any(column <= own) for column in inside.T]),
        "density": np.mean([sum(row < many) / 5 for row in inside]),
        "coverage": np.mean([min(inside[:, j]) < many[j] for j in range(len(true))]),
    }


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbourhoods_are_those_of_the_definitions(block, monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", block)
    drawn, true = 0.8 * gaussian(40, 3) + 0.3, gaussian(50, 3, seed=1)
    found, expected = neighbourhoods(drawn, true), slow_neighbourhoods(drawn, true)
    assert found == pytest.approx(expected) and 0 < found["recall"] < 1


def test_what_is_lost_shows_where_it_should():
    """A mode that is dropped costs recall and coverage alone, noise costs precision and density."""
    rng = np.random.default_rng(0)
    true = np.concatenate([gaussian(150, 4), gaussian(150, 4, seed=1) + 20])
    again = np.concatenate([gaussian(150, 4, seed=2), gaussian(150, 4, seed=3) + 20])
    dropped, noisy = again[:150], again + 6 * rng.standard_normal(again.shape).astype(np.float32)
    alike, half, wide = (neighbourhoods(some, true) for some in (again, dropped, noisy))
    assert min(alike.values()) > 0.85
    assert half["precision"] > 0.85 and half["recall"] < 0.6 and half["coverage"] < 0.6
    assert wide["precision"] < 0.5 and wide["density"] < 0.5
    assert neighbourhoods(true, true) == pytest.approx(
        {"precision": 1, "recall": 1, "coverage": 1, "density": 1}, abs=0.02
    )
