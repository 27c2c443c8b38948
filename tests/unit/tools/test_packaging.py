"""What is installed is what lies in the folders, and it imports where its optional parts are absent."""

import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from modiff_trt.tools.package.packing import modules

FOLDERS = ("core", "networks", "plugins", "runtime", "export", "engines", "tools")
MODULES = sorted(
    "modiff_trt." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
)
# These are the modules that exist for an optional package; everything else must import without it.
LAYER = "modiff_trt.plugins.modulated_conv"
KERNELS = ("conv", "edges", "groups", "parts", "pixels", "product", "quantize", "refresh", "residual")
FOR_PACKAGES = [f"{LAYER}.kernels.{name}" for name in KERNELS]
FOR_PACKAGES += [f"{LAYER}.libraries.cudnn_conv", "modiff_trt.tools.bench.profiling"]
OPTIONAL = ("tensorrt", "tensorrt_rtx", "triton", "cudnn", "cuda", "pycuda", "polygraphy", "pytorch_fid")
# core runs without torch, and so does the deployed sampler, with all that it packs.
TORCH_FREE = [module for module in MODULES if module.startswith("modiff_trt.core.")]
TORCH_FREE += [*modules(), "modiff_trt.tools.package.packing", "modiff_trt.export.calibration.trajectories"]
TORCH_FREE += [
    "modiff_trt.tools.evaluation.frechet",
    "modiff_trt.networks.unet2d",
    "modiff_trt.networks.operations",
    f"{LAYER}.tensorrt.library",
]


def without(blocked: tuple[str, ...], modules: list[str]) -> None:
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    code += "".join(f"import {module}\n" for module in modules)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr


def test_every_folder_with_code_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "modiff_trt." + ".".join(f.parent.relative_to(ROOT).parts) for name in FOLDERS for f in (ROOT / name).rglob("*.py")
    }
    assert found <= listed, found - listed


def test_every_module_imports_without_optional_packages():
    without(OPTIONAL, [module for module in MODULES if module not in FOR_PACKAGES])


def test_the_sampler_needs_no_torch():
    without((*OPTIONAL, "torch"), TORCH_FREE)


def test_no_module_is_named_after_a_package_it_imports():
    stems = {module.rsplit(".", 1)[1] for module in MODULES}
    assert not stems & {"onnx", "onnxruntime", "torch", "triton", "numpy", "inspect", "typer", "rich", "yaml", *OPTIONAL}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_stay_short(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.slow
def test_wheel_holds_the_demo_and_the_configurations(tmp_path):
    import zipfile

    source = tmp_path / "source"  # a used checkout has a build folder, from which a wheel would take files that are gone
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "checkpoints", "*.egg-info", "__pycache__")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build = [*command, "-w", str(tmp_path), str(source)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for wanted in (
        "calib_cache/demo/model.safetensors",
        "calib_cache/demo/modiff-w8a6.safetensors",
        "calib_cache/demo/modiff-w8a8.safetensors",
        "calib_cache/demo/modiff-w8a8-2m15.safetensors",
        "calib_cache/demo/thousand-steps.npz",
        "calib_cache/fd_cifar/classifier.safetensors",
        "configs/cifar10.yml",
        "configs/demo.yml",
        "configs/paper_cifar10.yml",
        "tools/cli/main.py",
    ):
        assert f"modiff_trt/{wanted}" in names
    assert (ROOT / "calib_cache/demo/model.safetensors").stat().st_size <= 6_000_000
