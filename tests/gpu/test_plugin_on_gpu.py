"""The plugin's own class on an NVIDIA GPU: `enqueue` with real pointers and streams, eagerly and in a captured graph.

TensorRT need not run here (TensorRT-RTX refuses some GPUs); its bindings must import, because the plugin derives from them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from modiff_trt.core.ddim_yaml import load_config
from modiff_trt.core.errors import InputError
from modiff_trt.core.manifest import DOMAIN, FUNCTION, PLUGIN_VERSION
from modiff_trt.networks.unet2d import trace
from modiff_trt.plugins.modulated_conv.kernels.device_code import current_capability
from modiff_trt.plugins.modulated_conv.tensorrt import plugin as trt_plugin
from modiff_trt.plugins.modulated_conv.tensorrt.library import open_library
from modiff_trt.runtime.backends.plan import Plan
from modiff_trt.runtime.backends.trt_denoiser import _deserialize

pytestmark = pytest.mark.gpu


# A plan of TensorRT-RTX begins so.
RTX_HEADER = bytes.fromhex("767472740000000002000000000000004c625002000000000107017476747274")


@pytest.fixture(scope="module", params=["tensorrt", "lean", "rtx"])
def library(request):
    """Each of them that is installed: stock TensorRT, its lean runtime, TensorRT-RTX."""
    try:
        return open_library(request.param)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def trt(library):
    return library.trt


def shapes():
    """Every layer shape of the published CIFAR-10 network, once."""
    seen = {}
    for spec in trace(load_config(ROOT / "configs/cifar10.yml")).layers:
        seen.setdefault((spec.in_shape, spec.out_shape, spec.kernel, spec.stride, spec.padding), spec)
    return list(seen.values())


class Layer:
    """Inputs of one layer on the device, the plugin for them, and the same layer in float64."""

    def __init__(self, trt, spec, batch, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        (c, h, w), (k, p, q) = spec.in_shape, spec.out_shape
        self.spec, self.trt, r = spec, trt, spec.kernel

        def random(*shape):
            return torch.randn(*shape, device="cuda", generator=generator).half()

        self.x, self.a_hat, self.o_hat = random(batch, c, h, w), random(batch, c, h, w), random(batch, k, p, q)
        self.m, self.scale = (torch.tensor(v, device="cuda").half() for v in (1.5, 0.0625))
        self.weight = torch.randint(-127, 128, (k, c, r, r), dtype=torch.int8, device="cuda", generator=generator)
        self.weight_scale = (torch.rand(k, device="cuda", generator=generator) * 1e-3 + 1e-4).half()
        self.packed = F.pad(self.weight.permute(0, 2, 3, 1), (0, -c % 32)).contiguous()
        top, left, bottom, right = spec.padding
        attributes = {
            "kernel_shape": [r, r],
            "pads": [top, left, bottom, right],
            "strides": [spec.stride] * 2,
            "grid": [-128, 127],
        }
        self.plugin = trt_plugin._classes(trt)[0](attributes, current_capability(), {}, [])
        linear, real, int8 = None, trt.float16, trt.int8  # a runtime alone has no formats, and `enqueue` reads none
        kinds = [(t, real, linear) for t in (self.x, self.a_hat, self.o_hat, self.m, self.scale)]
        kinds += [(self.packed, int8, linear), (self.weight_scale, real, linear)]
        self.descriptions = [SimpleNamespace(dims=list(t.shape), type=kind, format=f) for t, kind, f in kinds]
        ranged = [SimpleNamespace(desc=d, min=d.dims, max=d.dims, opt=d.dims) for d in self.descriptions]
        self.plugin.configure_plugin(ranged, [])
        self.sources = [t.data_ptr() for t, _, _ in kinds]
        size = self.plugin.get_workspace_size(ranged, [])
        self.workspace = torch.full((size,), 77, dtype=torch.uint8, device="cuda")  # poisoned
        self.plugin.on_shape_change(self.descriptions, [])

    def read_back(self):
        """The plugin as a plan has it: made by the registered creator, from the fields that were written into the plan."""
        trt_plugin.register(self.trt)
        creator = self.trt.get_plugin_registry().get_creator(FUNCTION, PLUGIN_VERSION, DOMAIN)
        assert creator is not None and [field.name for field in creator.field_names][-1] == trt_plugin.KERNELS
        fields = self.plugin.get_fields_to_serialize()
        self.plugin = creator.create_plugin("layer", fields, self.trt.TensorRTPhase.RUNTIME).attach_to_context(None)
        self.plugin.on_shape_change(self.descriptions, [])

    def enqueue(self):
        results = [self.sources[trt_plugin.O_HAT], self.sources[trt_plugin.A_HAT]]
        stream = torch.cuda.current_stream().cuda_stream
        self.plugin.enqueue(self.descriptions, [], self.sources, results, self.workspace.data_ptr(), stream)

    def expected(self, x, a_hat, o_hat, q):
        """(a_hat', o_hat') in float64 from the integers that were found; the product on the CPU, by another library."""
        step = float(self.scale) * float(self.m)
        top, left, bottom, right = self.spec.padding
        image = F.pad(q, (left, right, top, bottom)).cpu()
        product = F.conv2d(image, self.weight.double().cpu(), stride=self.spec.stride).to(q.device)
        return a_hat + step * q, o_hat + step * self.weight_scale.double()[:, None, None] * product

    def check(self):
        x, a_hat, o_hat = (t.double() for t in (self.x, self.a_hat, self.o_hat))
        self.enqueue()
        torch.cuda.synchronize()
        step = float(self.scale) * float(self.m)
        n, c, h, w = self.x.shape
        integers = self.workspace.view(torch.int8).view(n, h * w, -1)[:, :, :c].double()
        q = integers.transpose(1, 2).reshape(n, c, h, w)
        position = ((x - a_hat) / step).clamp(-128, 127)
        assert float((q - position).abs().max()) <= 0.5 + 1e-3
        new_a, new_o = self.expected(x, a_hat, o_hat, q)
        torch.testing.assert_close(self.a_hat.double(), new_a, rtol=1e-3, atol=1e-3)
        wrong = ~torch.isclose(self.o_hat.double(), new_o, rtol=1e-3, atol=2e-3)
        channels, pixels = wrong.any(3).any(2).any(0), wrong.any(1).any(0)
        assert not wrong.any(), (
            f"{self.spec.name}: {int(wrong.sum())} of {wrong.numel()} sums, {int(channels.sum())} channels (first "
            f"{channels.nonzero()[:8].flatten().tolist()}), {int(pixels.sum())} pixels (first {pixels.nonzero()[:8].tolist()})"
        )


def test_a_layer_read_back_from_a_plan_computes_the_same(trt):
    """Through TensorRT's own registry; then captured, as a pass is."""
    for seed, spec in enumerate(shapes()[:6]):
        layer = Layer(trt, spec, 2, seed)
        layer.read_back()
        layer.check()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        layer.enqueue()
    before = layer.a_hat.clone()
    layer.x.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(before, layer.a_hat)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_layer_shape_of_the_cifar10_network(trt, batch):
    for seed, spec in enumerate(shapes()):
        Layer(trt, spec, batch, seed).check()


