"""`modiff-trt sample`: images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.core.errors import InputError, shown
from modiff_trt.tools.cli.options import (
    BatchSize,
    Ckpt,
    ClipSample,
    Config,
    ContextFile,
    Device,
    FinalAlphaName,
    Guidance,
    Model,
    PredictionName,
    Seed,
    SolverName,
    SpacingName,
    StepsOffset,
    Weights,
)
from modiff_trt.tools.cli.quantized_folder import exported_of

# A sheet of more would be too large to look at.
MOST_IN_GRID = 256


def sample(
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="FILE.npz, or a folder for PNG files")],
    backend: Annotated[
        str | None, typer.Option(help="torch, torch-sim, onnx, native or trt (torch; onnx for a folder of `quantize`)")
    ] = None,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    scales: Annotated[Path | None, typer.Option(help="scales file, for torch-sim and native")] = None,
    onnx: Annotated[Path | None, typer.Option(help="exported file, for onnx")] = None,
    plan: Annotated[Path | None, typer.Option(help="built plan, for trt")] = None,
    runtime: Annotated[str, typer.Option(help="of a plan: auto, tensorrt, lean or rtx")] = "auto",
    timesteps: Annotated[int | None, typer.Option(help="steps (100, or what the scales were made for)")] = None,
    solver: SolverName = None,
    spacing: SpacingName = None,
    prediction: PredictionName = None,
    clip_sample: ClipSample = None,
    steps_offset: StepsOffset = None,
    final_alpha: FinalAlphaName = None,
    context: ContextFile = None,
    guidance: Guidance = None,
    eta: Annotated[float, typer.Option(help="0: deterministic, 1: as noisy as DDPM")] = 0.0,
    modulate: Annotated[bool, typer.Option(help="keep MoDiff state; off: plain Q-Diffusion")] = True,
    num_samples: Annotated[int | None, typer.Option(help="number of images (16)")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="a-b: images a to b of the series of --seed, instead of the first ones")
    ] = None,
    seed: Seed = 0,
    noise: Annotated[Path | None, typer.Option(help=".npy float32 [N, C, H, W] used as x_T")] = None,
    grid: Annotated[
        Path | None, typer.Option(help=f"one PNG of the images too, of the first {MOST_IN_GRID} where there are more")
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="one uint8 array a batch in the folder, instead of PNG files")
    ] = False,
    dtype: Annotated[str, typer.Option(help="of the torch backend: fp32, or fp16 on a GPU")] = "fp32",
    compile_network: Annotated[bool, typer.Option("--compile", help="torch fp16, torch-sim: through torch.compile")] = False,
    weights: Weights = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
) -> None:
    """Sample images."""
    from modiff_trt.core.files import check_writable
    from modiff_trt.runtime.backends.registry.options import SamplingOptions, load_backend
    from modiff_trt.runtime.backends.registry.steps import SolverOptions
    from modiff_trt.runtime.images.folders import makes_pictures
    from modiff_trt.runtime.images.pictures import save_sheet
    from modiff_trt.runtime.images.sets import open_images
    from modiff_trt.runtime.sampling import Rank, image_range, run_sampling

    if num_samples is not None and seeds is not None:
        raise InputError("--num-samples and --seeds both say how many images; pass one of them")
    backend, model, onnx = _of_folder(backend, model, onnx)
    indices = image_range(num_samples if num_samples is not None else 16, seeds)
    options = SamplingOptions(
        backend=backend,
        config=config,
        ckpt=ckpt,
        model=model,
        scales=scales,
        onnx=onnx,
        timesteps=timesteps,
        solver=SolverOptions(
            solver, spacing, prediction, clip_sample=clip_sample, steps_offset=steps_offset, final_alpha=final_alpha
        ),
        modulate=modulate,
        device=device,
        dtype=dtype,
        compile=compile_network,
        plan=plan,
        weights=weights,
        context=context,
        guidance=guidance,
        runtime=runtime,
    )
    if grid is not None:
        if Rank.of_environment().world > 1:
            raise InputError("--grid is for one process: each of several has a share of the images alone")
        if grid.suffix.lower() != ".png" or grid.resolve().parent == out.resolve():
            raise InputError("--grid must be a FILE.png, and not in the folder of --out, where it would be an image of the set")
        check_writable(grid)
    loaded = load_backend(options)
    if grid is not None and not makes_pictures(loaded.config):
        raise InputError("--grid is of pictures, and the network makes latents; leave it out")
    done = run_sampling(
        loaded, indices=indices, seed=seed, batch_size=batch_size, eta=eta, noise_file=noise, out=out, shards=shards
    )
    kept = f" ({done.images - done.new} were there already)" if done.new < done.images else ""
    of = f"share {done.rank.rank + 1} of {done.rank.world}, " if done.rank.world > 1 else ""
    typer.echo(f"{out}: {of}{done.images} images, {len(loaded.denoiser.rows)} passes each{kept}")
    if grid is not None:
        images = open_images(out)
        save_sheet(grid, next(images.batches(min(MOST_IN_GRID, images.count))))
        typer.echo(f"{grid}: {min(MOST_IN_GRID, images.count)} of them")


def _of_folder(backend: str | None, model: Path | None, onnx: Path | None) -> tuple[str, Path | None, Path | None]:
    """Backend, network and exported file, where `model` may be a folder that `quantize` wrote. Raises InputError for what does
    not go with one."""
    if model is None or exported_of(model) == model:
        return backend or "torch", model, onnx
    if backend not in (None, "onnx"):
        raise InputError(
            f"--model {model} is a folder of `quantize`, which samples by --backend onnx; for {shown(backend)[1:-1]} pass the "
            "network that it was made from, and its scales.safetensors"
        )
    if onnx is not None:
        raise InputError(f"--model {model} has an exported file of its own; leave --onnx out")
    return "onnx", None, exported_of(model)
