"""The tables of what `demo` and `quantize` wrote."""

from __future__ import annotations

from typing import Any


def demo(data: dict[str, Any]) -> str:
    """The demo's rows, as `modiff-trt demo` wrote them."""
    lines = [
        "| | steps | backend | PSNR to FP32, dB | PSNR to 1000 steps, dB | seconds an image | state, MB an image | ONNX, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        decibel = "reference" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        truth = "" if row["psnr_to_1000_steps_db"] is None else f"{row['psnr_to_1000_steps_db']:.1f}"
        state, size = row["state_bytes_per_image"] / 1e6, row["onnx_bytes"] / 1e6
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['backend']} | {decibel} | {truth} | {row['seconds_per_image']:.2f} | "
            f"{state:.1f} | {size:.1f} |"
        )
    lines.append("")
    vnni = "" if data["machine"]["vnni"] else " without VNNI, where INT8 is exact and not fast"
    lines.append(
        f"{data['images']} images, {data['machine']['cores']} CPU cores{vnni}, onnxruntime {data['versions']['onnxruntime']} "
        "(`results/demo.json`, written by `modiff-trt demo`)."
    )
    return "\n".join(lines)


def quantize(data: dict[str, Any]) -> str:
    """What `quantize` took, stage by stage, and the nearness that it reached."""
    stages = " | ".join(data["stages"])
    seconds = " | ".join(f"{value:.0f}" for value in data["stages"].values())
    decibels = ", ".join(f"{name} {value:.1f}" for name, value in data["psnr_db"].items())
    return "\n".join(
        [
            f"| stage | {stages} |",
            "|---|" + "---|" * len(data["stages"]),
            f"| seconds | {seconds} |",
            f"\nThe CIFAR-10 network of 35.7 M parameters, 20 steps, defaults, {data['machine']['cores']} CPU cores; "
            f"PSNR to FP32 in dB: {decibels} (`results/quantize_cpu.json`).",
        ]
    )