def test_a_captured_graph_replayed_a_hundred_times_goes_on_from_its_own_state(trt):
    spec = next(s for s in shapes() if s.in_shape == (256, 8, 8) and s.kernel == 3)
    eager, captured = Layer(trt, spec, 2), Layer(trt, spec, 2)
    captured.enqueue()  # loads; its effect is undone below
    for name in ("a_hat", "o_hat"):
        getattr(captured, name).copy_(getattr(eager, name))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        captured.enqueue()
    xs = torch.randn(100, *eager.x.shape, device="cuda").half()
    for x in xs:
        eager.x.copy_(x)
        captured.x.copy_(x)
        eager.enqueue()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager.a_hat, captured.a_hat) and torch.equal(eager.o_hat, captured.o_hat)
    assert eager.o_hat.isfinite().all() and float((eager.a_hat - eager.x).abs().max()) < 0.2  # a_hat has followed x


def test_device_arrays_streams_and_graphs_without_torch(tmp_path):
    from modiff_trt.plugins.cuda.memory import DeviceArray, Graph, Stream, use_device

    name, capability = use_device()
    assert "NVIDIA" in name and capability >= (8, 0)
    stream = Stream()
    source, target = DeviceArray((3, 5), np.float32), DeviceArray((3, 5), np.float32)
    graph = Graph(lambda: target.copy_from(source, stream), stream)
    for i in range(3):
        values = np.arange(15, dtype=np.float32).reshape(3, 5) + i
        source.copy_from(values, stream)
        graph.launch()
        np.testing.assert_array_equal(target.to_host(stream), values)
    np.testing.assert_array_equal(target.row(1).to_host(stream), values[1])
    guest = torch.arange(6, device="cuda").float()  # torch, PyCUDA and CuPy speak the same interface
    torch.cuda.synchronize()
    np.testing.assert_array_equal(DeviceArray.of(guest).to_host(stream), np.arange(6, dtype=np.float32))
    assert torch.equal(torch.as_tensor(source, device="cuda").cpu(), torch.from_numpy(values))
    with pytest.raises(InputError, match="contiguous"):
        DeviceArray.of(torch.zeros(4, 4, device="cuda").t()[1:])
    with pytest.raises(ValueError, match="does not fit"):
        target.copy_from(np.zeros((2, 2), np.float32), stream)


@pytest.mark.parametrize("data", [b"not a plan", b"", RTX_HEADER * 200], ids=["damaged", "empty", "header"])
def test_what_is_no_plan_is_refused_in_one_line(library, tmp_path, data):
    """Whatever TensorRT says, and it says it differently on GPUs that it does not know, reaches the user as one sentence."""
    with pytest.raises(InputError, match="cannot load") as refusal:
        _deserialize(library, Plan(tmp_path / "x.plan", data, {}, {}, None))
    assert "\n" not in str(refusal.value)
