"""Where a result came from: every file under results/ says it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("modiff-trt", "torch", "onnxruntime", "numpy")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Command, commit (None outside a checkout; with `+changes` where tracked files differ from it), versions and machine."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(device),
    }


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most: of the GPU's memory, or with `cpu` of the machine's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine["vnni"] = _has_vnni()
    if device == "cuda":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _has_vnni() -> bool | None:
    """Whether the CPU has an INT8 dot product; native INT8 on a CPU is much slower without it. None: not known."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git, here = ["git", "-C", str(Path(__file__).parent)], Path(__file__).name
    try:
        # An installed package may lie inside another project's checkout.
        subprocess.run([*git, "ls-files", "--error-unmatch", here], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode == 0
        return head if clean else f"{head}+changes"
    except (OSError, subprocess.CalledProcessError):
        return None
