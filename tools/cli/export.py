"""`modiff-trt export`: the QDQ ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff_trt.tools.cli.options import Ckpt, Config, Model, Weights


def export(
    *,
    config: Config = None,
    ckpt: Ckpt = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="ONNX file to write")],
    scales: Annotated[Path | None, typer.Option(help="scales file; without it the network stays in float")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 (onnxruntime on a CPU) or fp16 (GPUs)")] = "fp32",
    modulate: Annotated[bool, typer.Option(help="keep MoDiff state; off: the same layers without it")] = True,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="tensors in OUT.data beside the graph, as always beyond 2 GiB")
    ] = False,
    inline: Annotated[
        bool, typer.Option("--inline", help="without local functions, as trtexec and other parsers need it; no plugin then")
    ] = False,
    weights: Weights = None,
) -> None:
    """Bake the scales into a QDQ ONNX file."""
    from modiff_trt.core.scales import load_scales
    from modiff_trt.export.onnx.network import build_onnx, save_onnx
    from modiff_trt.runtime.backends.registry.options import default_solver, load_model

    network, checkpoint = load_model(config, ckpt, weights, model=model)
    loaded = load_scales(scales, network, checkpoint.sha256) if scales is not None else None
    if loaded is not None and not modulate:
        loaded = loaded.without_modulation()
    exported = build_onnx(
        network,
        checkpoint,
        loaded,
        dtype=dtype,
        scales_sha256=loaded.file_sha256 if loaded is not None else None,
        inline=inline,
        solver=default_solver(config, model),
    )
    size = save_onnx(out, exported, outside=external_data)
    kind = f"{len(loaded.modulated)} modulated layers" if loaded is not None else "float"
    typer.echo(f"{out}: {kind}, {dtype}, {size / 1e6:.1f} MB")
