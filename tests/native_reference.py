"""The native network's operations on the CPU with the plain reference in place of cuDNN, so that everything but the
convolution library runs as on a GPU (Triton in its interpreter)."""

from contextlib import nullcontext

import torch

from modiff_trt.plugins.modulated_conv import reference
from modiff_trt.plugins.modulated_conv.kernels.conv import convolve_real
from modiff_trt.plugins.modulated_conv.kernels.groups import Norm
from modiff_trt.plugins.modulated_conv.kernels.pixels import quantize_pixels
from modiff_trt.plugins.modulated_conv.kernels.quantize import quantize_input
from modiff_trt.runtime.backends.native.cuda_kernels import CudaKernels, of_grid


class ReferenceKernels:
    real = torch.float32
    integer = torch.int8
    offset = 0

    def busy(self):
        return nullcontext()

    def start(self, state, unit):
        return state

    def quantize(self, layer, shape, a, out, *, norm, **sources):
        norm = Norm(*norm) if norm is not None else None
        factors = layer.factors if layer is not None else None
        quantize_input(shape, a, out, norm=norm, factors=factors, **of_grid(layer), **sources)

    def quantize_pixels(self, layer, a, out, **sources):
        quantize_pixels(a, out, **of_grid(layer), **sources)

    def real_channels(self, spec):
        return CudaKernels.real_channels(self, spec)

    def real_product(self, layer, sources):
        (channels, height, width), spec = layer.spec.out_shape, layer.spec
        out = torch.full((len(sources[0]), height * width, channels), float("nan"))
        window = {"size": spec.in_shape[1:], "stride": spec.stride, "padding": spec.padding}
        convolve_real(sources, layer.weight.permute(0, 2, 3, 1), layer.bias, out, **window)
        return out

    def product(self, layer, q, scale, addend, steps):
        spec, size = layer.product_spec, layer.product_spec.in_shape[1:]
        weight = layer.weight.float()[:, : q.shape[2]]
        if steps is not None:
            scale = scale * steps[:, None, None]
        y = reference.accumulate(q.float(), weight, scale, addend.float(), size, spec.stride, spec.padding)
        return addend.copy_(y) if addend.ndim == 3 else y.contiguous()
