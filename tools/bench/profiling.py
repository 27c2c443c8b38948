"""Where a native pass spends its time: GPU time by class of kernel, beside the least that memory and arithmetic allow.

The ceilings are measured in the same process; `floors` makes the least times of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from modiff_trt.core.context import Context
from modiff_trt.plugins.modulated_conv.libraries.cudnn_conv import ConvSpec, Int8Conv
from modiff_trt.plugins.modulated_conv.libraries.timing import graph_time_us
from modiff_trt.runtime.backends.native.denoiser import NativeDenoiser

# Class by what a kernel's name contains; the first that fits counts.
CLASSES = {
    "group sums": ("sums_kernel", "affine_kernel"),
    "quantize": ("quantize_kernel", "pixels_kernel"),
    "attention": ("sdpa", "flash", "softmax", "fmha"),
    "INT8 convolution": ("convFwd_pointwise", "conv_kernel_int8"),
    "float products": ("conv_kernel_real", "product_kernel", "few_inputs_kernel", "planes_kernel"),
}
REST = "everything else"
PASSES = 5


def ceilings() -> dict[str, float]:
    """Bytes a second of a kernel that reads and writes, operations a second of an FP16 matrix product of 8192, and of INT8 the
    better of such a product and of a large convolution with this project's epilogue."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    n = 8192
    a8 = torch.randint(-128, 128, (n, n), dtype=torch.int8, device="cuda")
    a16 = torch.randn(n, n, dtype=torch.float16, device="cuda")
    spec = ConvSpec(256, 256, 32, width=32, out_channels=256, kernel=3, stride=1, padding=(1, 1, 1, 1), residual=False)
    convolution = 2.0 * prod(spec.out_shape) * spec.in_channels * spec.kernel**2 / (Int8Conv(spec).plan.time_us * 1e-6)
    calls: Mapping[str, tuple[float, Any]] = {
        "copy_bytes": (2.0 * source.numel() * source.element_size(), lambda: torch.neg(source, out=target)),
        "int8_operations": (2.0 * n**3, lambda: torch._int_mm(a8, a8.T)),
        "fp16_operations": (2.0 * n**3, lambda: a16 @ a16),
    }
    found = {}
    for name, (amount, call) in calls.items():
        call()
        # The best of several tries: a GPU that was idle takes a while to reach its clocks.
        found[f"{name}_a_second"] = amount / (min(graph_time_us([call] * 4, 5) for _ in range(20)) * 1e-6)
    return found | {"int8_operations_a_second": max(found["int8_operations_a_second"], convolution)}


def profile(denoiser: NativeDenoiser, least: Mapping[str, float], context: Context, batch: int) -> dict[str, Any]:
    """Per class: microseconds an image and pass, launches a pass, and `least`, its floor, of passes without a refresh. Kernels
    that run side by side share the GPU, so that the times add up to more than the pass takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    denoiser.reset(batch, context.of(range(batch)))
    denoiser.step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(PASSES):
            denoiser.step()
        torch.cuda.synchronize()
    table = {name: {"microseconds_an_image": 0.0, "launches": 0.0} for name in [*CLASSES, REST]}
    for event in recorded.key_averages():
        if event.device_time_total == 0:
            continue
        name = next((n for n, parts in CLASSES.items() if any(part in event.key for part in parts)), REST)
        table[name]["microseconds_an_image"] += event.device_time_total / PASSES / batch
        table[name]["launches"] += event.count / PASSES
    for name, row in table.items():
        row["floor_microseconds_an_image"] = context.copies * least.get(name, 0.0)
    return {"batch": batch, "classes": table}
