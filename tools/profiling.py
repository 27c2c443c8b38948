"""Where a native pass spends its time: GPU time by class of kernel, beside the least that memory and arithmetic allow.

The floors count bytes and operations from the network's shapes, against ceilings that are measured in the same process.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from modiff_trt.export.scales import Scales
from modiff_trt.export.unet import LayerSpec, Network
from modiff_trt.plugins.modulated_conv.quantize_kernel import SMALL
from modiff_trt.plugins.modulated_conv.timing import graph_time_us
from modiff_trt.runtime.native_denoiser import NativeDenoiser

# Class by what a kernel's name contains; the first that fits counts.
CLASSES = {
    "group sums": ("sums_kernel",),
    "quantize": ("quantize_kernel",),
    "attention": ("sdpa", "flash", "softmax", "fmha"),
    "INT8 convolution": ("convFwd_pointwise", "conv_kernel_int8"),
    "float products": ("conv_kernel_real",),
}
REST = "everything else"
REAL = 2  # bytes of float16


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of INT8 and FP16 matrix products of 8192."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    n = 8192
    a8 = torch.randint(-128, 128, (n, n), dtype=torch.int8, device="cuda")
    a16 = torch.randn(n, n, dtype=torch.float16, device="cuda")
    calls: Mapping[str, tuple[float, Any]] = {
        "copy_bytes": (2.0 * source.numel(), lambda: target.copy_(source)),
        "int8_operations": (2.0 * n**3, lambda: torch._int_mm(a8, a8.T)),
        "fp16_operations": (2.0 * n**3, lambda: a16 @ a16),
    }
    found = {}
    for name, (amount, call) in calls.items():
        call()
        # The best of several tries: a GPU that was idle takes a while to reach its clocks.
        found[f"{name}_a_second"] = amount / (min(graph_time_us([call] * 4, 5) for _ in range(20)) * 1e-6)
    return found


def floors(network: Network, scales: Scales, ceiling: Mapping[str, float]) -> dict[str, float]:
    """Microseconds an image and pass that each class needs at least, for large batches."""
    copy, int8, fp16 = (ceiling[f"{name}_a_second"] for name in ("copy_bytes", "int8_operations", "fp16_operations"))
    least = dict.fromkeys([*CLASSES, REST], 0.0)
    for spec in network.layers:
        mode = scales.layers[spec.name].mode
        inputs, outputs = prod(spec.in_shape), prod(spec.out_shape)
        stored = inputs // 4 if spec.upsampled else inputs
        if mode == "float":
            least["float products"] += max(REAL * (inputs + outputs) / copy, 2 * spec.macs / fp16)
        else:
            state = 4 if mode == "modiff" else 0
            least["quantize"] += (stored * (REAL + state) + inputs) / copy
            accumulated = 2 * REAL if mode == "modiff" else REAL
            least["INT8 convolution"] += max((inputs + accumulated * outputs) / copy, 2 * spec.macs / int8)
        if _normalized(spec) and spec.in_shape[1] * spec.in_shape[2] > SMALL:
            least["group sums"] += REAL * inputs / copy
            if mode == "float":
                least["quantize"] += 2 * REAL * inputs / copy
        if spec.name.endswith(".qkv"):
            least["attention"] += REAL * (outputs + inputs) / copy
    return {name: 1e6 * seconds for name, seconds in least.items()}


def _normalized(spec: LayerSpec) -> bool:
    return spec.name.rsplit(".", 1)[-1] in ("conv1", "conv2", "qkv", "conv_out")


def profile(denoiser: NativeDenoiser, network: Network, scales: Scales, batch: int, passes: int = 5) -> dict[str, Any]:
    """Per class: microseconds an image and pass, launches a pass, the floor, and time over floor."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    ceiling = ceilings()
    least = floors(network, scales, ceiling)
    denoiser.reset(batch)
    denoiser.step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(passes):
            denoiser.step()
        torch.cuda.synchronize()
    table = {name: {"microseconds_an_image": 0.0, "launches": 0.0} for name in [*CLASSES, REST]}
    for event in recorded.key_averages():
        if event.device_time_total == 0:
            continue
        name = next((n for n, parts in CLASSES.items() if any(part in event.key for part in parts)), REST)
        table[name]["microseconds_an_image"] += event.device_time_total / passes / batch
        table[name]["launches"] += event.count / passes
    for name, row in table.items():
        row["floor_microseconds_an_image"] = least[name]
    return {"batch": batch, "ceilings": ceiling, "classes": table}
