"""Costs of single layers from times of whole passes, which scatter by more than most layers cost.

On an H200 single layers of 4x4 and 8x8 pixels came out 0.7 to 1.5 % of a pass slower in a mode that does less. Their
network was made once more for it, and its memory lies elsewhere. A layer's state costs 0.02 to 2 %. So a time counts as
what it is, a noisy observation, beside an expectation by bytes and operations, and beside the times of passes with many
layers changed, whose differences are as large as all of theirs (docs/lab/modes.md). With Gaussian errors that is a linear
problem (Bayesian linear regression; Bishop, Pattern Recognition and Machine Learning, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# How far the cost of state may be from its expectation: a share of that, or at least a share of the pass; and how far any other
# cost may be from none.
SHARE, LEAST, UNKNOWN = 1.0, 0.002, 0.05
# The scatter of a pass's time that is assumed at least, as a share of the pass; and how far the costs of many layers may be
# from adding up: layers in INT8 share launches. State does not.
QUIET, SHARED = 0.002, 0.02


@dataclass(frozen=True)
class Kind:
    """`count` layers that are alike, in another mode, and what the pass with all of them so took more. `modelled` is for layers
    that lose their state: what bytes say that one of them costs more then, in microseconds on any scale; None for others."""

    count: int
    modelled: float | None
    difference: float


@dataclass(frozen=True)
class Together:
    """Which kinds were changed at once, and what that pass took more."""

    changed: Sequence[bool]
    difference: float


def estimate(kinds: Sequence[Kind], together: Sequence[Together], again: Sequence[float], whole: float) -> Array:
    """Microseconds that one layer of each kind costs, float64 [kinds].

    Without passes of many kinds `together`, what instances differ by, which is known from few, would be added up over all
    kinds. `again` are the differences of passes with nothing changed, two at least. `whole` is the unchanged pass's time."""
    counts = np.asarray([kind.count for kind in kinds], np.float64)
    differences = np.asarray([kind.difference for kind in kinds])
    loses_state = np.asarray([kind.modelled is not None for kind in kinds])
    modelled = np.asarray([kind.modelled or 0.0 for kind in kinds])
    offset = float(np.mean(again))
    of_many = np.asarray([counts * np.asarray(many.changed) for many in together]).reshape(-1, len(kinds))
    of_state = ~np.asarray([(many > 0) @ ~loses_state for many in of_many], bool)
    # What this device takes for what the model calls a microsecond. It cannot gain by moving more.
    sizes = np.append(counts * modelled, np.where(of_state, of_many @ modelled, 0.0))
    came = np.append(differences, [many.difference for many in together]) - offset
    scale = max(float(sizes @ came / (sizes @ sizes)), 0.0) if sizes.any() else 0.0
    expected = scale * modelled
    spread = np.where(loses_state, np.maximum(SHARE * np.abs(expected), LEAST * whole), UNKNOWN * whole)
    # Unknowns: the cost of each kind, and by how much another instance differs whatever it is.
    noise = max(float(np.std(again, ddof=1)), QUIET * whole)
    shared = np.where(of_state, 0.0, SHARED * whole)
    variances = noise**2 + np.concatenate([np.zeros(len(kinds)), shared**2, np.zeros(len(again))])
    costs = np.vstack([np.diag(counts), of_many, np.zeros((len(again), len(kinds)))])
    seen = np.hstack([costs, np.ones((len(costs), 1))])
    mean = np.append(expected, 0.0)
    covariance = np.diag(np.append(spread, UNKNOWN * whole) ** 2)
    gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + np.diag(variances))
    observed = np.concatenate([differences, [many.difference for many in together], again])
    found: Array = mean + gain @ (observed - seen @ mean)
    return found[:-1]
