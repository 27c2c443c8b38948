import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, random_checkpoint, tiny_config, with_low_zero_points
from onnx_lockstep import all_modulated, passes

from modiff_trt.core.errors import InputError
from modiff_trt.core.grid import grid_ends
from modiff_trt.core.manifest import MANIFEST_KEY, decode_array
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.networks.binding import times
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.modulated import integer_product, quantize_layers
from modiff_trt.networks.torch_ops import run_unet
from modiff_trt.networks.unet2d import trace
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx
from modiff_trt.runtime.backends.registry.options import load_model
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser
from modiff_trt.runtime.images.folders import psnr


def session_of(model, tmp_path):
    save_onnx(tmp_path / "m.onnx", model)
    return ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("bits", "split"), [(8, False), (6, True), (3, False)])
def test_modulated_network_equals_the_simulation(tiny, tmp_path, bits, split):
    scales = all_modulated(tiny, act_bits=bits, split=split)
    assert any(layer.skip_ratio != 1 for layer in scales.layers.values()) == split
    session = session_of(build_onnx(tiny.network, tiny.checkpoint, scales, "fp32", "x"), tmp_path)
    for error, lockstep in passes(tiny, scales, session, range(3)):
        assert error < 1e-5
        assert lockstep.moved <= 1e-3 * lockstep.elements and lockstep.from_edge < 1e-2


def test_demo_model_agrees_in_each_of_the_first_three_passes(demo, tmp_path):
    for bits in (8, 6):
        scales = demo.scales(act_bits=bits)
        session = session_of(build_onnx(demo.network, demo.checkpoint, scales, "fp32", "x"), tmp_path)
        for error, lockstep in passes(demo, scales, session, range(3), batch=2):
            assert error < 1e-4
            assert lockstep.moved <= 1e-3 * lockstep.elements and lockstep.from_edge < 1e-2


@pytest.mark.parametrize(
    ("bits", "unpadded", "moving"), [(8, False, False), (6, False, True), (3, False, False), (8, True, False), (8, True, True)]
)
def test_stateless_network_equals_the_simulation(tiny, tmp_path, bits, unpadded, moving):
    """With the integers that onnxruntime found, which may differ from the simulation's on an edge of a grid alone. A low zero
    point is also tried in layers without padding."""
    scales = replace(tiny.scales(method="qdiff", act_bits=bits), moving_grids=moving)
    if unpadded:
        scales = with_low_zero_points(scales, [spec.name for spec in tiny.network.layers if not any(spec.padding)])
    model = build_onnx(tiny.network, tiny.checkpoint, scales, "fp32", "x")
    for name in scales.layers:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.q", onnx.TensorProto.INT8, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(3, *tiny.network.config.input_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(tiny.timesteps[1:4])
    outputs = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"x": x.numpy(), "t": t.numpy()}), strict=True)
    )
    layers = quantize_layers(tiny.network, tiny.checkpoint.params, scales)
    places = torch.tensor([[1], [2], [3]])  # of t among the timesteps
    moved = []

    def layer(spec, value):
        quantized, q = layers[spec.name], torch.from_numpy(outputs[f"{spec.name}.q"]).float()
        q = q - quantized.zero_point  # in the file it is subtracted before
        shifts = ((40503 * places + 49471 * torch.arange(value.shape[1])) % 2**16) / 2**16 - 0.5
        shifts = moving * shifts
        position = (value / quantized.scale + shifts[:, :, None, None]).clamp(*grid_ends(bits, quantized.zero_point))
        assert (position - q).abs().max() < 0.5 + 1e-2
        moved.append(float((q != position.round()).float().mean()))
        back = quantized.scale * quantized.weight_scale * (shifts @ quantized.weight.sum((2, 3)).T)
        return (quantized.bias - back)[:, :, None, None] + quantized.scale * integer_product(quantized, q)

    expected = run_unet(tiny.network, tiny.checkpoint.params, x, times(tiny.network, tiny.checkpoint.params, t), layer)
    assert len(moved) == len(scales.layers) and max(moved) < 1e-3
    padded = {spec.name for spec in tiny.network.layers if any(spec.padding)}
    assert {n for n, layer in scales.layers.items() if layer.zero_point} & padded
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name in zeros}
    assert all((values[name] == 0).all() for name in zeros)  # as TensorRT requires
    assert np.linalg.norm(outputs["eps"] - expected.numpy()) / np.linalg.norm(expected.numpy()) < 1e-5


@pytest.mark.parametrize("method", ["modiff", "qdiff"])
def test_ltq_is_exported_with_its_run_time_scale_outside_the_integer_product(tiny, tmp_path, method):
    scales = tiny.scales(method=method, granularity="tensor")
    save_onnx(tmp_path / "ltq.onnx", build_onnx(tiny.network, tiny.checkpoint, scales, "fp32", "x"))
    denoiser = OnnxDenoiser(load_onnx(tmp_path / "ltq.onnx"))
    simulated = tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, scales))
    deployed = tiny.sample(denoiser)
    assert psnr(deployed, simulated) > 30  # a value on an edge may fall the other way, which six steps of this network enlarge
    static = tiny.scales(method=method)
    assert psnr(deployed, tiny.sample(SimDenoiser(tiny.network, tiny.checkpoint.params, static))) < psnr(deployed, simulated)


def test_lcq_is_refused_with_the_reason(tiny):
    with pytest.raises(InputError, match=r"LCQ.*cannot be exported"):
        build_onnx(tiny.network, tiny.checkpoint, tiny.scales(granularity="channel"), "fp32", "x")


