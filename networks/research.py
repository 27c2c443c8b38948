"""A model object with the names that the MoDiff and Q-Diffusion research code uses, for people who come from it.

It wraps the functional core and hides the state that the rest of this project passes around:

    model = QuantModel(network, checkpoint.params, scales)
    model.set_quant_state(weight_quant=True, act_quant=True)
    model.reset_cache()                # before each trajectory, never inside its loop
    for t in timesteps:
        eps = model(x, t)
"""

from __future__ import annotations

import torch
from torch import Tensor

from modiff_trt.core.context import context_arrays
from modiff_trt.core.scales import Scales
from modiff_trt.networks.binding import time_table
from modiff_trt.networks.modulated import State, initial_state, moving_shifts, quantize_layers, simulate
from modiff_trt.networks.operations import Network
from modiff_trt.networks.torch_ops import Params, run_unet


class QuantModel:
    """The simulated quantized network on the device of `params`, called with (x [N, C, H, W], t [N] or int) once per DDIM step.

    Raises ValueError for a timestep that is not the next of the scales, or another batch within a trajectory; with float
    activations there is neither. The first call after `reset_cache` also runs the warm-up rows. Activations are quantized only
    together with weights, as in the modulated layer.
    """

    def __init__(self, network: Network, params: Params, scales: Scales) -> None:
        if context_arrays(network.config.architecture):
            raise ValueError("this network is given more than noise, which this object has no place for")
        self._network = network
        self._params = dict(params)
        self._scales = scales
        self._layers = quantize_layers(network, params, scales)
        self._table = time_table(network, params)
        self._weight_quant = self._act_quant = True
        shifts = moving_shifts(network, scales)
        self._shifts = shifts.to(next(iter(params.values())).device) if shifts is not None else None
        self._state: State = {}
        self._row = 0

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        """Turns quantization on or off. Raises ValueError for quantized activations with float weights."""
        if act_quant and not weight_quant:
            raise ValueError("act_quant needs weight_quant: o_hat accumulates what integer weights produced")
        self._weight_quant, self._act_quant = weight_quant, act_quant
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forgets a_hat and o_hat; the next call begins a trajectory."""
        self._state, self._row = {}, 0

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int) -> Tensor:
        step = int(t if isinstance(t, int) else t.flatten()[0])
        if not 0 <= step < self._network.config.diffusion.num_diffusion_timesteps:
            raise ValueError(f"timestep {step} does not exist")
        if not isinstance(t, int) and not bool((t == t.flatten()[0]).all()):
            raise ValueError("all images of a trajectory are at the same timestep")
        bias = {block: table[step : step + 1] for block, table in self._table.items()}
        if not self._weight_quant:
            return run_unet(self._network, self._params, x, bound=bias)
        if not self._act_quant:
            return simulate(self._network, self._params, self._layers, {}, x, bias, {}, act_quant=False)[0]
        rows, names = self._scales.rows, self._scales.modulated
        if self._row == 0:
            self._state = {name: initial_state(self._layers[name], len(x)) for name in names}
        first, last = self._row, max(self._row, rows.warmup)
        if last >= len(rows):
            raise RuntimeError(f"the scales hold {len(rows)} rows and all have run; call reset_cache() before a trajectory")
        if step != int(rows.t[last]):
            raise ValueError(f"the scales expect timestep {int(rows.t[last])} now, found {step}; they hold for their own steps")
        if any(len(state.a_hat) != len(x) for state in self._state.values()):
            raise ValueError("the batch changed within a trajectory; call reset_cache() before another one")
        eps = x
        for row in range(first, last + 1):
            multipliers = dict(zip(names, rows.multipliers[row].tolist(), strict=True)) if names else {}
            eps, self._state = simulate(
                self._network,
                self._params,
                self._layers,
                self._state,
                x,
                bias,
                multipliers,
                exact=rows.exact_start and row == 0,
                shifts=self._shifts[row] if self._shifts is not None else None,
            )
        self._row = last + 1
        return eps
