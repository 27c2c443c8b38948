"""Shortcuts on a second stream, in the order of their launches: only GPUs have streams, so these here note what is asked."""

import contextlib

import numpy as np
import pytest
import torch
from native_reference import ReferenceKernels
from small_network import small_case

from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser

BLOCK = "up_blocks.1.resnets.0"
SHORTCUT = f"{BLOCK}.conv_shortcut"


class Stream:
    """Writes down what it waits for."""

    def __init__(self, name, log):
        self.name, self._log = name, log

    def wait_stream(self, other):
        self._log.append(f"{self.name} waits for {other.name}")


class WrittenDown(ReferenceKernels):
    def __init__(self, log, current):
        self._log, self._current = log, current

    def quantize(self, layer, *args, **sources):
        self._log.append(f"{self._current[-1].name}: quantize {layer.spec.name}")
        super().quantize(layer, *args, **sources)

    def product(self, layer, *args, **more):
        self._log.append(f"{self._current[-1].name}: product {layer.spec.name}")
        return super().product(layer, *args, **more)

    def real_product(self, layer, sources):
        self._log.append(f"{self._current[-1].name}: product {layer.spec.name}")
        return super().real_product(layer, sources)


@pytest.fixture
def case():
    return small_case()


def test_a_shortcut_runs_beside_its_block_s_convolutions(case, monkeypatch):
    log = []
    main, aside = Stream("main", log), Stream("aside", log)
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    every = [name for name in case.scales().layers if name.endswith("conv_shortcut")]
    shortcuts = [name for name in every if name.startswith("up_blocks.1.")]  # the others are quantized, and stay in line
    assert 1 <= len(shortcuts) < len(every)
    scales = with_modes(case.scales(), dict.fromkeys(shortcuts, "float"))
    denoiser = NativeDenoiser(case.network, case.checkpoint.params, scales, WrittenDown(log, current), "cpu")
    x = torch.randn(1, *case.network.config.input_shape).contiguous(memory_format=torch.channels_last)
    found = []
    for stream in (None, aside):
        denoiser.reset(1)
        denoiser._row.copy_(denoiser._table[0])
        log.clear()
        denoiser._side = stream
        found.append(denoiser._predict(x))
    assert found[0].isfinite().all()
    np.testing.assert_array_equal(*(t.numpy() for t in found))
    begin = log.index(f"main: quantize {BLOCK}.conv1")
    assert log[begin : begin + 7] == [
        f"main: quantize {BLOCK}.conv1",
        "aside waits for main",
        f"aside: product {SHORTCUT}",
        f"main: product {BLOCK}.conv1",
        f"main: quantize {BLOCK}.conv2",
        f"main: product {BLOCK}.conv2",
        "main waits for aside",
    ]
    assert log.count("main waits for aside") == log.count("aside waits for main") == len(shortcuts)
    assert sum(line.startswith("aside: ") for line in log) == len(shortcuts)
