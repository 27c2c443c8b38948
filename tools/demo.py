"""`modiff-trt demo`: the whole path with the shipped model, in half a minute on two cores."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from modiff_trt.core.config import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import write_json
from modiff_trt.core.scales import Scales, load_scales
from modiff_trt.core.solvers import Solver
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.checkpoint import Checkpoint, load_checkpoint
from modiff_trt.networks.unet import Network, trace
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.registry import exported, trained
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import psnr
from modiff_trt.runtime.sampling import Backend, check_seed, sample_batches
from modiff_trt.tools.assets import config_path, demo_path
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.report.picture_grid import save_grid


@dataclass(frozen=True)
class Candidate:
    """One row of the demo: its name, the shipped scales it uses, and whether they are modulated."""

    name: str
    scales: str | None
    modulate: bool = True


MOST_IMAGES = 256
CANDIDATES = (
    Candidate("FP32", None),
    Candidate("Q-Diff W8A8", "modiff-w8a8.safetensors", False),
    Candidate("MoDiff W8A8", "modiff-w8a8.safetensors"),
    Candidate("Q-Diff W8A6", "modiff-w8a6.safetensors", False),
    Candidate("MoDiff W8A6", "modiff-w8a6.safetensors"),
)


def run(out: Path, num_samples: int, seed: int) -> None:
    """Exports, samples and compares every candidate; writes demo.png and demo.json into `out`."""
    if not 1 <= num_samples <= MOST_IMAGES:
        raise InputError(f"--num-samples must lie between 1 and {MOST_IMAGES}: every image is in the picture")
    check_seed(seed)
    network = trace(load_config(config_path("demo.yml")))
    checkpoint = load_checkpoint(demo_path("model.safetensors"), network)
    timesteps = load_scales(demo_path("modiff-w8a8.safetensors"), network, checkpoint.sha256).rows.timesteps
    rows: list[dict[str, Any]] = []
    images: list[np.ndarray[Any, Any]] = []
    for candidate in CANDIDATES:
        scales, digest = None, None
        if candidate.scales is not None:
            path = demo_path(candidate.scales)
            scales = load_scales(path, network, checkpoint.sha256)
            digest = scales.file_sha256
            if not candidate.modulate:
                scales = scales.without_modulation()
        file = out / (candidate.name.lower().replace(" ", "-") + ".onnx")
        save_onnx(file, build_onnx(network, checkpoint, scales, dtype="fp32", scales_sha256=digest))
        model = load_onnx(file, spinning=candidate.scales is None)
        native = _native(network, checkpoint, scales) if scales is not None else None
        backend = Backend(native or exported.onnxruntime(model, timesteps), model.config, Solver(), {})
        begin = time.perf_counter()
        ((_, samples),) = sample_batches(backend, [list(range(num_samples))], seed, eta=0.0)
        seconds = (time.perf_counter() - begin) / num_samples
        decibel = psnr(samples, images[0]) if images else math.inf
        images.append(samples)
        rows.append(
            {
                "name": candidate.name,
                "backend": "native INT8" if native is not None else "onnxruntime",
                "psnr_db": None if math.isinf(decibel) else round(decibel, 2),
                "seconds_per_image": round(seconds, 3),
                "passes": len(backend.denoiser.rows),
                "state_bytes_per_image": sum(info.nbytes for info in backend.denoiser.state_info),
                "onnx_bytes": file.stat().st_size,
            }
        )
    figures = {
        "model": "demo",
        "checkpoint_sha256": checkpoint.sha256,
        "ddim_steps": len(timesteps),
        "images": num_samples,
        "seed": seed,
        "rows": rows,
        **provenance(),
    }
    labels = [f"{r['name']}\n{'reference' if r['psnr_db'] is None else str(r['psnr_db']) + ' dB'}" for r in rows]
    save_grid(out / "demo.png", images, labels, title=f"Same noise, {len(timesteps)} DDIM steps, on a CPU")
    write_json(out / "demo.json", figures)
    _print(figures)
    Console().print(f"picture: {out / 'demo.png'}\nfigures: {out / 'demo.json'}", highlight=False, soft_wrap=True)


def _native(network: Network, checkpoint: Checkpoint, scales: Scales) -> Denoiser | None:
    """The native backend, or None on a CPU that has no INT8 dot product."""
    try:
        return trained.native(network, checkpoint.params, scales)
    except InputError:
        return None


def _print(figures: dict[str, Any]) -> None:
    table = Table(title=f"demo model, {figures['images']} images, {figures['ddim_steps']} DDIM steps")
    for heading in ("", "backend", "PSNR to FP32, dB", "s / image", "state, MB / image", "ONNX, MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in figures["rows"]:
        decibel = "reference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        state = f"{row['state_bytes_per_image'] / 1e6:.1f}"
        table.add_row(
            row["name"], row["backend"], decibel, f"{row['seconds_per_image']:.2f}", state, f"{row['onnx_bytes'] / 1e6:.1f}"
        )
    Console().print(table)
