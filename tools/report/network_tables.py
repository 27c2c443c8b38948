"""The tables of networks: how near their answers are to diffusers', and what the method takes at their size."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import table


def layouts(data: dict[str, Any]) -> str:
    """The largest difference to diffusers of each network."""
    lines = {
        name: [
            f"{row['parameters'] / 1e6:.0f}",
            str(row["layers"]),
            "x".join(map(str, row["input"])),
            f"{row['largest_difference']:.1e}",
        ]
        for name, row in data["networks"].items()
    }
    return "\n".join(table("network", ["parameters, M", "layers", "input", "largest difference"], lines))


def classes(data: dict[str, Any]) -> str:
    """PSNR to FP32 of the demo with classes, as `evaluate --same-noise` wrote it, by method and backend."""
    lines = {name: [f"{row['psnr_db']:.1f}", str(row["images"])] for name, row in data["sets"].items()}
    return "\n".join(table("method and backend", ["PSNR to FP32, dB", "images"], lines))


def gpu_speed(data: dict[str, Any]) -> str:
    """Milliseconds of a pass at Stable Diffusion's size, beside diffusers' own."""
    lines = {}
    for batch, row in data["batches"].items():
        ratio = row["diffusers_fp16_compiled_ms"] / row["native_int8_ms"]
        times = [f"{row[name]:.2f}" for name in ("diffusers_fp16_compiled_ms", "native_int8_ms")]
        lines[batch] = [*times, f"{ratio:.2f}x", f"{row['memory_gb']:.1f}"]
    second = data["second_machine"]
    ratios = " and ".join(
        f"{second['diffusers_fp16_compiled_ms'][n] / second['native_int8_ms'][n]:.2f}x at {n}" for n in second["native_int8_ms"]
    )
    note = (
        f"\n{data['machine']['gpu']}; {data['what']}. On another H200, in one call and before sums were split: {ratios} "
        "(`results/sd15_speed_h200.json`)."
    )
    columns = ["diffusers FP16, compiled, ms", "native INT8, ms", "ratio", "memory, GB"]
    return "\n".join([*table("batch", columns, lines), note])


def full_width(data: dict[str, Any]) -> str:
    """Seconds and memory of each stage at Stable Diffusion's size."""
    lines = {name: [f"{row['seconds']:.0f}", f"{row['peak_gb']:.1f}"] for name, row in data["stages"].items()}
    apart = ", ".join(f"{name} {value:.3f}" for name, value in data["relative_difference_to_fp32"].items())
    note = (
        f"\nThe UNet of Stable Diffusion 1.5 at full width with random weights, latents of 64x64, 4 steps, guidance; 2 CPU "
        f"cores without VNNI. ONNX file {data['onnx_bytes'] / 1e9:.1f} GB. Difference of the latents to FP32's, relative: "
        f"{apart} (`results/sd15_cpu.json`)."
    )
    return "\n".join([*table("stage", ["seconds", "memory, GB"], lines), note])
