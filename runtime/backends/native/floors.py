"""The least time that a native pass can take: bytes and operations counted from the network's shapes, against ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.networks.operations import LayerSpec, Network, Norm, Role
from modiff_trt.plugins.modulated_conv.geometry import SMALL

REAL = 2  # bytes of float16


@dataclass(frozen=True)
class Work:
    """What one launch, or the launches of one class for one layer, must do for an image: bytes moved between the GPU and its
    memory, operations of INT8 and of FP16 products."""

    kind: str
    moved: float
    int8: float = 0.0
    fp16: float = 0.0

    def least(self, ceiling: Mapping[str, float]) -> float:
        """Microseconds at the ceilings."""
        products = self.int8 / ceiling["int8_operations_a_second"] + self.fp16 / ceiling["fp16_operations_a_second"]
        return 1e6 * max(self.moved / ceiling["copy_bytes_a_second"], products)


def work(network: Network, scales: Scales) -> list[Work]:
    """What a pass must do for an image, for batches so large that weights do not count."""
    return [item for spec in network.layers for item in layer_work(spec, scales.layers[spec.name].mode)]


def layer_work(spec: LayerSpec, mode: Mode) -> list[Work]:
    """What one layer adds to a pass in this mode."""
    items = []
    inputs, outputs = prod(spec.in_shape), prod(spec.out_shape)
    stored = inputs // 4 if spec.upsampled else inputs
    if mode == Mode.FLOAT:
        items.append(Work("float products", REAL * (inputs + outputs), fp16=2 * spec.macs))
    else:
        state = 4 if mode == Mode.MODIFF else 0
        items.append(Work("quantize", stored * (REAL + state) + inputs))
        accumulated = 2 * REAL if mode == Mode.MODIFF else REAL
        items.append(Work("INT8 convolution", inputs + accumulated * outputs, int8=2 * spec.macs))
    if spec.normalized is Norm.GROUP and spec.in_shape[1] * spec.in_shape[2] > SMALL:
        items.append(Work("group sums", REAL * inputs))
        if mode == Mode.FLOAT:
            items.append(Work("quantize", 2 * REAL * inputs))
    if spec.normalized is Norm.LAYER and mode == Mode.FLOAT:
        items.append(Work("quantize", 2 * REAL * inputs))
    if spec.role is Role.QKV:
        pixels = spec.out_shape[1] * spec.out_shape[2]
        # Two products of all pixels with all, over the channels of q.
        items.append(Work("attention", REAL * (outputs + inputs), fp16=4 * pixels * outputs // 3))
    return items


def floors(items: Sequence[Work], ceiling: Mapping[str, float]) -> dict[str, float]:
    """Microseconds an image and pass that each class needs at least, one launch after the other."""
    least: dict[str, float] = {}
    for item in items:
        least[item.kind] = least.get(item.kind, 0.0) + item.least(ceiling)
    return least


def pass_floor(items: Sequence[Work], ceiling: Mapping[str, float]) -> float:
    """Microseconds an image that a whole pass needs at least: launches may overlap, so that one moves data while the
    other multiplies."""
    total = Work("pass", *(sum(getattr(item, part) for item in items) for part in ("moved", "int8", "fp16")))
    return total.least(ceiling)
