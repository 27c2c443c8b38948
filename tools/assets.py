"""Where the shipped demo model, its scales and the configurations lie, installed or in a checkout."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from modiff_trt.core.errors import InputError


def config_path(name: str) -> Path:
    return _path("modiff_trt.configs", name)


def demo_path(name: str) -> Path:
    return _path("modiff_trt.calib_cache", f"demo/{name}")


def classifier_path() -> Path:
    return _path("modiff_trt.calib_cache", "fd_cifar/classifier.safetensors")


def _path(package: str, name: str) -> Path:
    with as_file(files(package).joinpath(name)) as path:
        if not path.exists():
            raise InputError(f"{name} is missing from this installation; install modiff-trt again")
        return path
