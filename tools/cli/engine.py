"""The stages around an engine: `build`, `verify` and `package`. Heavy imports happen inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.tools.cli.options import (
    ClipSample,
    ContextFile,
    FinalAlphaName,
    PredictionName,
    Seed,
    SolverName,
    SpacingName,
    StepsOffset,
)


def build(
    onnx: Annotated[Path, typer.Option(help="file written by `export --dtype fp16`")],
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="folder for the plan")] = Path("engines/plans"),
    name: Annotated[str | None, typer.Option(help="of the plan; the ONNX file's by default, with -noplugin")] = None,
    runtime: Annotated[str, typer.Option(help="auto, tensorrt or rtx")] = "auto",
    target: Annotated[str | None, typer.Option(help="rtx: sm80, sm86, sm89, sm120, ...; no GPU is needed then")] = None,
    min_batch: Annotated[int, typer.Option(help="smallest batch of the profile")] = 1,
    opt_batch: Annotated[int | None, typer.Option(help="batch to optimize for (4, or the nearest in the profile)")] = None,
    max_batch: Annotated[int, typer.Option(help="largest batch of the profile")] = 16,
    tokens: Annotated[int, typer.Option(help="of a prompt, for networks that attend to one")] = 77,
    level: Annotated[int | None, typer.Option(help="builder optimization level, 0 to 5 (TensorRT's own, 3)")] = None,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="run on later versions too")] = False,
    plugin: Annotated[
        bool, typer.Option("--plugin/--no-plugin", help="modulated layers by our plugin, or inlined, by TensorRT's own kernels")
    ] = True,
    layers: Annotated[bool, typer.Option("--layers", help="print every layer of the engine")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check TensorRT and target, and end; FILE need not be there")
    ] = False,
) -> None:
    """Build a TensorRT plan from an exported file, and say what became of its layers."""
    from modiff_trt.core.files import check_writable
    from modiff_trt.engines.build import BuildOptions, check_target_name, target_of
    from modiff_trt.engines.onnx_network import load_network
    from modiff_trt.engines.plan_files import build_into, plan_path
    from modiff_trt.plugins.modulated_conv.tensorrt.library import builder
    from modiff_trt.tools.cli.building import print_report

    if opt_batch is None:
        opt_batch = min(max(4, min_batch), max_batch)
    options = BuildOptions(
        min_batch, opt_batch, max_batch, tokens=tokens, target=target, level=level, version_compatible=version_compatible
    )
    network = None if dry_run else load_network(onnx, plugin)
    library = builder(runtime)
    check_target_name(library, target)
    if network is None:
        typer.echo(f"{library.name} {library.version} would build {onnx} for {target_of(options)}")
        return
    place, machine = name or onnx.stem + ("" if plugin else "-noplugin"), target_of(options)
    check_writable(plan_path(out, place, library, target=machine))
    if network.manifest["dtype"] == "fp32":
        typer.echo(f"{onnx} is in fp32: for speed, build from `export --dtype fp16`", err=True)
    typer.echo(f"building {onnx.name} for {machine}: half a minute to some minutes", err=True)
    path, manifest = build_into(out, place, library, network=network, options=options)
    print_report(manifest["report"], layers)
    typer.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {library.name} {library.version}, batch {min_batch} to {max_batch}"
    )


def verify(
    onnx: Annotated[Path, typer.Option(help="the file that the plan was built from")],
    plan: Annotated[Path, typer.Option(help="the plan")],
    passes: Annotated[int, typer.Option(help="passes compared")] = 8,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 2,
    tolerance: Annotated[float, typer.Option(help="mean difference allowed, relative to an output's size")] = 0.05,
    seed: Seed = 0,
    context: ContextFile = None,
) -> int:
    """Compare an engine with onnxruntime, pass by pass, and name the first layer that differs (exit code 1)."""
    from modiff_trt.core.context import load_context
    from modiff_trt.core.progress import progress_bar
    from modiff_trt.engines.verifying import print_verdict, verify_plan
    from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
    from modiff_trt.runtime.backends.plan import load_plan

    if passes < 1 or batch_size < 1 or not tolerance > 0:
        raise InputError("--passes and --batch-size must be at least 1, and --tolerance above 0")
    loaded, model = load_plan(plan), load_onnx(onnx)
    given = load_context(context, None, model.config.architecture)
    rows = model.calibrated_rows
    with progress_bar() as bar:
        task = bar.add_task("verify", total=min(passes, len(rows) if rows is not None else 1), unit="passes")
        verdict = verify_plan(
            loaded,
            model,
            batch=batch_size,
            passes=passes,
            tolerance=tolerance,
            seed=seed,
            context=given,
            on_pass=lambda: bar.advance(task),
        )
    return print_verdict(verdict, tolerance)


def package(
    onnx: Annotated[Path, typer.Option(help="file written by `export`, or a folder of `quantize`")],
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="new folder for the sampler")],
    plan: Annotated[Path | None, typer.Option(help="plan built from it, for `modiff-sampler --device cuda`")] = None,
    timesteps: Annotated[int | None, typer.Option(help="steps, for float networks (100); quantized ones carry theirs")] = None,
    solver: SolverName = None,
    spacing: SpacingName = None,
    prediction: PredictionName = None,
    clip_sample: ClipSample = None,
    steps_offset: StepsOffset = None,
    final_alpha: FinalAlphaName = None,
) -> None:
    """Write a folder that samples by itself: the network, and a launcher that needs neither torch nor this project."""
    from modiff_trt.runtime.backends.registry.steps import SolverOptions
    from modiff_trt.tools.cli.quantized_folder import exported_of
    from modiff_trt.tools.package.packing import LAUNCHER, REQUIREMENTS
    from modiff_trt.tools.package.packing import package as pack

    written = pack(
        exported_of(onnx),
        out,
        timesteps=timesteps,
        solver=SolverOptions(
            solver, spacing, prediction, clip_sample=clip_sample, steps_offset=steps_offset, final_alpha=final_alpha
        ),
        plan=plan,
    )
    size = sum(path.stat().st_size for path in written) / 1e6
    typer.echo(f"{out}: {size:.1f} MB; pip install -r {out}/requirements.txt ({len(REQUIREMENTS)} packages), then")
    typer.echo(f"  {out}/{LAUNCHER} -n 64 --seed 0 -o images/")
