"""`modiff-trt report`: one page that shows what a scales file does, with what bench, evaluate and build wrote."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError
from modiff_trt.tools.cli.options import ContextFile, Device, Guidance, Seed, Weights
from modiff_trt.tools.cli.quantized_folder import SCALES, inputs_of, is_quantized

MOST_IMAGES = 256


def report(
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="HTML file to write")] = Path("out/report.html"),
    config: Annotated[Path | None, typer.Option(help="DDIM configuration (.yml); the shipped demo by default")] = None,
    ckpt: Annotated[Path | None, typer.Option(help="trained weights")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="diffusers folder, for --config and --ckpt; or a folder of `quantize`, which needs no other option"),
    ] = None,
    scales: Annotated[Path | None, typer.Option(help="scales file, modulated")] = None,
    num_samples: Annotated[int, typer.Option(help="images in the pictures")] = 8,
    seed: Seed = 0,
    bench: Annotated[str, typer.Option(help="comma-separated files that `bench` wrote")] = "",
    evaluation: Annotated[Path | None, typer.Option(help="file that `evaluate` wrote")] = None,
    plan: Annotated[Path | None, typer.Option(help="plan whose layers are listed (its .json lies beside it)")] = None,
    context: ContextFile = None,
    guidance: Guidance = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Write a self-contained page: images, errors, ranges, speed, metrics and manifests."""
    from modiff_trt.core.context import load_context
    from modiff_trt.core.files import atomic_path, check_writable, sha256
    from modiff_trt.core.scales import load_scales
    from modiff_trt.networks.state_elements import state_elements
    from modiff_trt.runtime.backends.registry.options import check_device, checkpoint_manifest, load_model
    from modiff_trt.runtime.images.folders import makes_pictures
    from modiff_trt.runtime.sampling import check_seed
    from modiff_trt.tools.assets import config_path, demo_path
    from modiff_trt.tools.cli.evaluate import rows_of
    from modiff_trt.tools.provenance import provenance
    from modiff_trt.tools.report.data import compare
    from modiff_trt.tools.report.page import page
    from modiff_trt.tools.report.sections import engine, speed

    if model is not None and is_quantized(model):
        if scales is not None or context is not None or guidance is not None or weights is not None:
            raise InputError(
                f"{model} was written by `quantize` and has its own scales, weights and prompts; leave out --scales, "
                "--weights, --context and --guidance"
            )
        scales, made_of = model / SCALES, inputs_of(model)
        config, ckpt, model, weights = made_of.config, made_of.ckpt, made_of.model, made_of.weights
        context, guidance = made_of.context, made_of.guidance
    given = [value is not None for value in ((config, ckpt, scales) if model is None else (model, scales))]
    if any(given) and not all(given):
        raise InputError(
            "--config, --ckpt (or --model) and --scales go together; without any of them the report is of the demo model"
        )
    if not 1 <= num_samples <= MOST_IMAGES:
        raise InputError(f"--num-samples must lie between 1 and {MOST_IMAGES}: every image is in the page")
    check_writable(out)
    check_device(device)
    check_seed(seed)
    if not any(given):
        config, ckpt = config_path("demo.yml"), demo_path("model.safetensors")
    network, checkpoint = load_model(config, ckpt, weights, model=model)
    if not makes_pictures(network.config):
        raise InputError("`report` shows pictures, and this network makes latents; measure them with `evaluate --same-noise`")
    given_context = load_context(context, guidance, network.config.architecture)
    file = scales or demo_path("modiff-w8a6.safetensors")
    loaded = load_scales(file, network, checkpoint.sha256)
    if not loaded.modulated:
        raise InputError(f"{file} has no modulated layer; calibrate with --method modiff")
    benches = [_result(Path(part), speed) for part in bench.split(",") if part]
    evaluated = _result(evaluation, rows_of) if evaluation is not None else None
    built = _result(plan.with_suffix(".json"), engine, of_a_plan=True) if plan is not None else None
    source = model or ckpt
    assert source is not None
    manifest: dict[str, Any] = {
        "model": source.name,
        "date": datetime.now(UTC).date().isoformat(),
        **checkpoint_manifest(checkpoint),
        "scales_sha256": loaded.file_sha256,
        "method": loaded.method,
        "ddim_steps": len(loaded.rows.timesteps),
        "seed": seed,
        "state_bytes_an_image": given_context.copies * 2 * sum(state_elements(loaded, network).values()),
        **provenance(device),
    }
    shown = {"bench": [Path(part) for part in bench.split(",") if part], "evaluation": [evaluation] if evaluation else []}
    shown["plan manifest"] = [plan.with_suffix(".json")] if plan else []
    for what, files in shown.items():
        manifest |= {f"{what}_sha256": [sha256(file) for file in files]} if files else {}
    comparison = compare(network, checkpoint, loaded, images=num_samples, seed=seed, device=device, context=given_context)
    manifest["relative error of eps by step"] = {
        trace.name: [round(float(error), 6) for error in comparison.eps_error(trace)] for trace in comparison.traces[1:]
    }
    text = page(comparison, loaded, benches, evaluation=evaluated, plan=built, manifest=manifest)
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _result(path: Path, shown: Callable[[dict[str, Any]], Any], of_a_plan: bool = False) -> dict[str, Any]:
    """A file that another command wrote. Raises InputError if `shown`, its part of the page, cannot be made from it."""
    from modiff_trt.core.files import read_result, read_signed

    data: dict[str, Any] = (
        read_signed(path, "plan manifest", "build the plan again") if of_a_plan else read_result(path, "result")
    )
    try:
        if not shown(data):
            raise InputError(f"{path} has nothing to show")
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration, ArithmeticError):
        raise InputError(f"{path} was not written by the command that this option names") from None
    return data
