"""`modiff-trt package`: one folder that samples by itself, with a launcher that runs like a binary."""

from __future__ import annotations

import ast
import shutil
import tempfile
import zipapp
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from modiff_trt.core.config import stored_config
from modiff_trt.core.context import context_arrays
from modiff_trt.core.errors import InputError
from modiff_trt.core.files import sha256, unwritable, write_signed
from modiff_trt.core.solvers import solver_from_dict
from modiff_trt.runtime.backends.onnx_denoiser import load_onnx
from modiff_trt.runtime.backends.plan import Plan, load_plan
from modiff_trt.runtime.backends.registry.steps import AS_IT_IS, SolverOptions, exported_sequence
from modiff_trt.tools.package.deployed import ABOUT, NETWORK, PLAN

LAUNCHER = "modiff-sampler"
PROGRAM = "modiff_trt.tools.package.deployed"
REQUIREMENTS = ("numpy>=1.26", "onnx>=1.18", "onnxruntime>=1.22", "pillow>=10", "pyyaml>=6", "rich>=13", "safetensors>=0.5")
ENTRY = """import sys

def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):
    refuse("modiff-sampler needs Python 3.11 or later")
try:
    from modiff_trt.tools.package.deployed import main
except ModuleNotFoundError as error:
    refuse(f"the package {error.name} is missing; pip install -r requirements.txt (beside this program)")
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
sys.exit(main())
"""


def package(
    onnx: Path, out: Path, *, timesteps: int | None = None, solver: SolverOptions = AS_IT_IS, plan: Path | None = None
) -> list[Path]:
    """Writes the folder `out` and returns its files; with `plan`, one built from `onnx`, it samples with TensorRT too.

    `timesteps` and `solver` are for float networks. Raises InputError for a file that was not exported by this program, options
    that are not what a quantized one was calibrated on, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; choose a new one")
    model = load_onnx(onnx)
    if model.outside:
        raise InputError(f"{onnx} keeps its weights in a file of their own; a sampler packs one ONNX file")
    steps, found = exported_sequence(
        model.config, model.manifest, model.calibrated_rows, source=onnx, timesteps=timesteps, solver=solver
    )
    engine = load_plan(plan) if plan is not None else None
    if engine is not None and engine.manifest["onnx_sha256"] != model.sha256:
        raise InputError(f"{plan} was not built from {onnx}; build it again")
    try:
        about = {"onnx_sha256": model.sha256, "timesteps": list(steps), "solver": found.to_dict(), "network": model.manifest}
        return _write(onnx, engine, out, about=about)
    except OSError as error:
        raise unwritable(out, error) from None


def _plan_files(plan: Plan) -> dict[str, Path]:
    """The files of a plan, by the names they get."""
    beside = {Path(PLAN).with_suffix(suffix).name: plan.path.with_suffix(suffix) for suffix in (".json", ".start.safetensors")}
    return {PLAN: plan.path} | beside


def _plan_requirements(plan: Plan) -> tuple[str, ...]:
    """A plan runs on the version of TensorRT that built it; a version-compatible one on the lean runtime alone."""
    package = {"rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt-cu13"}[plan.manifest["runtime"]]
    if plan.manifest["options"]["version_compatible"]:
        package = "tensorrt-lean-cu13"
    return "cuda-python>=13", f"{package}=={plan.manifest['version']}"


def pinned() -> tuple[str, ...]:
    """The requirements, at the versions that are installed here, with which the network was read."""
    found = []
    for requirement in REQUIREMENTS:
        try:
            name = requirement.split(">=")[0]
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # onnxruntime-gpu in the place of onnxruntime
            found.append(requirement)
    return tuple(found)


def _readme(name: str, about: dict[str, Any], plan: Plan | None) -> str:
    """What the folder is, and how to use it."""
    network, solver = about["network"], solver_from_dict(about["solver"], name)
    modes = [layer["mode"] for layer in network["layers"].values()]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes)) or "in float"
    config = stored_config(network["config"], name)
    arrays = ", ".join(f"`{array}`" for array in context_arrays(config.architecture))
    command = f"./{LAUNCHER} -n 64 --seed 0" + (" --context FILE.npz" if arrays else "")
    place = "latents.npz" if config.latent else "images"
    on_gpu = f"    {command} --device cuda -o {place}   # with the plan, on the GPU it was built for"
    lines = [
        f"# {name}",
        "",
        f"A diffusion network that samples by itself, without torch: {len(modes)} layers ({counts}), {network['dtype']}.",
        f"Steps: `{solver.describe(len(about['timesteps']))}`.",
        "",
        "    pip install -r requirements.txt      # Python 3.11 or later; the versions that it was packed with",
        f"    {command} -o {place}",
        *([on_gpu] if plan is not None else []),
        "",
        *([f"The context has {arrays}, by diffusers' names; `--guidance G` takes `negative_...` too.", ""] if arrays else []),
        f"`./{LAUNCHER} --help` lists the options. Image i of a seed is the same whatever the number of images.",
        f"Made from a checkpoint with SHA-256 `{network['checkpoint_sha256']}`.",
        "",
    ]
    return "\n".join(lines)


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
        requirements = pinned() + (_plan_requirements(plan) if plan is not None else ())
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(out.name, about, plan), encoding="utf-8")
        if sha256(folder / NETWORK) != about["onnx_sha256"]:
            raise InputError(f"{onnx} changed while it was copied; run the command again")
        write_signed(folder / ABOUT, about)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    return sorted(out.iterdir())


def modules() -> dict[str, str]:
    """The program's modules and packages by name, with their sources: what it imports, wherever it does, and what those import
    at their top. What a module imports inside a function it needs for other work than sampling."""
    found: dict[str, str] = {}
    waiting = [PROGRAM]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = _source(name)
        waiting += _packages(name)
        tree = ast.parse(found[name])
        nodes = ast.walk(tree) if name == PROGRAM else tree.body
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("modiff_trt."):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [n for n in inside if _file(n) is not None] or [node.module]
    return found


def _packages(name: str) -> list[str]:
    """The packages that a module lies in, but for the first, which has no file."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(2, len(parts))]


def _file(name: str) -> Traversable | None:
    """The source of a module or a package."""
    *parents, last = name.split(".")[2:]
    folder = files(".".join(name.split(".")[:2]) if parents or last else name)
    for parent in parents:
        folder = folder.joinpath(parent)
    for place in (folder.joinpath(f"{last}.py"), folder.joinpath(last, "__init__.py")):
        if place.is_file():
            return place
    return None


def _source(name: str) -> str:
    if name.count(".") == 1:
        return files(name).joinpath("__init__.py").read_text(encoding="utf-8")
    place = _file(name)
    assert place is not None, name
    return place.read_text(encoding="utf-8")


def _copy_modules(source: Path) -> None:
    found = modules()
    for name, text in found.items():
        is_package = any(other.startswith(f"{name}.") for other in found)
        file = source / name.replace(".", "/") / "__init__.py" if is_package else source / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (source / "__main__.py").write_text(ENTRY, encoding="utf-8")
