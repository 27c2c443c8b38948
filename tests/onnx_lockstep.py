"""onnxruntime and the simulation side by side, with the same integers."""

import numpy as np
import torch

from modiff_trt.networks.binding import Binder, on_device
from modiff_trt.networks.modulated import LayerState, initial_state, integer_product, quantize_layers
from modiff_trt.networks.split import divide_skip
from modiff_trt.networks.torch_ops import run_unet


class Lockstep:
    """One pass of the simulation that takes its roundings from onnxruntime's.

    Two libraries sum a convolution or a group norm in different orders. A value that lies on the edge of two grid cells
    then falls into either, a whole grid step apart, and every later layer sees that. So the comparison is made where it
    means something: each integer may differ only on such an edge, and with the same integers eps must be equal.
    """

    def __init__(self, layers, state, multipliers, outputs):
        self.layers, self.state, self.multipliers, self.outputs = layers, state, multipliers, outputs
        self.new_state, self.elements, self.moved, self.from_edge = {}, 0, 0, 0.0

    def __call__(self, spec, x):
        layer, (a_hat, o_hat) = self.layers[spec.name], self.state[spec.name]
        x = divide_skip(spec, x, layer.skip_ratio)
        step = self.multipliers[spec.name] * layer.scale
        top = 2 ** (layer.bits - 1) - 1
        position = ((x - a_hat) / step).clamp(-top - 1, top)
        q = ((torch.from_numpy(self.outputs[f"a_hat_out.{spec.name}"]).float() - a_hat) / step).round()
        assert q.min() >= -top - 1 and q.max() <= top
        moved = q != position.round()
        self.elements, self.moved = self.elements + q.numel(), self.moved + int(moved.sum())
        # 0.5 is the edge itself; how far beyond it did onnxruntime's choice lie?
        self.from_edge = max(self.from_edge, float((position - q).abs().max()) - 0.5)
        self.new_state[spec.name] = LayerState(a_hat + step * q, o_hat + step * integer_product(layer, q))
        return self.new_state[spec.name].o_hat


def passes(case, scales, session, rows, batch=3, dtype=np.float32, context=None):
    """Runs onnxruntime and the simulation from the same state, row by row: yields (relative error of eps, Lockstep). `context`
    are arrays [batch, ...] of a network that has one."""
    network, params, names = case.network, case.checkpoint.params, scales.modulated
    layers, binder = quantize_layers(network, params, scales), Binder(network, params)
    held = binder.hold(on_device(context or {}, "cpu"))
    state = {n: initial_state(layers[n], batch) for n in names}
    torch.manual_seed(0)
    x = torch.randn(batch, *network.config.input_shape)
    for row in rows:
        t = int(scales.rows.t[row])
        feed = {"x": x.numpy(), "t": np.full(batch, t, np.int64), "row_scale": scales.rows.multipliers[row], **(context or {})}
        for n in names:
            feed |= {f"a_hat.{n}": state[n].a_hat.numpy().astype(dtype), f"o_hat.{n}": state[n].o_hat.numpy().astype(dtype)}
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
        multipliers = dict(zip(names, scales.rows.multipliers[row].tolist(), strict=True))
        lockstep = Lockstep(layers, state, multipliers, outputs)
        eps = run_unet(network, params, x, binder(slice(t, t + 1), held), lockstep).numpy()
        yield float(np.linalg.norm(outputs["eps"] - eps) / np.linalg.norm(eps)), lockstep
        state = lockstep.new_state
        x = x - 0.01 * torch.from_numpy(eps)


def all_modulated(case, **recipe):
    """The tiny random network takes such long steps that some of its residuals exceed their activations; modulate those
    layers too, so that every shape is tested."""
    kept = {name: r.activation.absmax for name, r in case.ranges.items()}
    for ranges in case.ranges.values():
        ranges.activation.absmax = max(ranges.activation.absmax, 1.01 * ranges.residual.absmax)
    try:
        scales = case.scales(**recipe)
    finally:
        for name, absmax in kept.items():
            case.ranges[name].activation.absmax = absmax
    assert len(scales.modulated) == len(case.network.layers)
    return scales
