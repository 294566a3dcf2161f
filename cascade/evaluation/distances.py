"""How far two sets of pictures are apart, by features of a frozen network.

The Fréchet distance between Gaussians fitted to both (Heusel et al. 2017; with Inception it is FID)

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)

the kernel distance, an unbiased estimate of the squared maximum mean discrepancy (Binkowski et al.
2018; with Inception it is KID)

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)
    k(x, y) = (x . y / d + 1)^3

and by the balls around pictures that reach to their k-th nearest neighbour among their own:
precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from cascade.errors import UserError
from cascade.storage import paths

MOST_WIDTH = 2**13
"""Statistics of at most so many features are read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """The Gaussian fitted to the features of a set of pictures."""

    mean: Float64[np.ndarray, " d"]
    """Their mean."""
    covariance: Float64[np.ndarray, "d d"]
    """Their covariance, with n - 1 below the line."""
    count: int | None = None
    """The number of pictures, two or more; None where a file does not say."""
    network: str | None = None
    """What network the features are of; None where a file does not say."""

    def save(self, file: paths.Path) -> None:
        """Write them as .npz, with `mu` and `sigma` as pytorch-fid has them. It appears whole."""
        about = {"count": np.int64(self.count or 0), "network": np.str_(self.network or "")}
        with paths.writing(file) as part, open(part, "wb") as opened:
            np.savez(opened, mu=self.mean, sigma=self.covariance, **about)

    @classmethod
    def load(cls, file: paths.Path) -> Statistics:
        """Read what `save` or pytorch-fid wrote. Raises UserError for anything else."""
        how = "give a file of --save-statistics, or of pytorch-fid"
        try:
            paths.check_regular(file)
            with paths.reading(file) as local, zipfile.ZipFile(local) as arrays:
                names = set(arrays.namelist())
                for name in ("mu.npy", "sigma.npy"):
                    if name not in names:
                        raise ValueError(f"it has no array {name.removesuffix('.npy')!r}")
                mean = _array(arrays, "mu.npy", 1)
                covariance = _array(arrays, "sigma.npy", 2)
                count = int(_array(arrays, "count.npy", 0)) if "count.npy" in names else 0
                network = str(_array(arrays, "network.npy", 0)) if "network.npy" in names else ""
        except FileNotFoundError:
            raise UserError(f"statistics {file}: no such file; {how}") from None
        except (
            Exception
        ) as e:  # NumPy and zipfile have many errors for files that are none of theirs
            raise UserError(f"statistics {file}: cannot be read ({e!s:.200}); {how}") from None
        floats = all(a.dtype.kind == "f" for a in (mean, covariance))
        if not floats or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"statistics {file}: mu must be [d] and sigma [d, d] of floats, got "
                f"{list(mean.shape)} and {list(covariance.shape)}; {how}"
            )
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        largest = np.abs([mean, *covariance]).max(initial=0)
        if not largest < _LARGEST:
            raise UserError(
                f"statistics {file}: hold a value that is not a finite number below {_LARGEST:g}; "
                f"{how}"
            )
        odd = np.abs(covariance - covariance.T).max(initial=0) > 1e-3 * largest
        below = np.diag(covariance).min(initial=0) < -1e-6 * largest  # but for rounding
        if odd or below or count < 0 or count == 1:
            raise UserError(
                f"statistics {file}: are of no pictures; sigma must be a covariance, symmetric and "
                f"with no variance below 0, and count two or more; {how}"
            )
        return cls(mean=mean, covariance=covariance, count=count or None, network=network or None)


_LARGEST = 1e100  # sums of squares of such values, and products of two, are finite


