"""Engines with the plugin, built by TensorRT-RTX in processes of their own: Triton cannot compile where it interprets."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import alone
from conftest import ROOT, random_checkpoint

from modiff_trt.core.errors import InputError
from modiff_trt.core.files import write_signed
from modiff_trt.core.scales import save_scales
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.plugins.modulated_conv.geometry import Variant
from modiff_trt.plugins.modulated_conv.kernels.device_code import DeviceCode, pack, unpack
from modiff_trt.runtime.backends.plan import load_plan

pytestmark = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("tensorrt_rtx") is None, reason="pip install 'modiff-trt[rtx]'"
)


def build(onnx, out, target, *more):
    result = alone("build", "--onnx", onnx, "--out", out, "--runtime", "rtx", "--plugin", "--target", target, *more)
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.plan"))


def check(manifest):
    """Modulated layers are plugins, quantized layers without state INT8 convolutions; nothing fell back."""
    report, modulated = manifest["report"], manifest["network"]["modulated"]
    plugins = {layer["name"] for layer in report["table"] if layer["kind"] == "PluginV3"}
    assert manifest["plugin"] and plugins == set(modulated) and report["plugin_layers"] == len(modulated)
    assert report["int8_convolutions"] == report["quantized_layers"] - len(modulated)
    assert report["fell_back"] == []


@pytest.fixture(scope="module")
def onnx_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    save_onnx(path, build_onnx(tiny.network, tiny.checkpoint, tiny.scales(act_bits=6), "fp16", "x"))
    return path


@pytest.fixture(scope="module")
def plan_file(onnx_file, tmp_path_factory):
    return build(onnx_file, tmp_path_factory.mktemp("plans"), "sm89")


@pytest.mark.parametrize(("target", "batches"), [("sm80", (1, 4, 16)), ("sm86", (2, 2, 2)), ("sm120", (1, 1, 64))])
def test_every_modulated_layer_is_the_plugin(tiny, onnx_file, tmp_path, target, batches):
    sizes = [f for name, n in zip(("min", "opt", "max"), batches, strict=True) for f in (f"--{name}-batch", n)]
    manifest = json.loads(build(onnx_file, tmp_path, target, *sizes).with_suffix(".json").read_text())
    report = manifest["report"]
    check(manifest)
    assert report["quantized_layers"] == len(tiny.network.layers)
    assert {t["kind"] for t in report["table"]} >= {"PluginV3", "kgen"} and report["generated_kernels_a_quantized_layer"] > 0


def test_a_plan_reads_back_with_the_state_it_begins_from(tiny, onnx_file, plan_file):
    plan = load_plan(plan_file)
    assert plan.batches == (1, 16) and len(plan.calibrated_rows) > 6 and plan.manifest["target"] == "sm89"
    from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx

    reference = OnnxDenoiser(load_onnx(onnx_file))
    reference.reset(1)
    assert set(plan.start) == set(reference.state)
    for name, array in reference.state.items():
        np.testing.assert_array_equal(plan.start[name], array[0])


def test_the_kernels_travel_in_the_plan(plan_file):
    """Machine code for the target, once for each layer's shape and every tile that the profile's batches need."""
    content = plan_file.read_bytes()
    assert content.count(b"conv-fp16-") > 0 and content.count(b"residual-fp16-") > 0
    codes = {Variant("conv", "fp16", (("C", 32),), (16, 32, 32, 5, 2)): DeviceCode("conv_kernel", 64, 1024, 2, b"code")}
    assert unpack(pack(codes)) == codes


PTX = """
import sys
from pathlib import Path
from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.networks.unet2d import trace
from modiff_trt.plugins.modulated_conv.kernels.device_code import compile_variant
from modiff_trt.plugins.modulated_conv.geometry import Geometry, conv_variant
variants = set()
for spec in trace(load_config(Path(sys.argv[1]))).layers:
    for batch in (1, 4, 64):
        geometry = Geometry(batch, *spec.in_shape, spec.out_shape[0], spec.kernel, spec.stride, spec.padding)
        variants.add(conv_variant(geometry, "fp16"))
for variant in variants:
    compile_variant(variant, 90)
print(len(variants))
"""


@pytest.mark.slow
def test_no_kernel_of_the_cifar10_network_has_packed_16_bit_additions():
    """ptxas loses the constant of such an addition, and some pixels read their neighbour: seen on a GPU."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    call = [sys.executable, "-c", PTX, str(ROOT / "configs/cifar10.yml")]
    result = subprocess.run(call, capture_output=True, text=True, check=False, env=clean)
    assert result.returncode == 0 and int(result.stdout) > 30, result.stderr[-500:]


def test_plans_that_do_not_belong_are_refused(plan_file, tmp_path):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for part in plan_file.parent.iterdir():
            (folder / part.name).write_bytes(part.read_bytes())
        return folder / plan_file.name

    with pytest.raises(InputError, match="does not exist"):
        load_plan(tmp_path / "no.plan")
    altered = copy("altered")
    altered.write_bytes(plan_file.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated or altered"):
        load_plan(altered)
    lost = copy("lost")
    lost.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="plan manifest"):
        load_plan(lost)
    cut = copy("cut")
    manifest = json.loads(cut.with_suffix(".json").read_text())
    del manifest["network"]["timesteps"][0]
    cut.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was altered"):
        load_plan(cut)
    write_signed(cut.with_suffix(".json"), manifest)
    with pytest.raises(InputError, match="damaged"):
        load_plan(cut)
    other = copy("other")
    manifest = json.loads(plan_file.with_suffix(".json").read_text()) | {"onnx_sha256": "0" * 64}
    write_signed(other.with_suffix(".json"), manifest)
    with pytest.raises(InputError, match="another network"):
        load_plan(other)


