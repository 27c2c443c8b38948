"""Quantized networks in diffusers' protocol, each imported when it is first used.

`ModiffUNet` stands in place of a pipeline's `unet`. `ModiffPipeline` is of a folder that `quantize` wrote, and needs neither
torch nor diffusers.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "ModiffPipeline": "modiff_trt.runtime.diffusers.pipeline",
    "ModiffUNet": "modiff_trt.runtime.diffusers.unet",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'modiff_trt.diffusers' has no attribute '{name}'; it has {', '.join(_PLACES)}")
    return getattr(import_module(_PLACES[name]), name)
