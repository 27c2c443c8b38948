"""The tables of a solver study (`tools.research.solver_study`)."""

from __future__ import annotations

from typing import Any


def _split(key: str) -> tuple[str, int]:
    """What a figure is of, and its number of steps: `ddim quad 10`."""
    name, _, steps = key.rpartition(" ")
    return name, int(steps)


def nearness(data: dict[str, Any]) -> str:
    """PSNR to 1000 steps, a line each solver and spacing."""
    found = {_split(key): value for key, value in data["nearness"].items()}
    names, steps = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    lines = ["| solver, spacing | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for name in names:
        cells = [found[name, count].get("psnr_db") for count in steps]
        shown = ["refused" if c is None else f"{c:.1f}" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(
        [
            *lines,
            f"\nPSNR in dB of {data['images']} images in FP32 to {data['truth_steps']} DDIM steps of the same noise, by number "
            f"of steps, on one {data['machine']['gpu']}. Refused: the sequence repeats a timestep.",
        ]
    )


def quality(data: dict[str, Any]) -> str:
    """FD-CIFAR and time of an image, a line for each number of steps."""
    found = {_split(key): value for key, value in data["quality"].items()}
    names, steps = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
    lines = ["| steps | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for count in steps:
        cells = [found.get((name, count)) for name in names]
        shown = ["" if c is None else f"{c['fd_cifar']:.3f} ({c['microseconds_an_image']:.0f})" for c in cells]
        lines.append(f"| {count} | " + " | ".join(shown) + " |")
    return "\n".join(
        [
            *lines,
            f"\nFD-CIFAR of {data['fd_images']} images to the 50,000 training images (microseconds an image, with warm-up "
            f"passes and transfers), on one {data['machine']['gpu']}. Empty: refused, or not run.",
        ]
    )


def grids(data: dict[str, Any]) -> str:
    """PSNR by activation bits and kind of grid."""
    found = data["bits"]
    alone = {key.partition(",")[0]: value for key, value in found.items() if key.endswith("weights alone")}
    widths = sorted({int(key.rpartition(" A")[2]) for key in found if " A" in key}, reverse=True)
    lines = ["| | " + " | ".join(f"A{w}" for w in widths) + " |", "|---|" + "---|" * len(widths)]
    for name in dict.fromkeys(key.rpartition(" A")[0] for key in found if " A" in key):
        cells = [found.get(f"{name} A{w}") for w in widths]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1f}" for c in cells) + " |")
    weights = "; ".join(f"{count}: {value:.1f} dB" for count, value in alone.items())
    return "\n".join(
        [
            *lines,
            f"\nPSNR in dB of {data['images']} images to FP32 with the same steps, W8 to nearest, simulated on one "
            f"{data['machine']['gpu']}. Weights alone, {weights}.",
        ]
    )
