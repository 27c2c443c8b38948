"""Guidance around denoisers whose pass has none. Those on a device have it inside (`GraphedDenoiser`). No torch."""

from __future__ import annotations

from modiff_trt.core.context import Context
from modiff_trt.runtime.backends.guided_denoiser import GuidedDenoiser
from modiff_trt.runtime.denoiser import Denoiser


def guided(denoiser: Denoiser, context: Context) -> Denoiser:
    """The denoiser with a context's guidance, if it has any."""
    return denoiser if context.guidance is None else GuidedDenoiser(denoiser, context.guidance)
