"""Classifier-free guidance (arXiv 2207.12598) around any denoiser: a batch of twice the images, each with its own state."""

from __future__ import annotations

from typing import Any

import numpy as np

from modiff_trt.core.context import Arrays
from modiff_trt.core.rows import RowTable
from modiff_trt.runtime.denoiser import Array, Denoiser, StateInfo, of_copies


class GuidedDenoiser:
    """Answers u + guidance (c - u), where u and c are the answers to the two halves of a context, negative lines first."""

    def __init__(self, denoiser: Denoiser, guidance: float) -> None:
        self._denoiser, self._guidance = denoiser, guidance

    @property
    def rows(self) -> RowTable:
        return self._denoiser.rows

    @property
    def state_info(self) -> tuple[StateInfo, ...]:
        """Of one image that is made: the state of two."""
        return of_copies(self._denoiser.state_info, copies=2)

    def reset(self, batch: int, context: Arrays | None = None) -> None:
        self._denoiser.reset(2 * batch, context)

    def from_host(self, x: np.ndarray[Any, Any]) -> Array:
        return self._denoiser.from_host(x)

    def to_host(self, x: Array) -> np.ndarray[Any, Any]:
        return self._denoiser.to_host(x)

    def __call__(self, x: Array, row: int) -> Array:
        twice = np.concatenate([x, x]) if isinstance(x, np.ndarray) else x.repeat(2, 1, 1, 1)
        answer = self._denoiser(twice, row)
        negative, positive = answer[: len(x)], answer[len(x) :]
        return negative + self._guidance * (positive - negative)
