"""The report on a network's engines: real plans of TensorRT-RTX for a GPU that is not there; comparison and times with
onnxruntime standing in for the engine."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from command import alone
from conftest import ROOT
from engine_stand_in import TRT, Driver, Engine

import modiff_trt
from modiff_trt.core.errors import InputError
from modiff_trt.engines.build import BuildOptions
from modiff_trt.export.onnx.network import build_onnx, save_onnx
from modiff_trt.plugins.cuda import memory as cuda_memory
from modiff_trt.plugins.modulated_conv.tensorrt.library import Library, open_library
from modiff_trt.runtime.backends import trt_denoiser
from modiff_trt.tools.bench.engines import (
    KINDS,
    Subject,
    build_engine,
    check_engine,
    time_engines,
    verdict,
    write_markdown,
)

DEMO = ROOT / "calib_cache/demo"
FILES = [
    "--config",
    ROOT / "configs/demo.yml",
    "--ckpt",
    DEMO / "model.safetensors",
    "--scales",
    DEMO / "modiff-w8a8.safetensors",
]
INLINED = [kind for kind in KINDS if not kind.plugin]


def test_every_kind_is_built_once_and_what_cannot_run_here_is_named(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    command = [
        "engines",
        *FILES,
        "--runtime",
        "rtx",
        "--target",
        "sm89",
        "--max-batch",
        4,
        "--batch-sizes",
        "1,4",
        "--out",
        tmp_path,
    ]
    for again in (False, True):
        done = alone(*command)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "engines.json").read_text())
        for kind in KINDS:
            entry = result["engines"][kind.name]
            assert entry["kept"] == again
            assert entry["report"]["fell_back"] == []
            assert entry["report"]["plugin_layers"] == (47 if kind.plugin else 0)
            in_int8 = entry["report"]["quantized_layers_in_int8"] + entry["report"]["plugin_layers"]
            assert in_int8 == entry["report"]["quantized_layers"] == (47 if kind.quantized else 0)
    page = (tmp_path / "engines.md").read_text()
    assert page.count("47 of 47") == 3 and "PSNR" not in page
    if "not_run" in result["times"]:
        assert "no engine was timed" in result["verdict"] and "What did not run" in page
        assert page.count("not compared") == len(KINDS) and "sees no NVIDIA GPU" in page


@pytest.fixture
def subject(tiny):
    return Subject(tiny.network, tiny.checkpoint, replace(tiny.scales(), file_sha256="0" * 64))


@pytest.fixture
def standing(subject, tmp_path, monkeypatch):
    """Entries of the engines without the plugin; to run, each is the onnxruntime session of a file, which a test may change."""
    return stand_in_for_engines(subject, tmp_path, monkeypatch, BuildOptions(max_batch=4, target="sm89"))


def stand_in_for_engines(subject, tmp_path, monkeypatch, options):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'modiff-trt[rtx]'")
    library = open_library("rtx")
    entries = {kind.name: build_engine(subject, kind, tmp_path, library=library, options=options) for kind in INLINED}
    driver, files = Driver(), {entry["plan"]: tmp_path / entry["onnx"] for entry in entries.values()}
    monkeypatch.setattr(cuda_memory, "driver", lambda: driver)
    monkeypatch.setattr(cuda_memory, "current_capability", lambda index: 89)
    monkeypatch.setattr(trt_denoiser, "open_library", lambda *names: Library("tensorrt", same_version))
    same_version = SimpleNamespace(**vars(TRT) | {"__version__": library.version})
    keep = (None, type("Logger", (), {"lines": [""]}))
    monkeypatch.setattr(trt_denoiser, "_deserialize", lambda library, plan: (Engine(files[plan.path.name], driver), keep))
    return entries, files


def test_engines_with_prompts_are_compared_pass_by_pass_and_timed_with_guidance(tmp_path, monkeypatch):
    """A pass has as many lines as images; in time each image counts twice."""
    from small_diffusers import TOKENS, prompted_case

    case = prompted_case(tmp_path / "model")
    network, context = case.network, case.trajectories.context
    subject = Subject(network, case.checkpoint, replace(case.scales(), file_sha256="0" * 64), context)
    options = BuildOptions(max_batch=4, tokens=TOKENS, target="sm89")
    entries, _ = stand_in_for_engines(subject, tmp_path, monkeypatch, options)
    for name, entry in entries.items():
        found = check_engine(entry, tmp_path, context, batch=2, tolerance=0.05, on_pass=lambda: None)
        assert found["equal"], found
        assert (found["passes"] > 1) == (name != "fp16")  # which takes any timestep, and has no passes of its own
    times = time_engines(subject, entries, tmp_path, device="cpu", batch_sizes=[1, 2], runs=1, passes=2)
    assert len(times["batches"]["2"]) == 3, times["not_run"]


def test_a_plan_runs_on_the_stream_that_it_is_given(standing, tmp_path, monkeypatch):
    """From Python, as the PyCUDA example calls it."""
    entries, _ = standing
    real, streams = Engine.execute_async_v3, set()

    def watched(self, stream):
        streams.add(stream)
        return real(self, stream)

    monkeypatch.setattr(Engine, "execute_async_v3", watched)
    plan = tmp_path / entries["modiff-inlined"]["plan"]
    images = modiff_trt.sample(modiff_trt.denoiser(plan, stream=78), images=2)
    assert streams == {78}
    np.testing.assert_array_equal(modiff_trt.sample(modiff_trt.denoiser(plan), images=2), images)
    assert len(streams) == 2
    with pytest.raises(InputError, match="default stream"):
        modiff_trt.denoiser(plan, stream=0)


def test_the_fastest_engine_is_named_and_whether_it_is_right(subject, standing, tmp_path):
    entries, files = standing
    # An engine whose weights are others than its file's.
    wrong = {name: 1.3 * value if name.endswith("conv2.weight") else value for name, value in subject.checkpoint.params.items()}
    checkpoint = replace(subject.checkpoint, params=wrong)
    save_onnx(tmp_path / "wrong.onnx", build_onnx(subject.network, checkpoint, None, "fp16", None))
    files[entries["fp16"]["plan"]] = tmp_path / "wrong.onnx"
    seen = []
    for entry in entries.values():
        entry["check"] = check_engine(entry, tmp_path, subject.context, batch=2, tolerance=0.05, on_pass=lambda: seen.append(1))
    assert {name: entry["check"]["equal"] for name, entry in entries.items()} == {
        "fp16": False,
        "int8": True,
        "modiff-inlined": True,
    }
    times = time_engines(subject, entries, tmp_path, device="cpu", batch_sizes=[1, 3], runs=1, passes=2)
    assert set(times["batches"]) == {"1", "3"} and len(times["batches"]["3"]) == 3
    assert "torch-fp16-compiled" in times["not_run"]
    rows = times["batches"]["3"]
    for name, entry in entries.items():  # not what this machine's load makes of them
        rows[f"tensorrt {entry['plan'].removesuffix('.plan')}"]["microseconds"] = {"fp16": 1e3, "int8": 2e3}.get(name, 3e3)
    said = verdict(entries, times["batches"])
    assert said.startswith("fastest, but NOT equal to onnxruntime: FP16 (1 ms a pass at batch 3)")
    assert said.endswith("the fastest that is equal: INT8 (2 ms a pass at batch 3)")
    rows["torch-fp16-compiled"] = {"microseconds": 4e3, "microseconds_an_image": 4e3 / 3}
    del entries["fp16"]["check"]
    assert "not compared with onnxruntime: FP16" in verdict(entries, times["batches"])
    del entries["fp16"]["plan"]
    assert verdict(entries, times["batches"]).startswith(
        "fastest, and equal to onnxruntime: INT8 (2 ms a pass at batch 3, 2.00x"
    )
    entries["modiff-plugin"] = {"not_run": ["not built: no plugin"]}
    result = {
        "config": "tiny.yml",
        "engines": entries,
        "times": times,
        "machine": {"cores": 2},
        "versions": {"python": "3"},
        "command": "modiff-trt engines",
        "checkpoint_sha256": "1" * 64,
        "scales_sha256": "0" * 64,
        "verdict": verdict(entries, times["batches"]),
    }
    write_markdown(tmp_path / "engines.md", result)
    page = (tmp_path / "engines.md").read_text()
    assert "2.00x" in page and "- INT8 + MoDiff, plugin: not built: no plugin" in page
    columns = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert columns == {10}
