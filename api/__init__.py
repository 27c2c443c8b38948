"""modiff-trt from Python: nine names, each imported when it is first used.

`load_model`, `load_scales`, `denoiser` and `sample` work on objects. `collect`, `calibrate`, `export_onnx`, `build` and
`evaluate` are the stages of the command line: the same options as keywords, files as paths. All raise `core.errors.InputError`,
one line for whoever gave the input. `docs/api.md` lists them.
"""

from importlib import import_module
from typing import Any

# Name -> where it is defined, and how it is called there.
_PLACES = {
    "load_model": ("modiff_trt.tools.api", "load_model"),
    "load_scales": ("modiff_trt.tools.api", "load_scales"),
    "denoiser": ("modiff_trt.tools.api", "denoiser"),
    "sample": ("modiff_trt.tools.api", "sample"),
    "collect": ("modiff_trt.tools.cli.collect", "collect"),
    "calibrate": ("modiff_trt.tools.cli.calibrate", "calibrate"),
    "export_onnx": ("modiff_trt.tools.cli.export", "export"),  # `export` is a folder
    "build": ("modiff_trt.tools.cli.engine", "build"),
    "evaluate": ("modiff_trt.tools.cli.evaluate", "evaluate"),
}
__all__ = [
    "build",
    "calibrate",
    "collect",
    "denoiser",
    "evaluate",
    "export_onnx",
    "load_model",
    "load_scales",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'modiff_trt' has no attribute '{name}'; it has {', '.join(_PLACES)}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
