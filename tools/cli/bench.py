"""`modiff-trt bench`: backends timed against each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modiff_trt.core.errors import InputError, shown
from modiff_trt.tools.cli.options import Ckpt, Config, ContextFile, Device, Guidance, Model, Weights

LARGEST_BATCH = 65536


def bench(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
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
    auto_scales: Annotated[
        Path | None,
        typer.Option(help="scales of `calibrate --modes auto`: the row native-auto"),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="JSON file to write what each layer's mode costs here, for `calibrate --costs`")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="cuda: time by class of kernel, beside the floor")] = False,
    context: ContextFile = None,
    guidance: Guidance = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Time the backends against each other, interleaved in one run."""
    from modiff_trt.core.context import load_context
    from modiff_trt.core.files import check_writable, sha256
    from modiff_trt.core.scales import load_scales
    from modiff_trt.runtime.backends.registry.options import check_device, checkpoint_manifest, load_model
    from modiff_trt.tools.bench.run import add_profiles, baselines, candidates, native_floors, run_bench
    from modiff_trt.tools.bench.table import print_bench, print_costs, where

    for path in (out, costs):
        if path is not None:
            check_writable(path)
    network, checkpoint = load_model(config, ckpt, weights, model=model)
    given = load_context(context, guidance, network.config.architecture)
    loaded = load_scales(scales, network, checkpoint.sha256)
    auto = load_scales(auto_scales, network, checkpoint.sha256) if auto_scales is not None else None
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise InputError(f"--batch-sizes must be numbers separated by commas, found {shown(batch_sizes)}") from None
    if not all(1 <= size <= LARGEST_BATCH for size in sizes) or num_runs < 1 or num_passes < 1:
        raise InputError(f"--batch-sizes must lie between 1 and {LARGEST_BATCH}, --num-runs and --num-passes be at least 1")
    if profile and (device != "cuda" or not {"native-modiff", "all"} & set(backends.split(","))):
        raise InputError("--profile is for --device cuda and the backend native-modiff")
    files = [Path(plan) for plan in plans.split(",") if plan]
    makes = candidates(
        network,
        checkpoint,
        loaded,
        device=check_device(device),
        names=backends.split(","),
        plans=files,
        auto=auto,
        context=given,
    )
    reached, floors = native_floors(network, loaded, device, names=makes, auto=auto, copies=given.copies)
    source = config or model
    assert source is not None
    settings: dict[str, Any] = {
        "config": source.name,
        "scales_sha256": loaded.file_sha256,
        **checkpoint_manifest(checkpoint),
    }
    settings |= {"ceilings": reached} if reached else {}
    if context is not None:
        settings |= {"context_sha256": sha256(context), "guidance": guidance}
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
        context=given,
        floors=floors,
    )
    print_bench(result, auto.curve if auto is not None else None)
    if profile:
        add_profiles(network, loaded, makes["native-modiff"], batch_sizes=sizes, context=given, result=result, out=out)
    if costs is not None:
        from modiff_trt.core.files import write_signed
        from modiff_trt.runtime.backends.registry import trained
        from modiff_trt.tools.bench.costs import measure_costs

        part = costs.with_name(costs.name + ".part")
        found = measure_costs(
            network,
            loaded,
            partial(trained.alike_natives, network, checkpoint.params, device, guidance=guidance),
            sizes,
            runs=num_runs,
            passes=num_passes,
            device=device,
            where=where(result["machine"]),
            baselines=baselines(result),
            part=part,
            context=given,
        )
        provenance = {key: result[key] for key in ("command", "commit", "versions", "machine")}
        write_signed(costs, found | settings | provenance)
        part.unlink(missing_ok=True)
        print_costs(found)
