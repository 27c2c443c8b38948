"""Plans on disk: `<name>.<runtime><version>.<target>.plan`, beside it a JSON that says what it was made from, the state that a
trajectory begins from, and a timing cache."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from modiff_trt.core.files import atomic_path, save_arrays, sha256, unwritable, write_signed
from modiff_trt.core.kinds import Mode
from modiff_trt.core.manifest import PLAN_SCHEMA, START_KIND, START_SCHEMA, PlanManifest
from modiff_trt.core.start_state import start_state
from modiff_trt.engines.build import BuildOptions, build_plan, target_of
from modiff_trt.engines.onnx_network import OnnxNetwork
from modiff_trt.engines.report import read_layers, summarize
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library

QUANTIZED = (Mode.MODIFF, Mode.INT8)


def plan_path(folder: Path, name: str, library: Library, target: str) -> Path:
    """Where a plan of this name goes."""
    return folder / f"{name}.{library.name}{library.version}.{target}.plan"


def build_into(
    folder: Path, name: str, library: Library, network: OnnxNetwork, options: BuildOptions
) -> tuple[Path, PlanManifest]:
    """Builds a plan and writes it with its manifest; returns its path and the manifest. Nothing is left half-written."""
    target = target_of(options)
    path = plan_path(folder, name, library, target=target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    built = build_plan(library, network, options, timing_cache=path.with_suffix(".timing"))
    quantized = [layer for layer, entry in network.manifest["layers"].items() if entry["mode"] in QUANTIZED]
    manifest: PlanManifest = {
        "schema": PLAN_SCHEMA,
        "plan_sha256": hashlib.sha256(built.plan).hexdigest(),
        "onnx_sha256": network.sha256,
        "runtime": library.name,
        "version": library.version,
        "target": target,
        "plugin": network.plugin,
        "options": asdict(options),
        "network": network.manifest,
        "report": summarize(read_layers(built.log), quantized),
    }
    beside = path.with_suffix(".start.safetensors")
    # A plan never stands beside the manifest of another one.
    path.unlink(missing_ok=True)
    shapes = {input: shape[1:] for input, shape in network.inputs.items()}
    start = start_state(network.exported, network.manifest, shapes)
    real = np.float16 if network.manifest["dtype"] == "fp16" else np.float32
    header = {"kind": START_KIND, "schema": START_SCHEMA, "onnx_sha256": network.sha256}
    save_arrays(beside, header, {key: array.astype(real) for key, array in start.items()})
    manifest["start_sha256"] = sha256(beside)
    write_signed(path.with_suffix(".json"), manifest)
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.plan)
    return path, manifest
