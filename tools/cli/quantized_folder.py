"""The folder that `quantize` writes, as other commands take it: its files, and what it was made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modiff_trt.core.errors import InputError

RECORD, SCHEMA = "quantization.json", 1
TRAJECTORIES, SCALES, NETWORK, REPORT = "trajectories.safetensors", "scales.safetensors", "network.onnx", "report.html"
HALF, CARD = "network-fp16.onnx", "README.md"


@dataclass(frozen=True)
class Inputs:
    """The options that name a network in full precision, and what it is given beside noise."""

    config: Path | None = None
    ckpt: Path | None = None
    model: Path | None = None
    weights: str | None = None
    context: Path | None = None
    guidance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """With absolute paths."""
        return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def is_quantized(path: Path | None) -> bool:
    return path is not None and (path / RECORD).is_file()


def exported_of(path: Path) -> Path:
    """The exported file of a folder that `quantize` wrote; any other path is itself."""
    return path / NETWORK if is_quantized(path) else path


def inputs_of(folder: Path) -> Inputs:
    """What the folder was made of. Raises InputError where it does not say, or where that is gone."""
    from modiff_trt.core.files import read_signed

    record = read_signed(folder / RECORD, "record of a quantization", "run `quantize` again")
    kept = record.get("inputs")
    if not isinstance(kept, dict) or kept.keys() != asdict(Inputs()).keys():
        raise InputError(f"{folder} does not say where its checkpoint lies; run the same `quantize` again, which adds it")
    paths = {name: Path(kept[name]) for name in ("config", "ckpt", "model", "context") if kept[name] is not None}
    for path in paths.values():
        if not path.exists():
            raise InputError(f"{path}, of which {folder} was made, is gone; run the same `quantize` with where it lies now")
    return Inputs(**{**kept, **paths})