def test_float_network(tiny, tmp_path):
    session = session_of(build_onnx(tiny.network, tiny.checkpoint, None, "fp32", None), tmp_path)
    x, t = np.random.default_rng(0).standard_normal((3, 3, 12, 12), np.float32), np.array([0, 10, 999])
    (eps,) = session.run(None, {"x": x, "t": t})
    bias = times(tiny.network, tiny.checkpoint.params, torch.from_numpy(t))
    expected = run_unet(tiny.network, tiny.checkpoint.params, torch.from_numpy(x), bias).numpy()
    assert np.linalg.norm(eps - expected) / np.linalg.norm(expected) < 1e-5


def test_fp16_runs_and_is_near(tiny, tmp_path):
    scales = all_modulated(tiny)
    model = build_onnx(tiny.network, tiny.checkpoint, scales, "fp16", "x")
    session = session_of(model, tmp_path)
    # Row 0 alone: on the finer grids a float16 a_hat no longer tells which integer was added to it.
    ((error, lockstep),) = passes(tiny, scales, session, range(1), dtype=np.float16)
    assert error < 1e-2 and lockstep.from_edge < 1
    types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    assert types["x"] == onnx.TensorProto.FLOAT
    assert all(kind == onnx.TensorProto.FLOAT16 for name, kind in types.items() if "_hat." in name)


def test_contract_of_the_file(tiny):
    scales = tiny.scales(act_bits=6)
    model = build_onnx(tiny.network, tiny.checkpoint, scales, "fp32", "digest")
    names = scales.modulated
    assert [i.name for i in model.graph.input][:3] == ["x", "t", "row_scale"]
    assert model.graph.output[0].name == "eps"
    assert {o.name for o in model.graph.output} == {"eps"} | {f"{s}_out.{n}" for s in ("a_hat", "o_hat") for n in names}
    nodes = [n for n in model.graph.node if n.op_type == "ModulatedConv"]
    assert [n.name for n in nodes] == list(names)
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"modiff" and attributes["plugin_version"] == b"1" and node.domain == "modiff"
        assert attributes["pads"] == list(tiny.network.layer(node.name).padding)
    initializers = {i.name: i for i in model.graph.initializer}
    assert all(initializers[f"{spec.name}.weight"].data_type == onnx.TensorProto.INT8 for spec in tiny.network.layers)
    scale_inputs = [n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(name in initializers for name in scale_inputs)
    manifest = json.loads({p.key: p.value for p in model.metadata_props}[MANIFEST_KEY])
    assert manifest["checkpoint_sha256"] == tiny.checkpoint.sha256 and manifest["scales_sha256"] == "digest"
    assert manifest["timesteps"] == list(tiny.timesteps) and manifest["layers"]["conv_in"]["act_bits"] == 6
    rows = decode_array(manifest["multipliers"]).reshape(-1, len(names))
    np.testing.assert_array_equal(rows, scales.rows.multipliers)


def test_exact_start_cannot_be_exported(tiny):
    with pytest.raises(InputError, match="full-precision step"):
        build_onnx(tiny.network, tiny.checkpoint, tiny.scales(start="exact"), "fp32", "x")
    with pytest.raises(InputError, match="--dtype"):
        build_onnx(tiny.network, tiny.checkpoint, None, "bf16", None)


def test_scale_too_small_for_half_precision(tiny):
    params = dict(tiny.checkpoint.params)
    params["conv_out.weight"] = params["conv_out.weight"] * 1e-7
    with pytest.raises(InputError, match="conv_out"):
        build_onnx(tiny.network, Checkpoint(params, "x", ""), _rescaled(tiny, params), "fp16", "x")


def _rescaled(case, params):
    from modiff_trt.export.calibration.static import Recipe, make_scales

    return make_scales(case.network, Checkpoint(params, "x", ""), case.trajectories, case.ranges, Recipe())


def test_pooling_instead_of_convolutions(tmp_path):
    config = tiny_config(resamp_with_conv=False)
    network, checkpoint = trace(config), random_checkpoint(config)
    session = session_of(build_onnx(network, checkpoint, None, "fp32", None), tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32)
    (eps,) = session.run(None, {"x": x, "t": np.array([4])})
    bias = times(network, checkpoint.params, torch.tensor([4]))
    np.testing.assert_allclose(eps, run_unet(network, checkpoint.params, torch.from_numpy(x), bias), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_quantized_file_has_a_line_for_each_calibrated_timestep_and_nan_for_others(tiny, tmp_path, scaled):
    scales = tiny.scales(method="qdiff") if scaled else None
    model = build_onnx(tiny.network, tiny.checkpoint, scales, "fp32", "x" if scaled else None)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "time_table")
    calibrated = sorted(set(tiny.timesteps))
    lines = tiny.network.config.diffusion.num_diffusion_timesteps
    assert table.dims[0] == (len(calibrated) if scaled else lines)
    session = session_of(model, tmp_path)
    x = np.random.default_rng(0).standard_normal((1, *tiny.network.config.input_shape)).astype(np.float32)
    for t in range(0, lines, 7):
        (eps,) = session.run(["eps"], {"x": x, "t": np.asarray([t], np.int64)})
        assert np.isfinite(eps).all() == (not scaled or t in calibrated)
    (eps,) = session.run(["eps"], {"x": x, "t": np.asarray([calibrated[1]], np.int64)})
    assert np.isfinite(eps).all()


def test_prompts_alone_leave_the_times_a_table():
    """Projected once, for calibrated steps alone; where labels speak of each image, a product by image."""
    network, checkpoint = load_model(None, None, None, model=ROOT / "calib_cache/demo_classes")
    model = build_onnx(network, checkpoint, None, "fp32", None)
    names = {tensor.name for tensor in model.graph.initializer}
    assert "time_table" in names and "time_projections.weight" not in names
