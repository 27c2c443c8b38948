"""Trials that were run, kept on disk: a search that was interrupted goes on without running them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from modiff_trt.core.files import kept_arrays, save_arrays

KIND, SCHEMA = "trials", 1
Array = np.ndarray[Any, Any]


class KeptTrials:
    """Numbers that trials gave, by key; of other settings they are not taken. The caller removes the file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._header = path, {"kind": KIND, "schema": SCHEMA, **settings}
        self._found = kept_arrays(path, self._header)

    def of(self, key: str, run: Callable[[], Array]) -> Array:
        """What is kept under `key`, or else what `run` gives, float64 [N], which is kept."""
        if key not in self._found:
            self._found[key] = np.asarray(run(), np.float64)
            save_arrays(self._path, self._header, self._found)
        return self._found[key]
