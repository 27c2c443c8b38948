"""The program inside a deployed sampler: DDIM from the network or the plan that lies beside it. No torch, no checkout.

./modiff-sampler -n 64 --seed 0 -o images/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from modiff_trt.core.context import load_context
from modiff_trt.core.errors import InputError, one_line
from modiff_trt.core.files import read_signed, sha256
from modiff_trt.core.solvers import solver_from_dict
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.plan import load_plan
from modiff_trt.runtime.backends.registry.exported import onnx_backend, plan_backend
from modiff_trt.runtime.backends.registry.guidance import guided
from modiff_trt.runtime.sampling import Backend, Rank, image_range, run_sampling
from modiff_trt.tools.stopping import exit_code

NETWORK, PLAN, ABOUT = "network.onnx", "network.plan", "about.json"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        self.exit(2, f"error: {one_line(message)}; see --help\n")


def main(argv: list[str] | None = None) -> int:
    """Samples, and returns the exit code: 2 for bad input, with one line that says what is wrong."""
    parser = _Parser(prog="modiff-sampler", description="Sample images from a deployed INT8 network.")
    parser.add_argument("-n", "--num-samples", type=int, default=16, help="number of images (16)")
    parser.add_argument("--seeds", help="a-b: images a to b of the series of --seed, instead of the first ones")
    parser.add_argument("-o", "--out", "--output-dir", type=Path, required=True, help="FILE.npz, or a folder for PNG files")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is always the same (0)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic, 1: as noisy as DDPM (0)")
    parser.add_argument("--noise", type=Path, help=".npy float32 [N, C, H, W] used as x_T")
    parser.add_argument("--context", type=Path, help=".npz of what the network is given beside noise, by diffusers' names")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance: the context has what it leads away from too")
    parser.add_argument("--shards", action="store_true", help="one uint8 array a batch in the folder, instead of PNG files")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the plan, or onnxruntime-gpu")
    options = parser.parse_args(argv)
    return exit_code(lambda: _sample(options), lambda line: print(line, file=sys.stderr))  # noqa: T201


def _sample(options: argparse.Namespace) -> int:
    backend = _backend(Path(sys.argv[0]).resolve().parent, options.device)
    context = load_context(options.context, options.guidance, backend.config.architecture)
    if options.context is not None:
        given = {"context_sha256": sha256(options.context), "guidance": options.guidance}
        backend = replace(backend, manifest=backend.manifest | given)
    done = run_sampling(
        replace(backend, denoiser=guided(backend.denoiser, context), context=context),
        indices=image_range(options.num_samples, options.seeds),
        seed=options.seed,
        batch_size=options.batch_size,
        eta=options.eta,
        noise_file=options.noise,
        out=options.out,
        shards=options.shards,
    )
    print(f"{options.out}: {done.images} images, {done.new} of them made now")  # noqa: T201
    return 0


def _backend(folder: Path, device: str) -> Backend:
    network, plan = folder / NETWORK, folder / PLAN
    about = read_signed(folder / ABOUT, "deployed sampler", "deploy it again")
    steps = about.get("timesteps")
    if not isinstance(steps, list) or not steps or not all(type(step) is int for step in steps):
        raise InputError(f"{folder / ABOUT} names no timesteps; deploy it again")
    if device == "cuda" and plan.is_file():
        return _engine(plan, about)
    model = load_onnx(network, device, gpu=Rank.of_environment().local)
    if model.sha256 != about.get("onnx_sha256"):
        raise InputError(f"{network} is not the network of this sampler; deploy it again")
    if not all(0 <= step < model.config.diffusion.num_diffusion_timesteps for step in steps):
        raise InputError(f"{folder / ABOUT} names timesteps that the network does not have; deploy it again")
    rows, solver = model.calibrated_rows, solver_from_dict(about.get("solver"), str(folder / ABOUT))
    timesteps = rows.timesteps if rows is not None else tuple(steps)
    return onnx_backend(model, timesteps, solver, device=device)


def _engine(file: Path, about: dict[str, Any]) -> Backend:
    plan = load_plan(file)
    if plan.manifest["onnx_sha256"] != about["onnx_sha256"]:
        raise InputError(f"{file} is not the plan of this sampler; deploy it again")
    return plan_backend(plan, tuple(about["timesteps"]), solver_from_dict(about.get("solver"), str(file.parent / ABOUT)))
