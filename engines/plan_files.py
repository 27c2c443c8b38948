"""Plans on disk: `<name>.<runtime><version>.<target>.plan`, a JSON that says what it was made from, and a timing cache."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modiff_trt.engines.build import BuildOptions, build_plan
from modiff_trt.engines.library import Library
from modiff_trt.engines.onnx_network import OnnxNetwork
from modiff_trt.engines.report import read_layers, summarize
from modiff_trt.export.files import atomic_path, unwritable, write_json

PLAN_SCHEMA = 1
QUANTIZED = ("modiff", "int8")


def plan_path(folder: Path, name: str, library: Library, target: str | None) -> Path:
    """Where a plan of this name goes; `target` None is the GPU of this machine."""
    return folder / f"{name}.{library.name}{library.version}.{(target or 'local').lower()}.plan"


def build_into(
    folder: Path, name: str, library: Library, network: OnnxNetwork, options: BuildOptions
) -> tuple[Path, dict[str, Any]]:
    """Builds a plan and writes it with its manifest; returns its path and the manifest. Nothing is left half-written."""
    path = plan_path(folder, name, library, options.target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    built = build_plan(library, network, options, path.with_suffix(".timing"))
    quantized = [layer for layer, entry in network.manifest["layers"].items() if entry["mode"] in QUANTIZED]
    manifest = {
        "schema": PLAN_SCHEMA,
        "plan_sha256": hashlib.sha256(built.plan).hexdigest(),
        "onnx_sha256": network.sha256,
        "runtime": library.name,
        "version": library.version,
        "options": asdict(options),
        "network": network.manifest,
        "report": summarize(read_layers(built.log), quantized),
    }
    # A plan never stands beside the manifest of another one.
    path.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), manifest)
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.plan)
    return path, manifest
