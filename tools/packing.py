"""`modiff-trt package`: one folder that samples by itself, with a launcher that runs like a binary."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from modiff_trt.export.errors import InputError
from modiff_trt.export.files import sha256, unwritable, write_signed
from modiff_trt.runtime.onnx_denoiser import load_onnx
from modiff_trt.runtime.plan import Plan, load_plan
from modiff_trt.runtime.schedule import requested_sequence
from modiff_trt.tools.deployed import ABOUT, NETWORK, PLAN

LAUNCHER = "modiff-sampler"
# Everything the launcher needs of this project; none of it imports torch.
MODULES = {
    "plugins": ("__init__", "tensorrt_library"),
    "plugins.modulated_conv": ("__init__", "device_code", "geometry", "trt_plugin"),
    "export": ("__init__", "config", "dither", "errors", "files", "grid", "manifest", "onnx_file", "rows", "start_state"),
    "runtime": (
        *(
            "__init__",
            "cores",
            "cuda_memory",
            "denoiser",
            "digest_list",
            "image_sets",
            "images",
            "noise",
            "onnx_denoiser",
            "pictures",
        ),
        *("plan", "sampler", "schedule", "trt_denoiser"),
    ),
    "tools": ("__init__", "deployed", "progress", "sampling", "stopping"),
}
REQUIREMENTS = ("numpy>=1.26", "onnx>=1.18", "onnxruntime>=1.22", "pillow>=10", "pyyaml>=6", "rich>=13", "safetensors>=0.5")
ENTRY = """import sys

def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):
    refuse("modiff-sampler needs Python 3.11 or later")
try:
    from modiff_trt.tools.deployed import main
except ModuleNotFoundError as error:
    refuse(f"the package {error.name} is missing; pip install -r requirements.txt (beside this program)")
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
sys.exit(main())
"""


def package(onnx: Path, out: Path, timesteps: int, skip_type: str, plan: Path | None = None) -> list[Path]:
    """Writes the folder `out` and returns its files; with `plan`, one built from `onnx`, it samples with TensorRT too.

    `timesteps` and `skip_type` are for float networks: quantized ones carry theirs. Raises InputError for a file that was not
    exported by this program, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; choose a new one")
    model = load_onnx(onnx)
    rows = model.calibrated_rows
    steps = rows.timesteps if rows is not None else requested_sequence(model.config.diffusion, timesteps, skip_type)
    engine = load_plan(plan) if plan is not None else None
    if engine is not None and engine.manifest["onnx_sha256"] != model.sha256:
        raise InputError(f"{plan} was not built from {onnx}; build it again")
    try:
        about = {"onnx_sha256": model.sha256, "timesteps": list(steps), "network": model.manifest}
        return _write(onnx, engine, out, about)
    except OSError as error:
        raise unwritable(out, error) from None


def _plan_files(plan: Plan) -> dict[str, Path]:
    """The files of a plan, by the names they get."""
    beside = {Path(PLAN).with_suffix(suffix).name: plan.path.with_suffix(suffix) for suffix in (".json", ".start.safetensors")}
    return {PLAN: plan.path} | beside


def _plan_requirements(plan: Plan) -> tuple[str, ...]:
    """A plan runs on the version of TensorRT that built it."""
    package = {"rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt-cu13"}[plan.manifest["runtime"]]
    return "cuda-python>=13", f"{package}=={plan.manifest['version']}"


def _write(onnx: Path, plan: Plan | None, out: Path, about: dict[str, Any]) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder, source = Path(temporary) / "folder", Path(temporary) / "source"
        folder.mkdir()
        shutil.copyfile(onnx, folder / NETWORK)
        for name, source_file in _plan_files(plan).items() if plan is not None else ():
            shutil.copyfile(source_file, folder / name)
        _copy_modules(source)
        zipapp.create_archive(source, folder / LAUNCHER, interpreter="/usr/bin/env python3", compressed=True)
        (folder / LAUNCHER).chmod(0o755)
        requirements = REQUIREMENTS + (_plan_requirements(plan) if plan is not None else ())
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        if sha256(folder / NETWORK) != about["onnx_sha256"]:
            raise InputError(f"{onnx} changed while it was copied; run the command again")
        write_signed(folder / ABOUT, about)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return sorted(out.iterdir())


def _copy_modules(source: Path) -> None:
    for part, names in MODULES.items():
        folder = source / "modiff_trt" / part.replace(".", "/")
        folder.mkdir(parents=True)
        for name in names:
            with as_file(files(f"modiff_trt.{part}").joinpath(f"{name}.py")) as path:
                shutil.copyfile(path, folder / f"{name}.py")
    (source / "__main__.py").write_text(ENTRY, encoding="utf-8")
