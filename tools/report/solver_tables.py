"""The tables of a solver study (`tools.research.solver_study`)."""

from __future__ import annotations

from typing import Any

from modiff_trt.tools.report.keyed_tables import by_bits, by_steps, table


def nearness(data: dict[str, Any]) -> str:
    """PSNR to 1000 steps, a line each solver and spacing."""
    found = by_steps(data["nearness"])
    steps = sorted({count for line in found.values() for count in line})

    def cell(figures: dict[str, Any]) -> str:
        return f"{figures['psnr_db']:.1f}" if "psnr_db" in figures else "refused"

    lines = table("solver, spacing", steps, {n: [cell(line[count]) for count in steps] for n, line in found.items()})
    lines.append(
        f"\nPSNR in dB of {data['images']} images in FP32 to {data['truth_steps']} DDIM steps of the same noise, by number of "
        f"steps, on one {data['machine']['gpu']}. Refused: the sequence repeats a timestep."
    )
    return "\n".join(lines)


def quality(data: dict[str, Any]) -> str:
    """FD-CIFAR and time of an image, a line for each number of steps."""
    found = by_steps(data["quality"])
    steps = sorted({count for line in found.values() for count in line})

    def cell(figures: dict[str, Any] | None) -> str:
        return f"{figures['fd_cifar']:.3f} ({figures['microseconds_an_image']:.0f})" if figures else ""

    lines = table("steps", list(found), {count: [cell(line.get(count)) for line in found.values()] for count in steps})
    lines.append(
        f"\nFD-CIFAR of {data['fd_images']} images to the 50,000 training images (microseconds an image, with warm-up passes "
        f"and transfers), on one {data['machine']['gpu']}. Empty: refused, or not run."
    )
    return "\n".join(lines)


def grids(data: dict[str, Any]) -> str:
    """PSNR by activation bits and kind of grid."""
    alone = {key.partition(",")[0]: value for key, value in data["bits"].items() if key.endswith("weights alone")}
    weights = "; ".join(f"{count}: {value:.1f} dB" for count, value in alone.items())
    lines = by_bits({key: value for key, value in data["bits"].items() if " A" in key}, "")
    lines.append(
        f"\nPSNR in dB of {data['images']} images to FP32 with the same steps, W8 to nearest, simulated on one "
        f"{data['machine']['gpu']}. Weights alone, {weights}."
    )
    return "\n".join(lines)
