"""The command line: `modiff-trt <stage>`. Heavy imports happen inside the stages, so that --help is instant."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError, shown
from modiff_trt.core.progress import errors
from modiff_trt.tools.cli import engine as engine_commands
from modiff_trt.tools.cli import evaluate as evaluate_command
from modiff_trt.tools.cli import report as report_command
from modiff_trt.tools.cli.options import BatchSize, Ckpt, Config, Device, Seed, Weights
from modiff_trt.tools.stopping import BAD_INPUT, GO_ON, INTERRUPTED, exit_code

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # The research code spells options with underscores; both spellings work.
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"modiff-trt {version('modiff-trt')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Calibrate, export and deploy INT8 diffusion UNets with MoDiff state kept on the device."""


LARGEST_BATCH = 65536
DEMO_OUT = Path("out/demo")

STAGES = (
    engine_commands.build,
    engine_commands.verify,
    engine_commands.package,
    evaluate_command.evaluate,
    report_command.report,
)
for stage in STAGES:
    app.command()(stage)


@app.command()
def collect(
    config: Config,
    ckpt: Ckpt,
    out: Annotated[Path, typer.Option(help="trajectory file to write (.safetensors)")],
    timesteps: Annotated[int, typer.Option(help="DDIM steps")] = 100,
    skip_type: Annotated[str, typer.Option(help="uniform or quad")] = "quad",
    num_samples: Annotated[int, typer.Option(help="calibration images")] = 16,
    calib_steps: Annotated[int, typer.Option(help="steps to keep, spread evenly; each with the step before it")] = 20,
    seed: Seed = 1,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Run full-precision DDIM and store the trajectories that calibration needs."""
    from modiff_trt.export.calibration.collecting import collect as run
    from modiff_trt.runtime.backends.registry import check_device, load_model

    network, checkpoint = load_model(config, ckpt, weights)
    if checkpoint.description:
        typer.echo(f"checkpoint: {checkpoint.description}")
    result = run(
        network,
        checkpoint,
        timesteps=timesteps,
        skip_type=skip_type,
        num_samples=num_samples,
        calib_steps=calib_steps,
        seed=seed,
        batch_size=batch_size,
        device=check_device(device),
        out=out,
    )
    typer.echo(f"{out}: {num_samples} images at {len(result.steps)} of {len(result.timesteps)} steps")


@app.command()
def calibrate(
    config: Config,
    ckpt: Ckpt,
    trajectories: Annotated[Path, typer.Option(help="file written by `collect`")],
    out: Annotated[Path, typer.Option(help="scales file to write (.safetensors)")],
    method: Annotated[str, typer.Option(help="modiff (modulated residuals) or qdiff (stateless)")] = "modiff",
    weight_bit: Annotated[int, typer.Option(help="bits of the weights, 2 to 8")] = 8,
    act_bit: Annotated[int, typer.Option(help="bits of the activations, 2 to 8")] = 8,
    edge_bit: Annotated[int | None, typer.Option(help="at least so many bits for the first and last layer")] = None,
    scale_method: Annotated[str, typer.Option(help="minmax, mse, percentile, or learned (of residuals)")] = "minmax",
    residuals: Annotated[
        str, typer.Option(help="measured between float steps, or against the quantized network's a_hat")
    ] = "float",
    split: Annotated[bool, typer.Option(help="a grid of its own for the skip half of a concatenated input")] = False,
    start: Annotated[str, typer.Option(help="warmup rows, or exact: a full-precision first step (simulation only)")] = "warmup",
    granularity: Annotated[
        str, typer.Option(help="activation grids: static, tensor (LTQ) or channel (LCQ; simulation only)")
    ] = "static",
    rounding: Annotated[str, typer.Option(help="of the weights: nearest, or adaround (learned, block by block)")] = "nearest",
    iterations: Annotated[int, typer.Option(help="adaround: training steps per block")] = 1000,
    search: Annotated[str, typer.Option(help="by trial: none, scales (static grids), rows (then one a row)")] = "none",
    percentile: Annotated[
        float | None, typer.Option(help="of --scale-method percentile: the share of values that a grid holds (0.9999)")
    ] = None,
    min_intensity: Annotated[
        float, typer.Option(help="leave layers in float that do fewer multiply-accumulates per element moved; 256: 1x1 ones")
    ] = 0.0,
    auto: Annotated[bool, typer.Option("--auto", help="take the state from layers that do not need it")] = False,
    max_loss: Annotated[float, typer.Option(help="auto: PSNR that may be lost, dB")] = 0.3,
    trial_images: Annotated[int, typer.Option(help="images of the trial trajectories of --search and --auto")] = 4,
    seed: Annotated[int, typer.Option(help="adaround: seed of its batches")] = 0,
    dither: Annotated[bool, typer.Option(help="start a_hat from a random place inside the grid")] = True,
    batch_size: BatchSize = 8,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Find the scales of every layer and write them to a scales file."""
    from modiff_trt.core.files import check_writable
    from modiff_trt.core.scales import save_scales
    from modiff_trt.export.calibration.adaround import AdaRoundOptions
    from modiff_trt.export.calibration.pipeline import (
        TRIAL_SEED,
        improve,
        learn_weights,
        measure,
        refit_residuals,
        residual_scales,
    )
    from modiff_trt.export.calibration.static import Recipe, make_scales
    from modiff_trt.export.calibration.trajectories import load_trajectories
    from modiff_trt.export.calibration.trials import PERCENTILES, Trials
    from modiff_trt.runtime.backends.registry import check_device, load_model
    from modiff_trt.runtime.sampling import check_seed

    if rounding not in ("nearest", "adaround"):
        raise InputError(f"--rounding must be nearest or adaround, found {shown(rounding)}")
    if search not in ("none", "scales", "rows"):
        raise InputError(f"--search must be none, scales or rows, found {shown(search)}")
    if search != "none" and (method != "modiff" or granularity != "static"):
        raise InputError("--search is for --method modiff with --granularity static")
    if auto and method != "modiff":
        raise InputError("--auto takes state from layers, which --method modiff gives them")
    if trial_images < 1 or not max_loss >= 0:
        raise InputError("--trial-images must be at least 1 and --max-loss not negative")
    if iterations < 1 or batch_size < 1:
        raise InputError("--iterations and --batch-size must be at least 1")
    if percentile is not None and scale_method != "percentile":
        raise InputError("--percentile is for --scale-method percentile; `--search scales` finds a share by itself")
    check_seed(seed)
    recipe = Recipe(
        method,
        weight_bit,
        act_bit,
        scale_method,
        start,
        edge_bit,
        granularity,
        dither,
        split,
        residuals,
        percentile if percentile is not None else Recipe().percentile,
        min_intensity,
    )
    check_writable(out)
    part = out.with_name(out.name + ".part")
    network, checkpoint = load_model(config, ckpt, weights)
    stored = load_trajectories(trajectories, network.config, checkpoint.sha256)
    ranges = measure(network, checkpoint, stored, batch_size, check_device(device))
    on_device = replace(checkpoint, params={key: value.to(device) for key, value in checkpoint.params.items()})
    scales = make_scales(network, on_device, stored, ranges, recipe)
    if rounding == "adaround":
        scales = learn_weights(network, checkpoint, stored, scales, AdaRoundOptions(iterations), seed, device, part)
    if scales.modulated and (residuals == "quantized" or scale_method == "learned"):
        scales = refit_residuals(network, checkpoint, stored, scales, recipe, batch_size, device)
    if scales.modulated and (search != "none" or auto):
        trials = Trials(network, checkpoint, scales.rows.timesteps, trial_images, TRIAL_SEED, device)
        tried = PERCENTILES if search != "none" else ()
        candidates = {p: residual_scales(network, on_device, stored, ranges, recipe, scales, p) for p in tried}
        scales = improve(trials, scales, candidates, search == "rows", max_loss if auto else None)
    save_scales(out, scales)
    if rounding == "adaround":
        part.unlink(missing_ok=True)
    modes = [layer.mode for layer in scales.layers.values()]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in ("modiff", "int8", "float") if mode in modes)
    only = "; for torch-sim only" if granularity == "channel" or start == "exact" else ""
    typer.echo(f"{out}: {method} W{weight_bit}A{act_bit}, layers: {counts}; {len(scales.rows)} passes a trajectory{only}")


