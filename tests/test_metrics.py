"""Metrics against closed forms and scipy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special

from score_jax import evaluate, metrics
from score_jax.errors import UserError

RNG = np.random.default_rng(0)


def test_frechet_distance_equals_its_definition():
    a, b = RNG.standard_normal((300, 6)) @ RNG.standard_normal((6, 6)), RNG.standard_normal((200, 6)) + 1
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_examples_than_features():
    """Of a set and itself 0, and of a and 2 a, where (C_a C_b)^(1/2) = 2 C_a, |mean a|^2 + tr C_a."""
    a = np.random.default_rng(1).standard_normal((20, 2048))
    mean, cov = a.mean(0), np.cov(a[:, :500].T)
    assert 0 <= metrics.frechet_distance(a, a) < 1e-9
    assert metrics.frechet_distance(a, 2 * a) == pytest.approx(mean @ mean + a.var(0, ddof=1).sum(), rel=1e-10)
    assert 0 <= metrics.frechet_distance_of_gaussians(mean[:500], cov, mean[:500], cov) < 1e-6


def test_features_that_are_not_finite_are_named():
    a, b = np.random.default_rng(1).standard_normal((2, 8, 3))
    b[3, 1] = np.nan
    for metric in (metrics.frechet_distance, metrics.kernel_distance, metrics.precision_recall):
        with pytest.raises(ValueError, match="row 3 of the second set of features is not finite"):
            metric(a, b)
    with pytest.raises(ValueError, match="a mean or covariance of the features is not finite"):
        metrics.frechet_distance_of_gaussians(a[0], np.eye(3), b[3], np.eye(3))


def test_few_rows():
    p = scipy.special.softmax(np.random.default_rng(1).standard_normal((8, 4)), axis=1)
    assert metrics.classifier_score_of_splits(p) == (metrics.classifier_score(p), 0)
    with pytest.raises(ValueError, match="at least one row"):
        metrics.classifier_score_of_splits(p[:0])
    with pytest.raises(UserError, match=r"at least 2 samples and 4 real examples, .* got 1 and 8"):
        evaluate.compare(p[:1], p)


def test_frechet_distance_of_gaussians():
    """N(0, 1) against N(2, 9): 4 + (3 - 1)^2 = 8; 200,000 draws have a standard error below 0.03."""
    a, b = RNG.standard_normal((200_000, 1)), 2 + 3 * RNG.standard_normal((200_000, 1))
    assert metrics.frechet_distance(a, b) == pytest.approx(8, abs=0.12)


def test_kernel_distance_is_unbiased_and_equals_its_definition():
    """Over 200 pairs from one law the mean is zero within 4 standard errors."""
    values = [metrics.kernel_distance(RNG.standard_normal((20, 3)), RNG.standard_normal((20, 3))) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    a, b = RNG.standard_normal((4, 2)), RNG.standard_normal((3, 2))

    def k(x, y):
        return (x @ y / 2 + 1) ** 3

    aa = np.mean([k(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    bb = np.mean([k(b[i], b[j]) for i in range(3) for j in range(3) if i != j])
    ab = np.mean([k(x, y) for x in a for y in b])
    assert metrics.kernel_distance(a, b) == pytest.approx(aa + bb - 2 * ab)


def test_precision_and_recall_see_fidelity_and_coverage():
    real = np.concatenate([RNG.standard_normal((200, 2)), RNG.standard_normal((200, 2)) + 20])
    half = RNG.standard_normal((400, 2))  # One of the two modes: precise, but half is missing.
    precision, recall = metrics.precision_recall(real, half)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    assert metrics.precision_recall(real, half + 100) == (0, 0)


def test_precision_and_recall_take_blocks_of_points():
    """More points than a block holds: the definition, by all distances at once."""
    real, generated = RNG.standard_normal((3000, 3)), 0.8 * RNG.standard_normal((3100, 3)) + 0.5

    def covered(points, centres):
        radii = np.sort(scipy.spatial.distance.cdist(centres, centres), axis=1)[:, 3]
        return np.mean((scipy.spatial.distance.cdist(points, centres) <= radii[None]).any(axis=1))

    found = metrics.precision_recall(real, generated)
    assert found == pytest.approx((covered(generated, real), covered(real, generated)), abs=1e-3)


def test_kernel_distance_of_subsets():
    """100 subsets of 50 of 2,000: their mean is that of all within 4 standard errors; all of 50 give that of the 50."""
    a, b = RNG.standard_normal((2000, 3)), RNG.standard_normal((2000, 3)) + 0.5
    mean, deviation = metrics.kernel_distance_of_subsets(a, b, subset_size=50)
    assert mean == pytest.approx(metrics.kernel_distance(a, b), abs=4 * deviation / 10)
    assert deviation > 0
    whole = metrics.kernel_distance_of_subsets(a[:50], b[:50], num_subsets=3)
    assert whole == pytest.approx((metrics.kernel_distance(a[:50], b[:50]), 0))


def test_sliced_wasserstein_of_a_shift():
    """A shift by v moves each projection by v . u, with mean square |v|^2 / d: within 3 %, 4,000 projections."""
    a = RNG.standard_normal((50, 3))
    shifted = metrics.sliced_wasserstein(a, a + np.array([3.0, 0, 0]), num_projections=4000)
    assert shifted == pytest.approx(np.sqrt(3.0), rel=0.03)
    assert metrics.sliced_wasserstein(a, a[::-1]) == 0


def test_classifier_score_is_the_number_of_classes_it_is_sure_of():
    assert metrics.classifier_score(np.eye(10)) == pytest.approx(10)
    assert metrics.classifier_score(np.full((5, 10), 0.1)) == pytest.approx(1)


def test_classifier_score_of_splits():
    """Two parts of three images: one sure of three classes, the other of one."""
    p = np.eye(3)[[0, 1, 2, 1, 1, 1]]
    assert metrics.classifier_score_of_splits(p, num_splits=2) == pytest.approx((2, 1))


def test_compare_puts_the_floor_beside():
    real = RNG.standard_normal((400, 4))
    table = evaluate.compare(RNG.standard_normal((150, 4)) + 1, real)
    assert table["num_samples"] == {"generated": 150, "real": 150}
    assert table["frechet_distance_pixels"]["generated"] > 3
    assert table["frechet_distance_pixels"]["real"] < 0.3
    assert set(table["precision"]) == {"generated", "real"}


def test_bad_input():
    with pytest.raises(ValueError, match="n, m >= 2"):
        metrics.frechet_distance(np.ones((5, 3)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="differ in d"):
        metrics.frechet_distance_of_gaussians(np.ones(3), np.eye(3), np.ones(2), np.eye(2))


@pytest.mark.torch
def test_torch_fidelity():
    """Its functions of features, on random ones."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    a, b = RNG.standard_normal((300, 8)) @ RNG.standard_normal((8, 8)), RNG.standard_normal((400, 8)) + 1
    ours, theirs = ({"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in (a, b))
    expected = metric_fid.fid_statistics_to_metric(ours, theirs, False)[metric_fid.KEY_METRIC_FID]
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    whole = {"kid_subsets": 2, "kid_subset_size": 300, "verbose": False}
    expected = metric_kid.kid_features_to_metric(torch.tensor(a), torch.tensor(b[:300]), **whole)
    found = metrics.kernel_distance_of_subsets(a, b[:300], num_subsets=2, subset_size=300)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-6, abs=1e-9)
    expected = metric_prc.prc_features_to_metric(torch.tensor(b), torch.tensor(a), verbose=False)
    assert metrics.precision_recall(a, b) == pytest.approx(tuple(expected.values())[:2])
    p = scipy.special.softmax(a, axis=1)
    expected = metric_isc.isc_features_to_metric(torch.tensor(a), splits=10, shuffle=False)
    assert metrics.classifier_score_of_splits(p) == pytest.approx(tuple(expected.values()), rel=1e-6)
