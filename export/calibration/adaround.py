"""AdaRound (arXiv 2004.10568): learns for every weight whether it is rounded down or up.

The weight becomes s (floor(W/s) + h(V)) with the rectified sigmoid h; V is trained on the reconstruction error of a
block's output plus a regularizer that drives every h to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff_trt.core.grid import grid_max

# The stretch of the rectified sigmoid (eq. 23).
GAMMA, ZETA = -0.1, 1.1


@dataclass(frozen=True)
class AdaRoundOptions:
    """Iterations and batch per block, the weight of the regularizer, its annealed exponent, and the warm-up without it."""

    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2
    regularizer: float = 1e-2
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2

    def beta(self, iteration: int) -> float | None:
        """The exponent at an iteration, cosine-annealed; None while the regularizer is off."""
        progress = (iteration / self.iterations - self.warmup) / (1 - self.warmup)
        if progress < 0:
            return None
        cosine = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
        return self.beta_end + (self.beta_start - self.beta_end) * cosine


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1] (eq. 23)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class SoftRounding:
    """One layer's weight [C_out, C_in, K, K] with learnable rounding."""

    def __init__(self, weight: Tensor, scale: Tensor, bits: int) -> None:
        self._scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        cells = weight / self._scale
        self._floor = cells.floor()
        self._top = grid_max(bits)
        fraction = ((cells - self._floor) - GAMMA) / (ZETA - GAMMA)
        self.v = torch.logit(fraction).requires_grad_(True)

    def weight(self) -> Tensor:
        """The softly rounded weight; differentiable in V, and equal to the float weight before training."""
        return self._scale * (self._floor + rectified_sigmoid(self.v)).clamp(-self._top, self._top)

    def regularizer(self, beta: float) -> Tensor:
        """sum 1 - |2 h(V) - 1|^beta (eq. 24)."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()

    def round_up(self) -> Tensor:
        """The decision, as booleans."""
        return self.v.detach() >= 0


def learn_rounding(
    layers: Mapping[str, SoftRounding],
    loss: Callable[[Tensor], Tensor],
    count: int,
    options: AdaRoundOptions,
    generator: torch.Generator,
) -> float:
    """Trains V of all layers of one block in place; returns the mean reconstruction loss of the last tenth.

    `loss(indices)` is the reconstruction error of the block on those of its `count` cached samples, with the layers'
    current soft weights.
    """
    optimizer = torch.optim.Adam([layer.v for layer in layers.values()], lr=options.learning_rate)
    tail: list[float] = []
    for iteration in range(options.iterations):
        indices = torch.randint(0, count, (min(options.batch_size, count),), generator=generator)
        error = loss(indices)
        objective = error
        beta = options.beta(iteration)
        if beta is not None:
            for layer in layers.values():
                objective = objective + options.regularizer * layer.regularizer(beta)
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        if iteration >= options.iterations * 0.9:
            tail.append(float(error.detach()))
    return sum(tail) / max(len(tail), 1)
