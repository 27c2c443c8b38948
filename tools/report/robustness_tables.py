"""The tables of what interruptions, large jobs, altered files and busy processors do: `docs/robustness.md`."""

from __future__ import annotations

from typing import Any


def kills(data: dict[str, Any]) -> str:
    """Sampling that is killed again and again, and then runs to its end."""
    counts = " | ".join(str(data[key]) for key in ("kills", "shards", "lost", "doubled", "changed"))
    what = data["what"][0].upper() + data["what"][1:]
    return f"| kills | shards at the end | lost | doubled | changed |\n|---|---|---|---|---|\n| {counts} |\n\n{what}."


def memory(data: dict[str, Any]) -> str:
    """Peak host memory by number of images."""
    lines = ["| | images | peak host memory, MB |", "|---|---|---|"]
    lines += [f"| {stage} | {int(n):,} | {mb:.0f} |" for stage in ("sample", "evaluate") for n, mb in data[stage].items()]
    return "\n".join([*lines, f"\nThe demo model and FD-CIFAR, {data['machine']['cores']} CPU cores."])


def fuzz(data: dict[str, Any]) -> str:
    """How commands end whose input was altered, by kind of input."""
    names = [name for name in next(iter(data["table"].values())) if name != "trials"]
    lines = ["| altered | trials | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for kind, counts in {**data["table"], "**all**": data["total"]}.items():
        lines.append(f"| {kind} | {counts['trials']} | " + " | ".join(str(counts[name]) for name in names) + " |")
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("torch", "onnxruntime", "numpy"))
    return "\n".join([*lines, f"\nSeed {data['seed']}; Python {data['versions']['python']}, {versions}."])


def load(data: dict[str, Any]) -> str:
    """Seconds an image beside busy processes."""
    lines = [
        "| busy processes, batch | native, s | onnxruntime, s | native loses | onnxruntime loses | ratio |",
        "|---" * 6 + "|",
    ]
    for key, seconds in data["seconds an image"].items():
        lost = data["times as long as alone"][key]
        cells = [seconds["native"], seconds["onnxruntime"], lost["native"], lost["onnxruntime"], lost["ratio"]]
        lines.append(f"| {key} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    machine = data["machine"]
    vnni = "with" if machine["vnni"] else "without"
    what = data["what"][0].upper() + data["what"][1:]
    return "\n".join([*lines, f"\n{what}; {machine['cores']} cores {vnni} VNNI, torch {data['versions']['torch']}."])
