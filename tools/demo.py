"""`modiff-trt demo`: the whole path with the shipped model, in half a minute on two cores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import write_json
from modiff_trt.core.npy import read_npz
from modiff_trt.core.scales import Scales, load_scales
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.checkpoint import Checkpoint, load_checkpoint
from modiff_trt.networks.operations import Network
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.registry import exported, trained
from modiff_trt.runtime.denoiser import Denoiser
from modiff_trt.runtime.images.folders import rounded_psnr
from modiff_trt.runtime.sampling import Backend, check_seed, sample_batches
from modiff_trt.tools.assets import config_path, demo_path
from modiff_trt.tools.provenance import provenance
from modiff_trt.tools.report.picture_grid import save_grid


@dataclass(frozen=True)
class Candidate:
    """One row of the demo: its name, the shipped scales that it uses or takes its steps from, and what it does with them."""

    name: str
    scales: str
    quantize: bool = True
    modulate: bool = True


MOST_IMAGES = 256
DDIM_A8, DDIM_A6, FEW = "modiff-w8a8.safetensors", "modiff-w8a6.safetensors", "modiff-w8a8-2m15.safetensors"
# Rows of the same scales file's steps stand together; the first is their reference.
CANDIDATES = (
    Candidate("FP32", DDIM_A8, quantize=False),
    Candidate("Q-Diff W8A8", DDIM_A8, modulate=False),
    Candidate("MoDiff W8A8", DDIM_A8),
    Candidate("Q-Diff W8A6", DDIM_A6, modulate=False),
    Candidate("MoDiff W8A6", DDIM_A6),
    Candidate("FP32, 2M", FEW, quantize=False),
    Candidate("MoDiff W8A8, 2M", FEW),
)
# What 1000 DDIM steps make of the first noises of a seed: too long to wait for, so it ships.
TRUTH, TRUTH_SEED = "thousand-steps.npz", 0


def run(out: Path, num_samples: int, seed: int) -> None:
    """Exports, samples and compares every candidate; writes demo.png and demo.json into `out`."""
    if not 1 <= num_samples <= MOST_IMAGES:
        raise InputError(f"--num-samples must lie between 1 and {MOST_IMAGES}: every image is in the picture")
    check_seed(seed)
    network = trace(load_config(config_path("demo.yml")))
    checkpoint = load_checkpoint(demo_path("model.safetensors"), network)
    truth = _truth(num_samples, seed)
    rows: list[dict[str, Any]] = []
    images: list[np.ndarray[Any, Any]] = []
    references: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}
    for candidate in CANDIDATES:
        shipped = load_scales(demo_path(candidate.scales), network, checkpoint.sha256)
        steps, solver, digest, scales = shipped.rows.timesteps, shipped.solver, None, None
        if candidate.quantize:
            scales, digest = shipped if candidate.modulate else shipped.without_modulation(), shipped.file_sha256
        file = out / (candidate.name.lower().replace(",", "").replace(" ", "-") + ".onnx")
        save_onnx(file, build_onnx(network, checkpoint, scales, dtype="fp32", scales_sha256=digest, solver=solver))
        model = load_onnx(file, spinning=not candidate.quantize)
        native = _native(network, checkpoint, scales) if scales is not None else None
        backend = Backend(native or exported.onnxruntime(model, steps), model.config, solver, {})
        begin = time.perf_counter()
        ((_, samples),) = sample_batches(backend, [list(range(num_samples))], seed, eta=0.0)
        seconds = (time.perf_counter() - begin) / num_samples
        exact = references.setdefault(steps, samples)
        images.append(samples)
        rows.append(
            {
                "name": candidate.name,
                "solver": solver.describe(len(steps)),
                "steps": len(steps),
                "backend": "native INT8" if native is not None else "onnxruntime",
                "psnr_db": rounded_psnr(samples, exact),
                "psnr_to_1000_steps_db": None if truth is None else rounded_psnr(samples, truth),
                "seconds_per_image": round(seconds, 3),
                "passes": len(backend.denoiser.rows),
                "state_bytes_per_image": sum(info.nbytes for info in backend.denoiser.state_info),
                "onnx_bytes": file.stat().st_size,
            }
        )
    figures = {
        "model": "demo",
        "checkpoint_sha256": checkpoint.sha256,
        "images": num_samples,
        "seed": seed,
        "rows": rows,
        **provenance(),
    }
    labels = [f"{r['name']}, {r['steps']} steps\n{_label(r)}" for r in rows]
    save_grid(out / "demo.png", images, labels, title="The same noise, on a CPU. dB: nearness to FP32 with the same steps")
    write_json(out / "demo.json", figures)
    _print(figures)
    Console().print(f"picture: {out / 'demo.png'}\nfigures: {out / 'demo.json'}", highlight=False, soft_wrap=True)


def _truth(num_samples: int, seed: int) -> np.ndarray[Any, Any] | None:
    """Images of 1000 DDIM steps [N, C, H, W] from the same noise, where they ship."""
    found, _ = read_npz(demo_path(TRUTH), ["samples"], "images of 1000 steps")
    return found["samples"][:num_samples] if seed == TRUTH_SEED and num_samples <= len(found["samples"]) else None


def _label(row: dict[str, Any]) -> str:
    return "reference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"


def _native(network: Network, checkpoint: Checkpoint, scales: Scales) -> Denoiser | None:
    """The native backend, or None on a CPU that has no INT8 dot product."""
    try:
        return trained.native(network, checkpoint.params, scales)
    except InputError:
        return None


def _print(figures: dict[str, Any]) -> None:
    # Narrow enough for 80 columns.
    table = Table(title=f"demo model, {figures['images']} images", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("", "steps", "backend", "to FP32", "to 1000", "s each", "state", "file"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in figures["rows"]:
        truth = row["psnr_to_1000_steps_db"]
        table.add_row(
            row["name"],
            str(row["steps"]),
            row["backend"].removesuffix(" INT8"),
            "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
            "" if truth is None else f"{truth:.1f}",
            f"{row['seconds_per_image']:.2f}",
            f"{row['state_bytes_per_image'] / 1e6:.1f}",
            f"{row['onnx_bytes'] / 1e6:.1f}",
        )
    Console().print(table)
    Console().print(
        "PSNR in dB: to FP32 with the same steps (what quantization costs), and to 1000 DDIM steps of the same noise (what few "
        "steps cost too). State and file in MB. 2M is --solver dpmpp-2m.",
        highlight=False,
    )
