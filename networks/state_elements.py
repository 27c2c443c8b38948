"""How much state a network keeps by its scales. No torch."""

from __future__ import annotations

from math import prod

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.networks.operations import Network


def state_elements(scales: Scales, network: Network) -> dict[str, int]:
    """Elements of a_hat and o_hat for one image, by layer; 0 where there is no state."""
    return {
        spec.name: prod(spec.in_shape) + prod(spec.out_shape) if scales.layers[spec.name].mode == Mode.MODIFF else 0
        for spec in network.layers
    }
