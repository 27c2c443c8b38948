"""Frechet distance and Inception Score against numpy and pytorch-fid, and that neither depends on how images are batched."""

import numpy as np
import pytest

from modiff_trt.core.errors import InputError
from modiff_trt.tools.evaluation.frechet import Gaussian, InceptionScore, Moments, frechet_distance


def moments(features, size):
    found = Moments()
    for begin in range(0, len(features), size):
        found.add(features[begin : begin + size])
    return found.gaussian()


def features(n, d, seed, mean=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + mean).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_streamed_moments_are_those_of_numpy(size):
    x = features(301, 13, 0, mean=1e4)  # a large mean, which a sum of squares would drown in
    found = moments(x, size)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(500, 17), (20, 64)])  # the second has singular covariances
def test_distance_is_that_of_pytorch_fid(n, d):
    fid = pytest.importorskip("pytorch_fid.fid_score")
    a, b = moments(features(n, d, 1), 50), moments(features(n, d, 2, mean=0.5), 50)
    expected = fid.calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)


def test_distance_of_two_known_gaussians():
    a = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 10)
    b = Gaussian(np.ones(3), np.diag([4.0, 4.0, 1.0]), 10)
    assert frechet_distance(a, b) == pytest.approx(3 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_is_that_of_torch_fidelity_however_batched(shuffle):
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    import torch

    logits = 3 * np.random.default_rng(0).standard_normal((103, 19)).astype(np.float32)
    options = {} if shuffle else {"shuffle": False}  # shuffled is its default
    expected = isc.isc_features_to_metric(torch.from_numpy(logits), splits=10, **options)
    for size in (1, 9, 200):
        score = InceptionScore(len(logits), consecutive=not shuffle)
        for begin in range(0, len(logits), size):
            score.add(logits[begin : begin + size])
        mean, deviation = score.result()
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_does_not_follow_the_order_of_the_files():
    """Sorted by class, consecutive tenths hold one class each and score 1: what a set is called must not decide its score."""
    classes = np.repeat(np.eye(10) * 9, 30, axis=0)

    def score(logits, **options):
        found = InceptionScore(len(logits), **options)
        found.add(logits)
        return found.result()[0]

    assert score(classes, consecutive=True) == pytest.approx(1.0)
    shuffled = classes[np.random.default_rng(0).permutation(len(classes))]
    assert score(classes) == pytest.approx(score(shuffled), rel=0.1) and score(classes) > 5


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="at least 10"):
        InceptionScore(9)
    with pytest.raises(InputError, match="at least 2"):
        Moments().gaussian()
    with pytest.raises(InputError, match="not finite"):
        Moments().add(np.array([[1.0, np.nan]]))
    with pytest.raises(InputError, match="cannot be compared"):
        frechet_distance(Gaussian(np.zeros(2), np.eye(2), 2), Gaussian(np.zeros(3), np.eye(3), 2))
    unfinished = InceptionScore(20)
    unfinished.add(np.zeros((3, 4)))
    with pytest.raises(InputError, match="3 of 20"):
        unfinished.result()
