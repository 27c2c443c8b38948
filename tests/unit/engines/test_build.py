"""Real engines, built by TensorRT-RTX for GPUs that need not be there."""

import json
import subprocess
import sys

import onnx
import pytest
from command import run
from conftest import ROOT, random_checkpoint

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.engines.build import BuildOptions, _profile, build_plan
from modiff_trt.engines.onnx_network import OnnxNetwork, load_network
from modiff_trt.engines.plan_files import build_into, plan_path
from modiff_trt.engines.report import read_layers, summarize
from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.export.calibration.ranges import measure_ranges
from modiff_trt.export.calibration.static import Recipe, make_scales
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.unet2d import trace
from modiff_trt.plugins.modulated_conv.tensorrt.library import builder, open_library
from modiff_trt.runtime.backends.registry.options import load_model


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    return open_library("rtx")


def exported(case, scales, path, dtype="fp16"):
    save_onnx(path, build_onnx(case.network, case.checkpoint, scales, dtype, "x"))
    return load_network(path)


def report_of(rtx, network, options):
    built = build_plan(rtx, network, options)
    quantized = [name for name, entry in network.manifest["layers"].items() if entry["mode"] != "float"]
    return built, summarize(read_layers(built.log), quantized)


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
def test_every_modulated_convolution_is_int8_on_every_target(rtx, tiny, tmp_path, target):
    network = exported(tiny, tiny.scales(), tmp_path / "m.onnx")
    built, report = report_of(rtx, network, BuildOptions(target=target))
    assert len(built.plan) > 100_000
    assert report["quantized_layers"] == len(tiny.network.layers)
    assert report["fell_back"] == [] and report["int8_convolutions"] == report["convolutions"]


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [({"split": True}, "fp16"), ({"granularity": "tensor"}, "fp16"), ({"method": "qdiff"}, "fp16"), ({}, "fp32")],
)
def test_every_method_that_is_exported_builds_in_int8(rtx, tiny, tmp_path, recipe, dtype):
    network = exported(tiny, tiny.scales(**recipe), tmp_path / "m.onnx", dtype)
    _, report = report_of(rtx, network, BuildOptions(target="sm89", max_batch=64))
    assert report["fell_back"] == []


def test_layers_in_float_are_told_from_those_that_fell_back(rtx, tiny, tmp_path):
    scales = with_modes(tiny.scales(), {"conv_in": "float", "mid_block.attentions.0.to_qkv": "float"})
    _, report = report_of(rtx, exported(tiny, scales, tmp_path / "m.onnx"), BuildOptions(target="sm89"))
    assert report["quantized_layers"] == len(tiny.network.layers) - 2
    assert report["fell_back"] == [] and report["int8_convolutions"] == report["quantized_layers"]


@pytest.mark.parametrize("folder", ["demo", "demo_classes"])
def test_attention_is_one_kernel(rtx, tmp_path, folder):
    """Of one head, of several, and to prompts: the products and softmax, whose scores are then never written."""
    place = ROOT / "calib_cache" / folder
    of_model = {"model": place} if folder == "demo_classes" else {}
    files = (None, None) if of_model else (ROOT / "configs/demo.yml", place / "model.safetensors")
    network, checkpoint = load_model(*files, None, **of_model)
    save_onnx(tmp_path / "m.onnx", build_onnx(network, checkpoint, None, "fp16", None))
    attentions = sum(node.op_type == "Softmax" for node in onnx.load(tmp_path / "m.onnx").graph.node)
    _, report = report_of(rtx, load_network(tmp_path / "m.onnx"), BuildOptions(target="sm89", tokens=4))
    fused = [layer for layer in report["table"] if "mha" in layer["tactic"]]
    assert len(fused) == attentions > 0
    assert "gemm" not in report["kinds"] or folder == "demo_classes"  # keys and values of all prompts are one product


@pytest.mark.slow
def test_a_static_batch_and_the_full_cifar10_network(rtx, tmp_path):
    """Random weights, one calibration image: enough to build every shape of the published configuration."""
    network = trace(load_config(ROOT / "configs/cifar10.yml"))
    from conftest import Case, make_case

    case: Case = make_case(network, random_checkpoint(network.config), 2, 1, 2)
    ranges = measure_ranges(network, case.checkpoint.params, case.trajectories, 1)
    scales = make_scales(network, case.checkpoint, case.trajectories, ranges, Recipe())
    path, manifest = build_into(
        tmp_path, "cifar10", rtx, exported(case, scales, tmp_path / "m.onnx"), BuildOptions(8, 8, 8, target="sm120")
    )
    assert path == plan_path(tmp_path, "cifar10", rtx, "sm120") and path.stat().st_size > 40_000_000
    report = json.loads(path.with_suffix(".json").read_text())["report"]
    assert report["fell_back"] == [] and report["int8_convolutions"] == 77
    assert json.loads(json.dumps(manifest["report"])) == report and 1 < report["generated_kernels_a_quantized_layer"] < 4


