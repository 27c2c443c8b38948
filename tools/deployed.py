"""The program inside a deployed sampler: DDIM from the network that lies beside it. No torch, no checkout.

./modiff-sampler -n 64 --seed 0 -o images/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import read_json, sha256
from modiff_trt.runtime.onnx_denoiser import OnnxDenoiser, load_onnx
from modiff_trt.tools.sampling import Backend, run_sampling

NETWORK, ABOUT = "network.onnx", "about.json"


def main(argv: list[str] | None = None) -> int:
    """Samples, and returns the exit code: 2 for bad input, with one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="modiff-sampler", description="Sample images with DDIM from a deployed INT8 network.")
    parser.add_argument("-n", "--num-samples", type=int, default=16, help="number of images (16)")
    parser.add_argument("-o", "--out", "--output-dir", type=Path, required=True, help="FILE.npz, or a folder for PNG files")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is always the same (0)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic, 1: as noisy as DDPM (0)")
    parser.add_argument("--noise", type=Path, help=".npy float32 [N, C, H, W] used as x_T")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs onnxruntime-gpu (cpu)")
    options = parser.parse_args(argv)
    try:
        done = run_sampling(
            _backend(Path(sys.argv[0]).resolve().parent, options.device),
            num_samples=options.num_samples,
            seed=options.seed,
            batch_size=options.batch_size,
            eta=options.eta,
            noise_file=options.noise,
            out=options.out,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)  # noqa: T201
        return 130
    print(f"{options.out}: {options.num_samples} images, {done} of them made now")  # noqa: T201
    return 0


def _backend(folder: Path, device: str) -> Backend:
    network = folder / NETWORK
    about = read_json(folder / ABOUT, "deployed sampler")
    if not isinstance(about, dict) or not network.is_file() or sha256(network) != about.get("onnx_sha256"):
        raise InputError(f"{network} is missing or is not the network of this sampler; deploy it again")
    model = load_onnx(network, device)
    rows = model.calibrated_rows
    timesteps = rows.timesteps if rows is not None else tuple(about["timesteps"])
    manifest = {"backend": "onnx", "onnx_sha256": about["onnx_sha256"], "timesteps": list(timesteps)}
    return Backend(OnnxDenoiser(model, timesteps, device), model.config, manifest)