def test_the_wrong_version_and_the_wrong_gpu_are_named(plan_file):
    from dataclasses import replace

    from modiff_trt.plugins.modulated_conv.tensorrt.library import Library, open_library
    from modiff_trt.runtime.backends.trt_denoiser import check_plan, check_plan_target

    plan = load_plan(plan_file)
    check_plan(plan, open_library("rtx"))
    with pytest.raises(InputError, match="build it again"):
        check_plan(replace(plan, manifest=plan.manifest | {"version": "0.1"}), open_library("rtx"))
    with pytest.raises(InputError, match="built for sm89, and NVIDIA H200 is sm90"):
        check_plan_target(plan, "NVIDIA H200", (9, 0))
    assert isinstance(open_library("rtx"), Library)


def test_without_a_gpu_a_plan_fails_in_one_line(plan_file, onnx_file, tmp_path):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    for arguments in (
        ("sample", "--backend", "trt", "--plan", plan_file, "--num-samples", 1, "--out", tmp_path / "x.npz"),
        ("verify", "--onnx", onnx_file, "--plan", plan_file),
        ("build", "--onnx", onnx_file, "--runtime", "rtx", "--out", tmp_path / "plans"),
    ):
        result = alone(*arguments)
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert "GPU" in result.stderr
    assert not (tmp_path / "x.npz").exists() and not list(tmp_path.glob("plans/*"))


def test_what_the_plugin_cannot_compute_is_refused(tiny, onnx_file, tmp_path):
    path = tmp_path / "ltq.onnx"
    save_onnx(path, build_onnx(tiny.network, tiny.checkpoint, tiny.scales(granularity="tensor"), "fp16", "x"))
    result = alone("build", "--onnx", path, "--runtime", "rtx", "--plugin", "--target", "sm89", "--out", tmp_path)
    assert result.returncode == 2 and "--no-plugin" in result.stderr
    result = alone("build", "--onnx", onnx_file, "--runtime", "rtx", "--plugin", "--target", "sm75", "--out", tmp_path)
    assert result.returncode == 2 and "compute capability 8.0" in result.stderr and not list(tmp_path.glob("*.plan"))


@pytest.mark.slow
def test_the_full_cifar10_network_with_the_plugin(tmp_path):
    from conftest import make_case

    from modiff_trt.core.ddim_yaml import load_config
    from modiff_trt.export.calibration.ranges import measure_ranges
    from modiff_trt.export.calibration.static import Recipe, make_scales
    from modiff_trt.networks.unet2d import trace

    network = trace(load_config(ROOT / "configs/cifar10.yml"))
    case = make_case(network, random_checkpoint(network.config), 2, 1, 2)
    ranges = measure_ranges(network, case.checkpoint.params, case.trajectories, 1)
    scales = make_scales(network, case.checkpoint, case.trajectories, ranges, Recipe())
    save_scales(tmp_path / "s.safetensors", scales)
    save_onnx(tmp_path / "m.onnx", build_onnx(network, case.checkpoint, scales, "fp16", "x"))
    plan = build(tmp_path / "m.onnx", tmp_path / "plans", "sm120", "--min-batch", 8, "--opt-batch", 8, "--max-batch", 8)
    manifest = json.loads(plan.with_suffix(".json").read_text())
    check(manifest)
    assert manifest["report"]["quantized_layers"] == 77 and manifest["report"]["plugin_layers"] > 40


def test_a_sampler_with_a_plan(onnx_file, plan_file, tmp_path):
    """On a CPU it samples with onnxruntime; asked for a GPU that is not there, it says so in one line."""
    result = alone("package", "--onnx", onnx_file, "--plan", plan_file, "--out", tmp_path / "sampler")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "sampler").iterdir()}
    assert {"network.onnx", "network.plan", "network.json", "network.start.safetensors"} <= names
    assert "cuda-python" in (tmp_path / "sampler/requirements.txt").read_text()
    launcher = [sys.executable, str(tmp_path / "sampler/modiff-sampler"), "-n", "1"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    ran = subprocess.run([*launcher, "-o", str(tmp_path / "a.npz")], capture_output=True, text=True, env=clean, check=False)
    assert ran.returncode == 0 and (tmp_path / "a.npz").exists(), ran.stderr
    if not os.path.exists("/dev/nvidia0"):
        asked = [*launcher, "--device", "cuda", "-o", str(tmp_path / "b.npz")]
        ran = subprocess.run(asked, capture_output=True, text=True, env=clean, check=False)
        assert ran.returncode == 2 and "GPU" in ran.stderr and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    with pytest.raises(InputError, match="was not built from"):
        from modiff_trt.tools.package.packing import package

        other = tmp_path / "other.onnx"
        other.write_bytes(onnx_file.read_bytes())
        import onnx

        model = onnx.load(other)
        model.doc_string = "another file"
        onnx.save(model, other)
        package(other, tmp_path / "none", plan=plan_file)