def test_a_plan_is_written_whole_with_what_it_was_made_from(rtx, tiny, tmp_path):
    network = exported(tiny, tiny.scales(), tmp_path / "m.onnx")
    path, manifest = build_into(tmp_path / "plans", "tiny", rtx, network, BuildOptions(target="sm89"))
    assert {p.suffix for p in path.parent.iterdir()} == {".plan", ".json", ".safetensors"}
    assert manifest["onnx_sha256"] == network.sha256 and manifest["version"] == rtx.version
    assert manifest["network"]["checkpoint_sha256"] == tiny.checkpoint.sha256


def test_bad_input_is_refused_in_one_line(rtx, tiny, tmp_path):
    file = tmp_path / "m.onnx"
    network = exported(tiny, tiny.scales(), file)
    with pytest.raises(InputError, match="--target must be one of"):
        build_plan(rtx, network, BuildOptions(target="sm90"))
    with pytest.raises(InputError, match="must ascend"):
        BuildOptions(4, 2, 8)
    with pytest.raises(InputError, match="--runtime must be"):
        builder("cuda")
    with pytest.raises(InputError, match="builds nothing"):
        builder("lean")
    with pytest.raises(InputError, match="does not exist"):
        load_network(tmp_path / "missing.onnx")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot be loaded|has no manifest"):
        load_network(cut)
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, cut)
    with pytest.raises(InputError, match="not written by"):
        load_network(cut)


def test_a_package_that_was_imported_before_is_one_line():
    """Its parser would end the process at the first plugin."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    library = "modiff_trt.plugins.modulated_conv.tensorrt.library"
    code = f"import tensorrt_rtx\nfrom {library} import builder, check_parser\ncheck_parser(builder('rtx'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "import modiff_trt first" in done.stderr


def test_stock_tensorrt_that_is_not_there_is_named():
    if __import__("importlib.util").util.find_spec("tensorrt") is not None:
        pytest.skip("stock TensorRT is installed")
    with pytest.raises(InputError, match=r"\[trt\]"):
        open_library("tensorrt")


def test_every_name_that_is_used_exists_in_the_bindings(rtx):
    """What the code takes from TensorRT; names that only stock TensorRT has stand behind `is_rtx`."""
    import re

    files = [*(ROOT / "engines").glob("*.py"), *(ROOT / "plugins").rglob("*.py"), ROOT / "runtime/backends/trt_denoiser.py"]
    used = {name for file in files for name in re.findall(r"\btrt\.([A-Za-z]\w*)", file.read_text())}
    assert len(used) > 20
    assert [name for name in sorted(used) if not hasattr(rtx.trt, name)] == []


def test_a_profile_spans_the_batches_and_fixes_the_tokens(rtx):
    inputs = {"x": (-1, 4, 8, 8), "encoder_hidden_states": (-1, -1, 24), "row_scale": (5,)}
    network = OnnxNetwork(onnx.ModelProto(), b"", {}, sha256="", inputs=inputs, plugin=False)
    builder = rtx.trt.Builder(rtx.trt.Logger(rtx.trt.Logger.ERROR))
    profile = _profile(builder, network, BuildOptions(1, 2, 6, tokens=7, target="sm89"))
    assert [tuple(shape) for shape in profile.get_shape("encoder_hidden_states")] == [(n, 7, 24) for n in (1, 2, 6)]
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(n, 4, 8, 8) for n in (1, 2, 6)]


def test_a_dry_run_checks_what_builds_before_there_is_a_file(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    job = ["build", "--onnx", tmp_path / "later.onnx", "--runtime", "rtx", "--dry-run"]
    assert run(*job, "--target", "sm89") == 0
    assert "would build" in capsys.readouterr().out and not any(tmp_path.iterdir())
    assert run(*job, "--target", "sm1") == 2
    assert "--target must be one of" in capsys.readouterr().err
