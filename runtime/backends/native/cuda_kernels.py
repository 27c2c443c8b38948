"""The native kernels on NVIDIA GPUs: Triton for a layer's input, cuDNN for its integer product."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from modiff_trt.core.errors import InputError
from modiff_trt.core.extras import install_command
from modiff_trt.networks.operations import LayerSpec
from modiff_trt.plugins.modulated_conv.geometry import has_few_inputs
from modiff_trt.plugins.modulated_conv.libraries.conv_tactics import ConvTactics
from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.native.layers import NativeLayer, aligned, output_type

OLDEST = (8, 0)
# From here on a launch may begin while the one before it ends (programmatic dependent launch).
OVERLAPPING = (9, 0)


class CudaKernels:
    """`Kernels` on the current CUDA device. Convolution plans are tuned once for each shape and kept on disk."""

    real = torch.float16
    integer = torch.int8
    offset = 0

    def __init__(self, overlap: bool = True) -> None:
        """`overlap` lets a launch begin while the one before it ends, where the GPU can do that."""
        check_gpu()
        self._overlap = overlap and torch.cuda.get_device_capability() >= OVERLAPPING
        self._tactics = ConvTactics(self._overlap)

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, state: Tensor, unit: float) -> Tensor:
        return state

    def quantize(
        self, layer: NativeLayer | None, shape: InputShape, a: Tensor, out: Tensor, *, norm: Any, **sources: Any
    ) -> None:
        from modiff_trt.plugins.modulated_conv.kernels.groups import Norm
        from modiff_trt.plugins.modulated_conv.kernels.quantize import quantize_input

        quantize_input(
            shape,
            a,
            out,
            norm=Norm(*norm) if norm is not None else None,
            factors=layer.factors if layer is not None else None,
            **of_grid(layer),
            overlap=self._overlap,
            **sources,
        )

    def quantize_pixels(self, layer: NativeLayer | None, a: Tensor, out: Tensor, **sources: Any) -> None:
        from modiff_trt.plugins.modulated_conv.kernels.pixels import quantize_pixels

        quantize_pixels(a, out, **of_grid(layer), overlap=self._overlap, **sources)

    def product(self, layer: NativeLayer, q: Tensor, scale: Tensor, addend: Tensor, steps: Tensor | None) -> Tensor:
        out = self._output(layer, q, layer.out_channels) if addend.ndim == 1 else addend
        self._tactics.run(layer.product_spec, q, layer.weight, scale, addend, out, steps)
        return out

    def real_channels(self, spec: LayerSpec) -> int:
        channels = spec.in_shape[0]
        return channels if has_few_inputs(channels, spec.kernel) else aligned(channels)

    def real_product(self, layer: NativeLayer, sources: Sequence[Tensor]) -> Tensor:
        from modiff_trt.plugins.modulated_conv.kernels.conv import convolve_real

        spec = layer.spec
        out = self._output(layer, sources[0], spec.out_shape[0])
        if not has_few_inputs(spec.in_shape[0], spec.kernel):
            # Between layers nothing is of another type. The network's own input is.
            sources = [source.to(self.real) for source in sources]
        convolve_real(
            sources,
            layer.weight.permute(0, 2, 3, 1),
            layer.bias,
            out=out,
            size=spec.in_shape[1:],
            stride=spec.stride,
            padding=spec.padding,
            overlap=self._overlap,
        )
        return out

    def _output(self, layer: NativeLayer, source: Tensor, channels: int) -> Tensor:
        """A new [N, P*Q, channels], for as many images as `source` has and where that is."""
        _, height, width = layer.spec.out_shape
        dtype = output_type(layer.spec, self.real)
        return torch.empty(len(source), height * width, channels, dtype=dtype, device=source.device)


def of_grid(layer: NativeLayer | None) -> dict[str, Any]:
    """What the kernels that round must know of a layer's grid."""
    return {} if layer is None else {"bits": layer.bits, "zero_point": layer.zero_point, "moving": layer.moving}


def check_gpu() -> None:
    """Raises InputError unless the current GPU and packages can run the kernels."""
    if not torch.cuda.is_available():
        raise InputError("--backend native --device cuda: this torch sees no NVIDIA GPU; pass --device cpu")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name = torch.cuda.get_device_name()
        raise InputError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; the native kernels need 8.0 (Ampere) or later"
        )
    for package, extra in (("triton", "a CUDA build of torch brings it"), ("cudnn", install_command("cuda"))):
        try:
            __import__(package)
        except ImportError:
            raise InputError(f"--backend native needs the package {package}; {extra}") from None