@app.command()
def export(
    config: Config,
    ckpt: Ckpt,
    out: Annotated[Path, typer.Option(help="ONNX file to write")],
    scales: Annotated[Path | None, typer.Option(help="scales file; without it the network stays in float")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 (onnxruntime on a CPU) or fp16 (GPUs)")] = "fp32",
    modulate: Annotated[bool, typer.Option(help="keep MoDiff state; off: the same layers without it")] = True,
    weights: Weights = None,
) -> None:
    """Bake the scales into a QDQ ONNX file."""
    from modiff_trt.core.scales import load_scales
    from modiff_trt.export.onnx.network import build_onnx, save_onnx
    from modiff_trt.runtime.backends.registry import load_model

    network, checkpoint = load_model(config, ckpt, weights)
    loaded = load_scales(scales, network, checkpoint.sha256) if scales is not None else None
    if loaded is not None and not modulate:
        loaded = loaded.without_modulation()
    model = build_onnx(network, checkpoint, loaded, dtype, loaded.file_sha256 if loaded is not None else None)
    save_onnx(out, model)
    kind = f"{len(loaded.modulated)} modulated layers" if loaded is not None else "float"
    typer.echo(f"{out}: {kind}, {dtype}, {out.stat().st_size / 1e6:.1f} MB")


@app.command()
def bench(
    config: Config,
    ckpt: Ckpt,
    scales: Annotated[Path, typer.Option(help="scales file of the integer backends")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    backends: Annotated[
        str, typer.Option(help="comma-separated; `all` is every one that can run here, the others are named with the reason")
    ] = "torch-fp32,native-int8,native-modiff",
    plans: Annotated[str, typer.Option(help="comma-separated TensorRT plans, each a row")] = "",
    batch_sizes: Annotated[str, typer.Option(help="comma-separated")] = "1,4",
    num_warmup: Annotated[int, typer.Option(help="passes before the measurement")] = 2,
    num_runs: Annotated[int, typer.Option(help="measurements; their median counts")] = 7,
    num_passes: Annotated[int, typer.Option(help="passes of one measurement")] = 10,
    profile: Annotated[bool, typer.Option("--profile", help="cuda: time by class of kernel, beside the floor")] = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Time the backends against each other, interleaved in one run."""
    from modiff_trt.core.files import check_writable
    from modiff_trt.core.scales import load_scales
    from modiff_trt.runtime.backends.registry import check_device, checkpoint_manifest, load_model
    from modiff_trt.tools.bench.run import add_profiles, candidates, native_floors, run_bench
    from modiff_trt.tools.bench.table import print_bench

    check_writable(out)
    network, checkpoint = load_model(config, ckpt, weights)
    loaded = load_scales(scales, network, checkpoint.sha256)
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise InputError(f"--batch-sizes must be numbers separated by commas, found {shown(batch_sizes)}") from None
    if not all(1 <= size <= LARGEST_BATCH for size in sizes) or num_runs < 1 or num_passes < 1:
        raise InputError(f"--batch-sizes must lie between 1 and {LARGEST_BATCH}, --num-runs and --num-passes be at least 1")
    if profile and (device != "cuda" or not {"native-modiff", "all"} & set(backends.split(","))):
        raise InputError("--profile is for --device cuda and the backend native-modiff")
    files = [Path(plan) for plan in plans.split(",") if plan]
    makes = candidates(network, checkpoint, loaded, check_device(device), backends.split(","), files)
    reached, floors = native_floors(network, loaded, device, makes)
    settings: dict[str, Any] = {"config": config.name, "scales_sha256": loaded.file_sha256, **checkpoint_manifest(checkpoint)}
    settings |= {"ceilings": reached} if reached else {}
    result = run_bench(
        network,
        makes,
        sizes,
        warmup=num_warmup,
        runs=num_runs,
        passes=num_passes,
        device=device,
        out=out,
        settings=settings,
        floors=floors,
    )
    print_bench(result)
    if profile:
        add_profiles(network, loaded, makes["native-modiff"], sizes, result, out)


@app.command()
def sample(
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="FILE.npz, or a folder for PNG files")],
    backend: Annotated[str, typer.Option(help="torch, torch-sim, onnx, native or trt")] = "torch",
    config: Annotated[Path | None, typer.Option(help="DDIM configuration (.yml)")] = None,
    ckpt: Annotated[Path | None, typer.Option(help="trained weights")] = None,
    scales: Annotated[Path | None, typer.Option(help="scales file, for torch-sim and native")] = None,
    onnx: Annotated[Path | None, typer.Option(help="exported file, for onnx")] = None,
    plan: Annotated[Path | None, typer.Option(help="built plan, for trt")] = None,
    timesteps: Annotated[int | None, typer.Option(help="DDIM steps (100, or what the scales were made for)")] = None,
    skip_type: Annotated[str | None, typer.Option(help="uniform or quad (quad)")] = None,
    eta: Annotated[float, typer.Option(help="0: deterministic, 1: as noisy as DDPM")] = 0.0,
    modulate: Annotated[bool, typer.Option(help="keep MoDiff state; off: plain Q-Diffusion")] = True,
    num_samples: Annotated[int | None, typer.Option(help="number of images (16)")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="a-b: images a to b of the series of --seed, instead of the first ones")
    ] = None,
    seed: Seed = 0,
    noise: Annotated[Path | None, typer.Option(help=".npy float32 [N, C, H, W] used as x_T")] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="one uint8 array a batch in the folder, instead of PNG files")
    ] = False,
    dtype: Annotated[str, typer.Option(help="of the torch backend: fp32, or fp16 on a GPU")] = "fp32",
    compile_network: Annotated[bool, typer.Option("--compile", help="torch fp16, torch-sim: through torch.compile")] = False,
    weights: Weights = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
) -> None:
    """Sample images with DDIM."""
    from modiff_trt.runtime.backends.registry import SamplingOptions, load_backend
    from modiff_trt.runtime.sampling import image_range, run_sampling

    if num_samples is not None and seeds is not None:
        raise InputError("--num-samples and --seeds both say how many images; pass one of them")
    indices = image_range(num_samples if num_samples is not None else 16, seeds)
    options = SamplingOptions(
        backend=backend,
        config=config,
        ckpt=ckpt,
        scales=scales,
        onnx=onnx,
        timesteps=timesteps,
        skip_type=skip_type,
        modulate=modulate,
        device=device,
        dtype=dtype,
        compile=compile_network,
        plan=plan,
        weights=weights,
    )
    loaded = load_backend(options)
    done = run_sampling(
        loaded, indices=indices, seed=seed, batch_size=batch_size, eta=eta, noise_file=noise, out=out, shards=shards
    )
    kept = f" ({done.images - done.new} were there already)" if done.new < done.images else ""
    of = f"share {done.rank.rank + 1} of {done.rank.world}, " if done.rank.world > 1 else ""
    typer.echo(f"{out}: {of}{done.images} images, {len(loaded.denoiser.rows)} passes each{kept}")


@app.command()
def inspect(
    scales: Annotated[Path, typer.Argument(help="scales file")],
    plots: Annotated[Path | None, typer.Option(help="folder to draw ranges.png and layers.png into")] = None,
) -> None:
    """Show what a scales file decided for every layer."""
    from modiff_trt.core.scales import load_scales
    from modiff_trt.networks.unet import trace
    from modiff_trt.tools.report.inspecting import print_table, save_plots

    loaded = load_scales(scales)
    print_table(loaded, trace(loaded.config))
    for path in save_plots(loaded, plots) if plots is not None else []:
        typer.echo(str(path))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="folder for the picture and the figures")] = DEMO_OUT,
    num_samples: Annotated[int, typer.Option(help="images per row")] = 8,
    seed: Seed = 0,
) -> None:
    """FP32, Q-Diffusion and MoDiff at 8 and 6 bits from the same noise, with the model that ships with this program."""
    from modiff_trt.tools.demo import run

    run(out, num_samples, seed)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line on standard error and exit code 2 for anything the user can mend."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of libraries, which would stand above our own line
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modiff_trt").setLevel(logging.INFO)
    sys.exit(exit_code(lambda: _run(arguments), lambda line: errors.print(line, markup=False)))


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = app(args=arguments, standalone_mode=False)
    except Exception as error:
        # Usage errors of the command-line library; its base class has no stable public name.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # no arguments at all: the help has been printed
            return BAD_INPUT
        raise InputError(f"{error.format_message()}; see --help") from None
    if result == INTERRUPTED:  # the command-line library has turned Ctrl-C into this
        errors.print(GO_ON)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
