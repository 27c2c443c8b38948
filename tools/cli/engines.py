"""`modiff-trt engines`: which engine of a network is the fastest here, and whether it is right, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError, shown
from modiff_trt.tools.cli.options import Ckpt, Config, ContextFile, Guidance, Model, Weights


def engines(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    scales: Annotated[Path, typer.Option(help="scales file of the integer engines")],
    out: Annotated[Path, typer.Option("--out", "--output-dir", help="folder for files, plans and the report")],
    runtime: Annotated[str, typer.Option(help="auto, tensorrt or rtx")] = "auto",
    target: Annotated[
        str | None, typer.Option(help="rtx: sm80, sm86, sm89, sm120, ...; another GPU than this machine's is not timed")
    ] = None,
    min_batch: Annotated[int, typer.Option(help="smallest batch of the profile")] = 1,
    max_batch: Annotated[int, typer.Option(help="largest batch of the profile")] = 16,
    tokens: Annotated[int, typer.Option(help="of a prompt, for networks that attend to one")] = 77,
    batch_sizes: Annotated[str, typer.Option(help="timed, comma-separated; within the profile")] = "1,16",
    num_runs: Annotated[int, typer.Option(help="measurements; their median counts")] = 7,
    num_passes: Annotated[int, typer.Option(help="passes of one measurement")] = 20,
    tolerance: Annotated[
        float, typer.Option(help="mean difference to onnxruntime allowed, relative to an output's size")
    ] = 0.05,
    context: ContextFile = None,
    guidance: Guidance = None,
    weights: Weights = None,
) -> int:
    """Build FP16, INT8 and MoDiff engines, check them against onnxruntime, time them beside PyTorch, and write a report.

    Exit code 1 if an engine is not equal. Engines that stand in the folder are kept.
    """
    from modiff_trt.core.context import load_context
    from modiff_trt.core.files import check_writable, locked, write_signed
    from modiff_trt.core.progress import progress_bar
    from modiff_trt.core.scales import load_scales
    from modiff_trt.engines.build import BuildOptions, check_target_name, target_of
    from modiff_trt.plugins.modulated_conv.tensorrt.library import builder
    from modiff_trt.runtime.backends.registry.options import checkpoint_manifest, load_model
    from modiff_trt.tools.bench import engines as table
    from modiff_trt.tools.provenance import provenance

    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise InputError(f"--batch-sizes must be numbers separated by commas, found {shown(batch_sizes)}") from None
    opt_batch = min(max(4, min_batch), max_batch)
    options = BuildOptions(min_batch, opt_batch, max_batch, tokens=tokens, target=target)
    network, checkpoint = load_model(config, ckpt, weights, model=model)
    given = load_context(context, guidance, network.config.architecture)
    if not all(1 <= size * given.copies <= max_batch for size in sizes) or num_runs < 1 or num_passes < 1:
        doubled = "; with guidance an image counts twice" if given.copies > 1 else ""
        raise InputError(
            f"--batch-sizes must lie between 1 and --max-batch ({max_batch}{doubled}), and --num-runs and --num-passes be at "
            "least 1"
        )
    if not tolerance > 0:
        raise InputError("--tolerance must be above 0")
    loaded = load_scales(scales, network, checkpoint.sha256)
    library = builder(runtime)
    check_target_name(library, target)
    target_of(options)
    check_writable(out / table.RESULT)
    subject = table.Subject(network, checkpoint, loaded, given)
    source = config or model
    assert source is not None  # else `load_model` has refused
    result: dict[str, Any] = {
        "config": source.name,
        "scales_sha256": loaded.file_sha256,
        **checkpoint_manifest(checkpoint),
        "engines": {},
        "times": {},
    }
    with locked(out):
        for number, kind in enumerate(table.KINDS, 1):
            typer.echo(f"[{number}/{len(table.KINDS)}] {kind.title}: half a minute to some minutes", err=True)
            entry: dict[str, Any] = {"not_run": []}
            result["engines"][kind.name] = entry
            try:
                entry |= table.build_engine(subject, kind, out, library=library, options=options)
                with progress_bar() as bar:
                    task = bar.add_task("check", total=min(table.PASSES, len(loaded.rows)), unit="passes")
                    entry["check"] = table.check_engine(
                        entry,
                        out,
                        given,
                        batch=min(2, max_batch),
                        tolerance=tolerance,
                        on_pass=lambda bar=bar, task=task: bar.advance(task),  # type: ignore[misc]
                    )
            except InputError as error:
                stage = "compared" if "plan" in entry else "built"
                entry["not_run"].append(f"not {stage}: {error}")
        device = "cuda"
        try:
            result["times"] = table.time_engines(
                subject, result["engines"], out, device=device, batch_sizes=sizes, runs=num_runs, passes=num_passes
            )
        except InputError as error:
            result["times"], device = {"not_run": str(error)}, "cpu"
        result |= provenance(device)
        result["verdict"] = table.verdict(result["engines"], result["times"].get("batches", {}))
        write_signed(out / table.RESULT, result)
        table.write_markdown(out / table.MARKDOWN, result)
    for kind in table.KINDS:
        for why in result["engines"][kind.name]["not_run"]:
            typer.echo(f"{kind.title}: {why}", err=True)
    if "not_run" in result["times"]:
        typer.echo(f"not timed: {result['times']['not_run']}", err=True)
    typer.echo(f"{result['verdict']}; {out / table.MARKDOWN}")
    return int(any(entry.get("check", {}).get("equal") is False for entry in result["engines"].values()))
