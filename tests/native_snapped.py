"""The simulation on the native backend's own grids, so that both round the same values."""

from dataclasses import replace

from modiff_trt.networks.modulated import LayerState
from modiff_trt.runtime.backends.native.layers import build
from modiff_trt.runtime.backends.torch_denoiser import SimDenoiser


class Snapped(SimDenoiser):
    """The simulation on the native grids: steps and the start of a_hat are whole numbers of each layer's unit."""

    def __init__(self, case, scales):
        super().__init__(case.network, case.checkpoint.params, scales)
        self._native = build(case.network, case.checkpoint.params, scales)
        multipliers = scales.rows.multipliers.copy()
        for column, name in enumerate(scales.modulated):
            at = self._native.layers[name].grid_at
            multipliers[:, column] = self._native.table[:, at + 3].numpy() / scales.layers[name].scale
        self._rows = replace(scales.rows, multipliers=multipliers)

    def reset(self, batch, context=None):
        super().reset(batch, context)
        for name, (state, o_hat) in self._native.start.items():
            spec, unit = self._network.layer(name), self._native.layers[name].unit
            half = 2 if spec.upsampled else 1
            a_hat = (state.float() * unit).T.reshape(spec.in_shape[0], spec.in_shape[1] // half, -1)
            a_hat = a_hat.repeat_interleave(half, 1).repeat_interleave(half, 2)
            o_hat = o_hat.T[: spec.out_shape[0]].reshape(spec.out_shape)
            self._state[name] = LayerState(a_hat.repeat(batch, 1, 1, 1), o_hat.repeat(batch, 1, 1, 1))
