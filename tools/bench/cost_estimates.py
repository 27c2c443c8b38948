"""Costs of single layers from times of whole passes, which scatter by more than most layers cost.

On an H200 single layers of 4x4 and 8x8 pixels came out 0.7 to 1.5 % of a pass slower in a mode that does less. Their
network was made once more for it, and its memory lies elsewhere. A layer's state costs 0.02 to 2 %. So a time counts as
what it is, a noisy observation, beside an expectation by bytes and operations, and beside the times of passes with many
layers changed, whose differences are as large as all of theirs. The expectation also says how much a layer can be worth:
whoever takes the fastest of three modes for each of 194 layers takes what seems too fast by chance. Before it did, the choice
for Stable Diffusion at batch 8 was predicted 12 % too fast (docs/lab/modes.md). With Gaussian errors that is a linear problem:
Bayesian linear regression, with the spread and the scatter that explain the times best (Bishop, Pattern Recognition and Machine
Learning, sections 3.3 and 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# How far a cost may be from its expectation: what is considered, as a share of the layer's work and, LEAST times that, of a
# layer's mean time. A layer can hardly gain much more than it does: larger shares explain outliers of a noisy machine.
SHARES, LEAST = (0.25, 0.5, 1.0, 2.0), 0.1
# By how much instances that are timed beside the same one may be slower, as a share of the pass.
UNKNOWN = 0.05
# Scatters of a pass's time that are considered, as shares of the pass; and how far the costs of many layers may be from adding
# up: layers in INT8 share launches. State does not.
SCATTERS, SHARED = 0.002 * 1.25 ** np.arange(20), 0.02


@dataclass(frozen=True)
class Kind:
    """`count` layers that are alike, in another mode. `modelled` is what bytes and operations say that one of them takes more
    then, and `work` how much there is that it could gain or lose: both in microseconds of the model. `loses_state`: the other
    mode is the same without state."""

    count: int
    modelled: float
    work: float
    loses_state: bool


@dataclass(frozen=True)
class Passes:
    """Which kinds were changed at once, and what that took more than the unchanged pass (`stateless`: than that without its
    state)."""

    changed: Sequence[bool]
    stateless: bool
    difference: float


@dataclass(frozen=True)
class Whole:
    """The unchanged pass: its time, and the sum of what the model says of its `layers`."""

    microseconds: float
    modelled: float
    layers: int


def estimate(kinds: Sequence[Kind], seen: Sequence[Passes], whole: Whole) -> tuple[Array, float]:
    """Microseconds that one layer of each kind costs, float64 [kinds], and that a pass takes more in another instance of the
    network with nothing changed.

    Passes that change nothing are among those that were `seen`, beside each pass that others were timed beside. Without them,
    and without passes that change many kinds, what instances differ by would be added up over all kinds."""
    counts = np.asarray([kind.count for kind in kinds], np.float64)
    modelled, work = np.asarray([(kind.modelled, kind.work) for kind in kinds]).T
    of_state = np.asarray([kind.loses_state for kind in kinds], bool)
    of_kind = counts * np.asarray([passes.changed for passes in seen], bool).reshape(len(seen), len(kinds))
    beside = np.asarray([[not passes.stateless, passes.stateless] for passes in seen], np.float64)
    came = np.asarray([passes.difference for passes in seen])
    again = ~of_kind.any(1)
    offsets = np.asarray([came[again & (place > 0)].mean() if (again & (place > 0)).any() else 0.0 for place in beside.T])
    # What this device takes for what the model calls a microsecond, of state and of other modes. More state is never faster.
    expected = np.zeros(len(kinds))
    for least, such in ((0.0, of_state), (-np.inf, ~of_state)):
        pure = ~again & ~of_kind[:, ~such].any(1)
        sizes, took = of_kind[pure] @ modelled, (came - beside @ offsets)[pure]
        expected[such] = modelled[such] * max(float(sizes @ took / (sizes @ sizes)) if sizes.any() else 0.0, least)
    spread = whole.microseconds * np.hypot(work / whole.modelled, LEAST / whole.layers)
    # Unknowns: the cost of each kind, and by how much another instance differs whatever it is, beside either pass.
    system, mean = np.hstack([of_kind, beside]), np.append(expected, [0.0, 0.0])
    many = (of_kind[:, ~of_state] > 0).sum(1) > 1
    together, off = np.where(many, SHARED * whole.microseconds, 0.0) ** 2, came - system @ mean
    best, found = -np.inf, mean
    for share, scatter in product(SHARES, SCATTERS):
        covariance = np.diag(np.append(share * spread, [UNKNOWN * whole.microseconds] * 2) ** 2)
        explained = system @ covariance @ system.T + np.diag(together + (scatter * whole.microseconds) ** 2)
        solved = np.linalg.solve(explained, off)
        likely = -np.linalg.slogdet(explained)[1] - off @ solved
        if likely > best:
            best, found = likely, mean + covariance @ system.T @ solved
    return found[:-2], float(found[-2])
