"""Costs of single layers from times of whole passes, which scatter by more than most layers cost.

The same network made twice differs by up to 1.5 % of a pass on an H200: its memory lies elsewhere. A layer with state costs
0.02 to 2 %. So a time counts as what it is, a noisy observation, beside an expectation by bytes and operations, and beside the
time of the pass without any state, whose difference is as large as all of them (docs/lab/modes.md). With Gaussian errors that
is a linear problem (Bayesian linear regression; Bishop, Pattern Recognition and Machine Learning, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modiff_trt.core.kinds import Mode

Array = np.ndarray[Any, Any]

# How far a layer may be from its expectation: a share of that, or at least a share of the pass; and where nothing is expected.
SHARE, LEAST, UNKNOWN = 1.0, 0.002, 0.01
# The scatter of a pass's time that is assumed at least, as a share of the pass.
QUIET = 0.002


@dataclass(frozen=True)
class Kind:
    """`count` layers that are alike, in another mode: what bytes and operations say that one of them costs more then, in
    microseconds on any scale (None: they do not tell), and what the pass with all of them so took more."""

    mode: Mode
    count: int
    modelled: float | None
    difference: float


def estimate(kinds: Sequence[Kind], together: Sequence[int], difference: float, again: Sequence[float], whole: float) -> Array:
    """Microseconds that one layer of each kind costs, float64 [kinds].

    `difference` is of the pass with the kinds `together` at once, and `again` are those of passes with nothing changed, two at
    least, as far as another instance of the network differs. `whole` is the time of the unchanged pass."""
    counts = np.asarray([kind.count for kind in kinds], np.float64)
    differences = np.asarray([kind.difference for kind in kinds])
    offset = float(np.mean(again))
    expected, spread = np.zeros(len(kinds)), np.full(len(kinds), UNKNOWN * whole)
    for mode in {kind.mode for kind in kinds}:
        alike = np.asarray([i for i, kind in enumerate(kinds) if kind.mode == mode and kind.modelled is not None], np.int64)
        modelled = np.asarray([kinds[i].modelled for i in alike], np.float64)
        sizes, came = counts[alike] * modelled, differences[alike] - offset
        at_once = [i for i in together if i in alike]
        if at_once:
            sizes = np.append(sizes, sum(counts[i] * float(kinds[i].modelled or 0) for i in at_once))
            came = np.append(came, difference - offset)
        # What this device takes for what the model calls a microsecond. It cannot gain by moving more.
        scale = max(float(sizes @ came / (sizes @ sizes)), 0.0) if (sizes != 0).any() else 0.0
        expected[alike] = scale * modelled
        spread[alike] = np.maximum(SHARE * np.abs(expected[alike]), LEAST * whole)
    # Unknowns: the cost of each kind, and by how much another instance differs whatever it is.
    noise = max(float(np.std(again, ddof=1)), QUIET * whole)
    of_all = np.zeros(len(kinds))
    of_all[list(together)] = counts[list(together)]
    costs = np.vstack([np.diag(counts), of_all, np.zeros((len(again), len(kinds)))])
    seen = np.hstack([costs, np.ones((len(costs), 1))])
    came = np.concatenate([differences, [difference], np.asarray(again)])
    mean = np.append(expected, 0.0)
    covariance = np.diag(np.append(spread, UNKNOWN * whole) ** 2)
    gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + noise**2 * np.eye(len(seen)))
    found: Array = mean + gain @ (came - seen @ mean)
    return found[:-1]
