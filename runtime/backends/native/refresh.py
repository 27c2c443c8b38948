"""`o_hat` computed anew from `a_hat`.

`a_hat` is exact, but a float16 `o_hat` is rounded once a pass, and the roundings add up: in 100 passes to 0.14 dB of an image
that is 58 dB from full precision (results/native_images_58db_h200.json), in 1000 to 0.55 dB (results/states1000_demo.json).
"""

from __future__ import annotations

import torch

from modiff_trt.plugins.modulated_conv.reference import InputShape
from modiff_trt.runtime.backends.native.layers import NativeModel
from modiff_trt.runtime.backends.native.ops import Buffers, Kernels, shared_accumulators

# Passes from one refresh to the next: 25 leave 0.09 dB, 50 leave 0.13, and 25 cost 4 to 6 % of a pass (docs/lab/kernels.md).
REFRESH = 25


def refresh(kernels: Kernels, model: NativeModel, buffers: Buffers) -> None:
    """o_hat = bias + unit weight_scale (weight * a_hat's counts) of every modulated layer, in place, on torch's current stream.
    For kernels whose state is int16 counts and whose integers are int8: counts go through the INT8 product as two bytes. A sum
    that is not finite stays so, because `NativeDenoiser` looks for it at a trajectory's end."""
    from modiff_trt.plugins.modulated_conv.kernels.refresh import set_to_bias, write_byte

    shared = shared_accumulators(model.layers)
    for name, out in buffers.o_hat.items():
        if name not in shared:
            set_to_bias(out, model.layers[name].bias)
    for name, state in buffers.state.items():
        layer, out = model.layers[name], buffers.o_hat[name]
        channels, height, width = layer.spec.in_shape
        factor = 2 if layer.spec.upsampled else 1
        shape = InputShape(channels, 0, height // factor, width=width // factor, upsample=layer.spec.upsampled)
        steps = torch.ones(len(state), device=out.device) if layer.dynamic else None
        q = torch.empty(len(state), shape.out_pixels, layer.weight.shape[1], dtype=torch.int8, device=out.device)
        assert layer.byte_scales is not None
        # The low bytes first: where no other layer has added to `out` yet, what is rounded then is small. Before each product
        # its bytes are written, and not before both: a product must not add to what the launch just before it wrote
        # (`Int8Conv.run`).
        for high in (False, True):
            write_byte(shape, state, q, high=high)
            kernels.product(layer, q, layer.byte_scales[int(high)], out, steps)
        del q  # before the next layer's is made
