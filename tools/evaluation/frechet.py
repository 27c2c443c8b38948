"""Frechet distance and Inception Score from features that come in batches: float64, constant memory, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modiff_trt.core.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d], float64, of `count` feature vectors (0: not known, as in a file of another tool)."""

    mean: Array
    covariance: Array
    count: int


class Moments:
    """Accumulates the mean and covariance of feature vectors batch by batch (Chan et al., 1979), so that any number of images
    needs the memory of one d x d matrix, and no digits are lost to a large mean."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Array = np.zeros(0)
        self._scatter: Array = np.zeros((0, 0))

    def add(self, features: Array) -> None:
        """Takes features [n, d]. Raises InputError if any is not finite."""
        batch = np.asarray(features, np.float64)
        if not np.isfinite(batch).all():
            raise InputError("a feature is not finite; the images or the feature network's weights are damaged")
        n = len(batch)
        if self.count == 0:
            self._mean, self._scatter = np.zeros(batch.shape[1]), np.zeros((batch.shape[1], batch.shape[1]))
        mean = batch.mean(0)
        centered, shift = batch - mean, mean - self._mean
        total = self.count + n
        self._scatter += centered.T @ centered + np.outer(shift, shift) * (self.count * n / total)
        self._mean += shift * (n / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises InputError with fewer than two vectors."""
        if self.count < 2:
            raise InputError(f"a Frechet distance needs at least 2 images, found {self.count}")
        return Gaussian(self._mean, self._scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (FID: arXiv 1706.08500, eq. 6).

    The root's trace is that of (R S_b R)^(1/2) with R = S_a^(1/2), which is symmetric: no complex numbers, no failure on
    singular covariances. Raises InputError if the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; use the same features")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    return float(distance - 2 * np.sqrt(np.clip(cross, 0, None)).sum())


# torch-fidelity's: with it, the chunks of both are the same images.
PERMUTATION_SEED = 2020


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over tenths of the images (arXiv 1606.03498): mean and deviation.

    The tenths are drawn by a fixed permutation, as torch-fidelity draws them: consecutive ones would make the score follow the
    order of the files, and a set that is sorted by class would score 1.
    """

    def __init__(self, total: int, splits: int = 10, consecutive: bool = False, ranks: Sequence[int] | None = None) -> None:
        """`total` images will come; `ranks` says where each stands among them if not where it comes. `consecutive` takes the
        tenths in that order. Raises InputError if there are fewer images than splits."""
        if total < splits:
            raise InputError(f"the Inception Score needs at least {splits} images, found {total}")
        edges = np.array([total * i // splits for i in range(splits + 1)])
        places = np.arange(total)
        if not consecutive:
            places[np.random.RandomState(PERMUTATION_SEED).permutation(total)] = np.arange(total)
        places = places[np.asarray(ranks)] if ranks is not None else places
        self._split = np.searchsorted(edges, places, "right") - 1
        self._sizes = np.diff(edges)
        self._seen = 0
        self._entropy = np.zeros(splits)
        self._sums: list[Array | float] = [0.0] * splits

    def add(self, logits: Array) -> None:
        """Takes logits [n, classes] of the next n images."""
        x = np.asarray(logits, np.float64)
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        split = self._split[self._seen : self._seen + len(x)]
        for k in np.unique(split):
            rows = split == k
            self._entropy[k] += (p[rows] * log_p[rows]).sum()
            self._sums[k] = self._sums[k] + p[rows].sum(0)
        self._seen += len(x)

    def result(self) -> tuple[float, float]:
        """(mean, standard deviation) over the splits. Raises InputError if not all images came."""
        if self._seen != len(self._split):
            raise InputError(f"{self._seen} of {len(self._split)} images came; the Inception Score is not defined")
        scores = []
        for n, entropy, sums in zip(self._sizes, self._entropy, self._sums, strict=True):
            marginal = np.asarray(sums) / n
            scores.append(np.exp(entropy / n - (marginal * np.log(np.where(marginal > 0, marginal, 1))).sum()))
        return float(np.mean(scores)), float(np.std(scores))
