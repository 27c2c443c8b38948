"""What the `trt` backend does around an engine, with a stand-in for the engine: images must be those of the same file."""

from dataclasses import replace

import numpy as np
import pytest
from engine_stand_in import TRT, Driver, Engine
from small_diffusers import PROMPTED, TOKENS, prompted_case

from modiff_trt.core.context import PROMPT
from modiff_trt.core.errors import InputError
from modiff_trt.core.start_state import start_state
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.plugins.cuda import memory as cuda_memory
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library
from modiff_trt.runtime.backends import trt_denoiser
from modiff_trt.runtime.backends.onnx_denoiser import OnnxDenoiser, load_onnx
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.backends.trt_denoiser import TrtDenoiser, runtime_of


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """(a denoiser on the stand-in, the same file on onnxruntime)."""
    driver = Driver()
    monkeypatch.setattr(cuda_memory, "driver", lambda: driver)
    monkeypatch.setattr(cuda_memory, "current_capability", lambda index: 89)
    monkeypatch.setattr(trt_denoiser, "open_library", lambda *names: Library("tensorrt", TRT))
    monkeypatch.setattr(trt_denoiser.trt_plugin, "register", lambda trt: None)

    def build(plugin=False, batches=(1, 4), target="sm89", case=tiny, **recipe):
        path = tmp_path / "m.onnx"
        save_onnx(path, build_onnx(case.network, case.checkpoint, case.scales(act_bits=6, **recipe), "fp32", "x"))
        model = load_onnx(path)
        shapes = {i.name: tuple(i.shape[1:]) for i in model.session.get_inputs()}
        options = {"min_batch": batches[0], "max_batch": batches[1], "version_compatible": False, "tokens": TOKENS}
        manifest = {"runtime": "tensorrt", "version": "1", "options": options, "target": target, "plugin": plugin}
        manifest["network"] = model.manifest
        plan = Plan(tmp_path / "m.plan", b"", manifest, start_state(model.proto, model.manifest, shapes), model.config)
        keep = (None, type("Logger", (), {"lines": ["the GPU is on fire"]}))
        monkeypatch.setattr(trt_denoiser, "_deserialize", lambda library, plan: (Engine(path, driver), keep))
        return TrtDenoiser(plan), OnnxDenoiser(model)

    build.driver = driver
    return build


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("recipe", [{}, {"method": "qdiff"}, {"granularity": "tensor"}])
def test_images_and_state_are_those_of_the_file(tiny, make, plugin, recipe):
    """Without the plugin two sets of buffers take turns; with it one set is updated in place."""
    engine, reference = make(plugin, **recipe)
    for images in (3, 1, 4):  # a batch may change between trajectories
        np.testing.assert_array_equal(tiny.sample(engine, images), tiny.sample(reference, images))
        for name, value in reference.state.items():
            np.testing.assert_array_equal(engine.state[name], value)
    assert {info.name for info in engine.state_info} == set(reference.state)


def test_a_batch_below_the_profile_is_padded_and_one_above_refused(tiny, make):
    engine, reference = make(batches=(3, 4))
    for images in (1, 2):  # onnxruntime's own last bits depend on the batch
        np.testing.assert_allclose(tiny.sample(engine, images), tiny.sample(reference, images), rtol=1e-3, atol=1e-3)
    assert all(len(value) == 2 for value in engine.state.values())
    with pytest.raises(InputError, match="up to 4"):
        engine.reset(5)


def test_a_device_array_goes_in_and_comes_out(tiny, make):
    engine, reference = make()
    x = np.random.default_rng(0).standard_normal((2, *tiny.network.config.input_shape), np.float32)
    engine.reset(2)
    reference.reset(2)
    guest = cuda_memory.DeviceArray(x.shape, np.float32)
    guest.copy_from(x, cuda_memory.Stream())
    for row in range(3):
        eps = engine(guest, row)
        assert eps.__cuda_array_interface__["shape"] == x.shape
        np.testing.assert_array_equal(engine.to_host(eps), reference(x, row))


def test_old_buffers_are_freed_before_new_ones_are_made(tiny, make):
    engine, _ = make()
    engine.reset(4)
    at_four = make.driver.largest
    engine.reset(3)
    engine.reset(4)
    assert make.driver.largest == at_four
    del engine


def test_another_gpu_a_default_stream_and_a_failing_engine_are_one_line(make, monkeypatch):
    with pytest.raises(InputError, match="built for sm90, and Stand-in is sm89"):
        make(target="sm90")
    with pytest.raises(InputError, match="default stream"):
        cuda_memory.Stream(0)
    engine, _ = make()
    monkeypatch.setattr(Engine, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(InputError, match="failed to run: the GPU is on fire"):
        engine.reset(1)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    return prompted_case(tmp_path_factory.mktemp("prompted"))


@pytest.mark.parametrize("plugin", [False, True])
def test_prompts_and_guidance_give_the_images_of_the_file(prompted, make, plugin):
    engine, reference = make(plugin, case=prompted)
    for images in (2, 1, 2):
        np.testing.assert_array_equal(prompted.sample(engine, images), prompted.sample(reference, images))
    with pytest.raises(InputError, match="guidance an image counts twice"):
        prompted.sample(engine, 3)


def test_a_batch_below_the_profile_takes_its_prompts(prompted, make):
    engine, reference = make(case=prompted, batches=(3, 4))
    np.testing.assert_allclose(prompted.sample(engine, 1), prompted.sample(reference, 1), rtol=1e-3, atol=1e-3)


def test_prompts_of_another_length_and_none_are_one_line(prompted, make):
    engine, _ = make(case=prompted)
    with pytest.raises(InputError, match=f"prompts of {TOKENS} tokens, not 9; pad them, or build with --tokens 9"):
        engine.reset(1, {PROMPT: np.zeros((1, 9, PROMPTED["cross_attention_dim"]), np.float32)})
    with pytest.raises(InputError, match="pass a context"):
        engine.reset(1)


def test_the_lean_runtime_is_for_compatible_plans_of_stock_tensorrt(make, monkeypatch):
    engine, _ = make()
    plan = engine._plan
    options = plan.manifest["options"] | {"version_compatible": True}
    compatible = replace(plan, manifest=plan.manifest | {"options": options})
    assert runtime_of(compatible, "lean") == "lean" and runtime_of(plan, "auto") == "tensorrt"
    with pytest.raises(InputError, match="build it with --version-compatible"):
        runtime_of(plan, "lean")
    with pytest.raises(InputError, match="which --runtime rtx cannot run"):
        runtime_of(plan, "rtx")
    with pytest.raises(InputError, match="built by rtx, which --runtime lean cannot run"):
        runtime_of(replace(plan, manifest=plan.manifest | {"runtime": "rtx"}), "lean")
    monkeypatch.setattr(trt_denoiser, "is_installed", lambda name: name == "lean")
    assert runtime_of(compatible, "auto") == "lean" and runtime_of(plan, "auto") == "tensorrt"
