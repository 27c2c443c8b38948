"""What the native kernels are compiled to, without a GPU: their launches on CPU tensors, noted and compiled instead."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys

import torch
from kernel_cases import CASES, PIXEL_CASES, KernelCase, PixelCase, launch, launch_pixels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from modiff_trt.plugins.modulated_conv.geometry import Geometry
from modiff_trt.plugins.modulated_conv.kernels import edges as edges_kernel
from modiff_trt.plugins.modulated_conv.kernels import groups as groups_kernel
from modiff_trt.plugins.modulated_conv.kernels import pixels as pixels_kernel
from modiff_trt.plugins.modulated_conv.kernels import quantize as quantize_kernel

from modiff_trt.plugins.modulated_conv.kernels import refresh as refresh_kernel
from modiff_trt.plugins.modulated_conv.kernels.device_code import check_ptx
from modiff_trt.plugins.modulated_conv.reference import InputShape

TYPES = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int16: "*i16", torch.int8: "*i8", torch.int32: "*i32"}
OPTIONS = ("num_warps", "launch_pdl", "enable_fp_fusion")
capability, compiled = int(sys.argv[1]), set()


class Compiled:
    def __init__(self, module, name):
        self._kernel = getattr(module, name)
        setattr(module, name, self)

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        if "FAST" in kwargs:
            kwargs["FAST"] = True  # as on a GPU
        names = self._kernel.arg_names
        kinds = {int: "i32", float: "fp32"}
        types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else kinds[type(a)] for a in args] + ["constexpr"] * len(kwargs)
        ordered = {name: kwargs[name] for name in names[len(args) :]}
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
        source = ASTSource(self._kernel, dict(zip(names, types, strict=True)), ordered, aligned)
        name = self._kernel.fn.__name__
        check_ptx(compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"], f"{name} {ordered}")
        compiled.add(name)


for name in ("sums_kernel", "affine_kernel"):
    Compiled(groups_kernel, name)
Compiled(quantize_kernel, "quantize_kernel")
Compiled(pixels_kernel, "pixels_kernel")
for name in ("few_inputs_kernel", "planes_kernel", "sum_planes_kernel"):
    Compiled(edges_kernel, name)
for name in ("byte_kernel", "bias_kernel"):
    Compiled(refresh_kernel, name)
CIFAR10 = (
    KernelCase(InputShape(3, 0, 32, 32), q_channels=16),
    KernelCase(InputShape(128, 0, 32, 32), groups=32, silu=True, time=True),
    KernelCase(InputShape(256, 128, 16, 16), groups=32, silu=True, add=True, write=True),
    KernelCase(InputShape(256, 256, 8, 8), groups=32, silu=True, add=True, write=True),
    KernelCase(InputShape(256, 0, 16, 16, upsample=True), add=True, write=True),
    KernelCase(InputShape(128, 0, 32, 32), dynamic=True),
)
for case in (*CASES.values(), *CIFAR10):
    launch(case, "cpu", torch.float16, overlap=capability >= 90)
for case in (*PIXEL_CASES.values(), PixelCase(640, 1024, add=True), PixelCase(2560, 1024, gated=True)):
    launch_pixels(case, "cpu", torch.float16, overlap=capability >= 90)
for shape in (InputShape(128, 0, 32, 32), InputShape(3, 0, 32, 32), InputShape(256, 0, 16, 16, True)):
    channels = -(-shape.total // 16) * 16
    state = torch.zeros(2, shape.pixels, shape.total, dtype=torch.int16)
    for high in (False, True):
        refresh_kernel.write_byte(shape, state, torch.zeros(2, shape.out_pixels, channels, dtype=torch.int8), high=high)
    refresh_kernel.set_to_bias(torch.zeros(2, shape.pixels, channels).half(), torch.zeros(channels))
for (few, many), size, real in (((3, 128), 32, torch.float32), ((4, 320), 64, torch.float16), ((5, 72), 7, torch.float16)):
    pixels, same = size * size, (1, 1, 1, 1)
    into, back = Geometry(2, few, size, size, many, 3, 1, same), Geometry(2, many, size, size, few, 3, 1, same)
    x, out, bias = torch.zeros(2, pixels, few, dtype=real), torch.zeros(2, pixels, many).half(), torch.zeros(many)
    wide, narrow = torch.zeros(many, 3, 3, few).half(), torch.zeros(few, 3, 3, many).half()
    edges_kernel.convolve_few_inputs(x, wide, bias, out=out, geometry=into, overlap=capability >= 90)
    edges_kernel.convolve_few_outputs(out, narrow, bias[:few], out=x.float(), geometry=back, overlap=capability >= 90)
names = {"few_inputs_kernel", "planes_kernel", "sum_planes_kernel"}
names |= {"sums_kernel", "affine_kernel", "quantize_kernel", "pixels_kernel", "byte_kernel", "bias_kernel"}
assert compiled == names, compiled
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_no_native_kernel_has_packed_16_bit_additions(capability):
    """Integers are computed in float32 where they would be narrowed to such: see `device_code.check_ptx`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, capability], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-500:]
