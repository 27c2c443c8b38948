"""Bias correction (arXiv 1906.04721, section 4.2): what rounding a layer's weights adds to its output on average is taken from
its bias.

A rounded weight is off by dW, and an input of mean m adds dW m to every pixel of a channel, at every step. A sampler adds such
shifts up over all of its steps, where errors without a mean cancel. A bias is one for all steps, and the mean of an input is
not. So steps count by what the final image makes of an error in them (`Updates.sensitivity`), and the sum is zero to first
order. With all steps counting alike, 50 steps of DDIM gained as much, and 15 of DPM-Solver++ lost 7 dB (docs/lab/modes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from modiff_trt.core.kinds import Mode
from modiff_trt.core.scales import Scales
from modiff_trt.export.calibration.ranges import LayerRanges
from modiff_trt.networks.operations import Network
from modiff_trt.networks.quantizers import quantize_weight, unpack_rounding
from modiff_trt.networks.split import fold_skip, skip_factors
from modiff_trt.networks.torch_ops import Params, layer_weight


def correct_biases(network: Network, params: Params, scales: Scales, ranges: Mapping[str, LayerRanges]) -> Scales:
    """The same scales with a shift for the bias of every quantized layer: minus the mean, over the inputs that `ranges` have
    seen at the scales' `range_steps`, of what the rounding of its weights adds to each output channel."""
    updates = scales.solver.updates(network.config.diffusion, scales.rows.timesteps)
    share = np.abs(updates.sensitivity[scales.range_steps])
    steps = torch.from_numpy(share / share.sum()).reshape(-1, 1, 1, 1)
    layers = dict(scales.layers)
    for spec in network.layers:
        entry = layers[spec.name]
        if entry.mode == Mode.FLOAT:
            continue
        weight = fold_skip(spec, layer_weight(spec, params).cpu(), entry.skip_ratio)
        scale = torch.from_numpy(entry.weight_scale)
        integers = quantize_weight(weight, scale, entry.weight_bits, round_up=unpack_rounding(entry.round_up, weight))
        off = integers.double() * scale.double().reshape(-1, 1, 1, 1) - weight.double()
        mean = (steps * ranges[spec.name].patch_means).sum(0)
        mean *= torch.from_numpy(skip_factors(spec, entry.skip_ratio)).double().reshape(-1, 1, 1)
        shift = -(off * mean).sum((1, 2, 3))
        layers[spec.name] = replace(entry, bias_shift=shift.numpy().astype(np.float32))
    return replace(scales, layers=layers)
