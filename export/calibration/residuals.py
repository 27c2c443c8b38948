"""Residual scales from what the *quantized* layers see: x - a_hat of consecutive steps, with a_hat as they left it.

Calibration on the float network's a_i - a_(i-1) misses what quantization itself adds to a residual. Here the scales are
fitted again, by the same methods or by learning them on the layer's output as the MoDiff release does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from modiff_trt.core.grid import grid_max
from modiff_trt.core.kinds import Start
from modiff_trt.core.rows import modulated_rows
from modiff_trt.core.scales import Scales
from modiff_trt.core.state_grid import with_whole_steps
from modiff_trt.networks.modulated import QuantizedLayer, integer_product


def refit(scales: Scales, residual_scale: Mapping[str, float]) -> Scales:
    """The same scales with other residual scales for the modulated layers, and the warm-up rows that go with them."""
    names = scales.modulated
    full_range = [
        float(m) * scales.layers[n].residual_scale / residual_scale[n]
        for n, m in zip(names, scales.rows.multipliers[0], strict=True)
    ]
    bits = [scales.layers[n].act_bits for n in names]
    start = Start.EXACT if scales.rows.exact_start else Start.WARMUP
    rows = modulated_rows(scales.rows.timesteps, np.asarray(full_range), np.asarray(bits), start=start)
    layers = dict(scales.layers)
    for name in names:
        layers[name] = replace(layers[name], residual_scale=residual_scale[name])
    return with_whole_steps(replace(scales, layers=layers, rows=rows))


def learn_residual_scale(
    layer: QuantizedLayer, x: Tensor, a_hat: Tensor, iterations: int = 200, penalty: float = 1.0, learning_rate: float = 0.02
) -> float:
    """The grid step that gives the best *output* for inputs x after states a_hat, both [S, *in_shape].

    The loss of the MoDiff release: squared error of the output, plus `penalty` times the error of every output that lies
    beyond the range which the quantized layer reaches. It starts at the layer's scale (min-max), and the gradient passes
    through the rounding as in LSQ (arXiv 1902.08153). Learns log(step), so that the step stays positive.
    """
    q = grid_max(layer.bits)
    residual = (x - a_hat).detach()
    with torch.no_grad():
        base, target = integer_product(layer, a_hat), integer_product(layer, x)
    log_step = torch.zeros((), device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_step], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    best, lowest = layer.scale, float("inf")
    for _ in range(iterations):
        step = layer.scale * log_step.exp()
        cells = residual / step
        rounded = (cells + (cells.round() - cells).detach()).clamp(-q - 1, q)
        output = base + integer_product(layer, step * rounded)
        error = output - target
        beyond = (target > output.max()) | (target < output.min())
        loss = error.square().sum(1).mean() + penalty * (error.abs() * beyond).sum()
        value = float(loss.detach())
        if value < lowest:
            best, lowest = float(step.detach()), value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return best
