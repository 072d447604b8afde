"""Distances between two sets of samples, through any features: arrays `[n, d]`, on the host in float64.

With the empirical means m and covariances C of two sets of features:

    Frechet = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))             (1)

(Heusel et al. 2017, called FID only where the features are Inception's, and sFID where they are those of
`Features.spatial`, Nash et al. 2021);

    KID = MMD^2 with the kernel (x . y / d + 1)^3, unbiased                 (2)

(Binkowski et al. 2018), as published the mean over random subsets; precision, the share of generated
points inside the real manifold, and recall, the share of real points inside the generated one, a manifold
being the union of balls to the k-th nearest neighbours (Kynkaanniemi et al. 2019); the sliced
Wasserstein-2 distance (Bonneel et al. 2015); and the Inception score exp E KL(p(y|x) || p(y)) of any
classifier (Salimans et al. 2016), as published the mean over ten parts.

Images come a batch at a time and are let go of.  The mean m and covariance C of n features take in those of n' more,
m' and C', by (Chan et al. 1979), with d = m' - m and N = n + n':

    m + (n'/N) d    and    [(n - 1) C + (n' - 1) C' + (n n'/N) d d^T] / (N - 1)                                     (3)
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = [
    "Statistics",
    "classifier_score",
    "classifier_score_of_splits",
    "frechet_distance",
    "frechet_distance_of_gaussians",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "precision_recall",
    "sliced_wasserstein",
]


class Statistics(NamedTuple):
    """The mean `[d]` and covariance `[d, d]` of the features of `num_images` images, in float64."""

    num_images: int
    mean: np.ndarray
    cov: np.ndarray

    def update(self, x: np.ndarray) -> "Statistics":
        """The statistics with those of more features `[n, d]` (Eq. 3)."""
        if len(x) == 0:
            return self
        x = x.astype(np.float64)
        n, total, mean = len(x), self.num_images + len(x), x.mean(axis=0)
        offset, x = mean - self.mean, x - mean
        scatter = max(self.num_images - 1, 0) * self.cov + x.T @ x
        scatter += (self.num_images * n / total) * np.outer(offset, offset)
        return Statistics(total, self.mean + (n / total) * offset, scatter / max(total - 1, 1))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frechet distance of Gaussians fitted to `a [n, d]` and `b [m, d]` (Eq. 1)."""
    a, b = _features(a, b)

    def root(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r"))

    return _frechet(a.mean(0), b.mean(0), root(a), root(b))


def frechet_distance_of_gaussians(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """The squared Frechet distance of two Gaussians with means `[d]` and covariances `[d, d]` (Eq. 1)."""
    if not np.shape(cov_a) == np.shape(cov_b) == 2 * np.shape(mean_a) == 2 * np.shape(mean_b):
        raise ValueError(f"two means [d] and covariances [d, d] differ in d: {np.shape(mean_a)}, {np.shape(mean_b)}")
    for part in (mean_a, cov_a, mean_b, cov_b):
        if not np.isfinite(part).all():
            raise ValueError("a mean or covariance of the features is not finite")

    def root(cov: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(cov)
        # Of those that are 0 rounding leaves some 1e-16, whose root would count.
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return np.sqrt(values[kept])[:, None] * vectors[:, kept].T

    return _frechet(np.asarray(mean_a), np.asarray(mean_b), root(cov_a), root(cov_b))


def _frechet(mean_a: np.ndarray, mean_b: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Eq. 1 for C_1 = a^T a and C_2 = b^T b: tr (C_1 C_2)^(1/2) is the sum of the singular values of a b^T."""
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(np.sum((mean_a - mean_b) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross, 0.0))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of `a [n, d]` and `b [m, d]` (Eq. 2); it may be negative."""
    a, b = _features(a, b)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def kernel_distance_of_subsets(
    a: np.ndarray, b: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The mean of `kernel_distance` over random subsets of both, as KID is published, and its standard deviation."""
    rng, size = np.random.default_rng(seed), min(subset_size, len(a), len(b))
    pairs = ([x[rng.choice(len(x), size, replace=False)] for x in (a, b)] for _ in range(num_subsets))
    values = [kernel_distance(*pair) for pair in pairs]
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, from `[n, d]` features and balls to the k-th neighbour.

    The distances are taken a block of points at a time.
    """
    real, generated = _features(real, generated)

    def radii(centres: np.ndarray) -> np.ndarray:
        # Column 0 of the sorted distances is the point itself.
        nearest = min(k, len(centres) - 1)
        return np.concatenate(
            [np.partition(d, nearest, axis=1)[:, nearest] for d in _square_distances(centres, centres)]
        )

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        within = radii(centres)[None]
        return float(np.concatenate([(d <= within).any(axis=1) for d in _square_distances(points, centres)]).mean())

    return covered(generated, real), covered(real, generated)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, *, num_projections: int = 256, seed: int = 0) -> float:
    """The sliced Wasserstein-2 distance of `a [n, d]` and `b [m, d]`, over random directions."""
    a, b = _features(a, b)
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    levels = (np.arange(max(len(a), len(b))) + 0.5) / max(len(a), len(b))
    quantiles = [np.quantile(x @ directions, levels, axis=0, method="inverted_cdf") for x in (a, b)]
    return float(np.sqrt(np.mean((quantiles[0] - quantiles[1]) ** 2)))


def classifier_score(probabilities: np.ndarray) -> float:
    """exp E KL(p(y|x) || p(y)) from class probabilities `[n, classes]`: between 1 and the number of classes."""
    p = np.asarray(probabilities, np.float64)
    tiny = np.finfo(np.float64).tiny
    return float(np.exp(np.mean(np.sum(p * (np.log(p + tiny) - np.log(p.mean(0) + tiny)), axis=1))))


def classifier_score_of_splits(probabilities: np.ndarray, *, num_splits: int = 10) -> tuple[float, float]:
    """The mean of `classifier_score` over consecutive parts, as the Inception score is published, and its deviation.

    Of fewer rows than parts it is the score of all, and the deviation 0.

    Raises:
      ValueError: if there are no rows.
    """
    if len(probabilities) == 0:
        raise ValueError("a classifier's score needs at least one row of probabilities")
    num_splits = num_splits if len(probabilities) >= num_splits else 1
    scores = [classifier_score(part) for part in np.array_split(probabilities, num_splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [n, d] and [m, d] with n, m >= 2, got {a.shape} and {b.shape}")
    for name, x in (("first", a), ("second", b)):
        if not (finite := np.isfinite(x).all(axis=1)).all():
            raise ValueError(f"row {finite.argmin()} of the {name} set of features is not finite")
    return a, b


def _square_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of the matrix `[n, m]`, 64 MB at a time."""
    squares = (b**2).sum(1)[None]
    for part in np.split(a, range(0, len(a), max(2**23 // len(b), 1))[1:]):
        yield np.maximum((part**2).sum(1)[:, None] + squares - 2 * part @ b.T, 0)