def _array(arrays: zipfile.ZipFile, name: str, axes: int) -> np.ndarray:
    """Read an array of so many axes, after its header has said that it is no larger than ours."""
    with arrays.open(name) as opened:
        if (version := np.lib.format.read_magic(opened)) != (1, 0):
            raise ValueError(f"{name} is of version {version} of the format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
    if len(shape) != axes or max(shape, default=0) > MOST_WIDTH or dtype.itemsize > 2**14:
        raise ValueError(
            f"{name} is {dtype} {list(shape)}; it must have {axes} axes of at most {MOST_WIDTH}"
        )
    with arrays.open(name) as opened:
        return np.lib.format.read_array(opened, allow_pickle=False)


def statistics(parts: Iterable[Float[np.ndarray, "_ d"]], network: str | None = None) -> Statistics:
    """Fit the Gaussian to features that come in parts, each looked at once, in float64.

    Sums are taken about the mean of the first part, so that no digits are lost where the mean is
    large beside the spread. Raises ValueError for fewer than two rows.
    """
    count, total, outer, about = 0, 0.0, 0.0, 0.0
    for part in parts:
        if not len(part):
            continue
        rows = np.asarray(part, np.float64)
        if not count:
            about = rows.mean(axis=0)
        rows = rows - about
        count += len(rows)
        total, outer = total + rows.sum(axis=0), outer + rows.T @ rows
    if count < 2:
        raise ValueError(f"there must be two pictures or more, got {count}")
    mean: Any = total / count
    covariance: Any = (outer - count * np.outer(mean, mean)) / (count - 1)
    return Statistics(mean=mean + about, covariance=covariance, count=count, network=network)


def frechet(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance of the two Gaussians, in float64.

    The trace of the square root comes from the eigenvalues of a symmetric matrix, so that it stays
    real where covariances are singular (fewer pictures than features). Raises ValueError for
    statistics of features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must be as many, got {len(a.mean)} and {len(b.mean)}")
    gap = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(max(gap @ gap + spread - 2 * shared, 0.0))


Take = Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, "n d"]]
"""Indices of pictures -> their features."""


def kernel(
    a: Take, b: Take, counts: tuple[int, int], *, subsets: int, size: int, seed: int = 0
) -> dict[str, float]:
    """The kernel distance of random subsets: its mean over them, and its standard deviation.

    counts: of the pictures of `a` and of `b`, each `size` or more. Each subset has `size` pictures
    of either, none of them twice.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = np.asarray(a(rng.choice(counts[0], size, replace=False)), np.float64)
        y = np.asarray(b(rng.choice(counts[1], size, replace=False)), np.float64)
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        own = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(own - 2 * xy.mean())
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
        "subsets": subsets,
        "subset_size": size,
    }


def _cubic(x: Any, y: Any) -> Any:
    return (x @ y.T / x.shape[1] + 1) ** 3


NEAREST = {"precision and recall": 3, "density and coverage": 5}
"""The neighbour whose distance is the radius of a ball."""
_BLOCK = 1024  # rows of a matrix of distances that are in memory together


def neighbourhoods(
    drawn: Float[np.ndarray, "n d"], true: Float[np.ndarray, "m d"]
) -> Mapping[str, float]:
    """Precision, recall, density and coverage of `drawn` pictures beside `true` ones.

    Precision is the share of drawn pictures inside the ball of a true one, recall the share of
    true ones inside that of a drawn one. Density is how many balls of true pictures a drawn one is
    in, of the k that would be expected; coverage the share of true pictures with a drawn one in
    their ball. Each set must have more pictures than NEAREST has numbers. Memory is that of the
    features, and of _BLOCK rows of distances.
    """
    few, many = NEAREST.values()
    of_drawn = _radii(drawn, few)
    of_true, of_true_wide = _radii(true, few), _radii(true, many)
    precise, inside = 0, 0
    nearest = np.full(len(true), np.inf)
    recalled = np.zeros(len(true), bool)
    for rows, far in _distances(drawn, true):
        precise += int((far <= of_true).any(axis=1).sum())
        inside += int((far < of_true_wide).sum())
        nearest = np.minimum(nearest, far.min(axis=0))
        recalled |= (far <= of_drawn[rows, None]).any(axis=0)
    return {
        "precision": precise / len(drawn),
        "recall": float(recalled.mean()),
        "density": inside / (many * len(drawn)),
        "coverage": float((nearest < of_true_wide).mean()),
    }


def _radii(x: Float[np.ndarray, "n d"], nearest: int) -> Float[np.ndarray, " n"]:
    """The squared distance of each picture to its nearest-th neighbour; itself is the 0th."""
    found = [np.partition(far, nearest, axis=1)[:, nearest] for _, far in _distances(x, x)]
    return np.concatenate(found)


def _distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Iterable[Any]:
    """Squared distances in float32, by blocks of rows: (their slice, [rows, m]).

    They are taken about the mean of y, in which distances are the same and rounding is less.
    """
    same, about = x is y, y.mean(axis=0)
    y = (y - about).astype(np.float32)
    squares = (y * y).sum(axis=1)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(x)))
        block = (x[rows] - about).astype(np.float32)
        far = (block * block).sum(axis=1)[:, None] + squares - 2 * block @ y.T
        if same:
            far[np.arange(len(block)), np.arange(rows.start, rows.stop)] = 0
        yield rows, np.maximum(far, 0)
