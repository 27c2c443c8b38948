"""Random small networks over the operations: what follows what, and which values are used again, comes from a seed."""

from random import Random

from conftest import make_case, tiny_config
from small_network import random_params

from modiff_trt.export.calibration.modes import with_modes
from modiff_trt.networks.checkpoint import Checkpoint
from modiff_trt.networks.operations import Role, convolution, traced
from modiff_trt.networks.unet2d import pixel_attention, resnet

A = tiny_config(8, (1,), ()).architecture
SIZE, MOST_CHANNELS, CHANNELS = 8, 128, (32, 64)


class RandomFunction:
    """The same operations for the same seed, whatever computes them. `kinds` counts what has been used."""

    def __init__(self, seed):
        self._seed = seed
        self.kinds = {}

    def __call__(self, ops, x):
        rng = Random(self._seed)
        first = convolution("conv_in", (3, SIZE, SIZE), 32, 3, role=Role.INPUT)
        values = [(ops.layer(first, x), first.out_shape)]
        for i in range(12):
            kind = rng.choice([name for name in vars(type(self)) if name.startswith("_do")])
            done = getattr(self, kind)(ops, rng, f"n{i}", values)
            if done is not None:
                values.append(done)
                self.kinds[kind] = self.kinds.get(kind, 0) + 1
        x, shape = values[-1]
        while shape[1] > SIZE:
            x, shape = ops.avg_pool(x), (shape[0], shape[1] // 2, shape[2] // 2)
        while shape[1] < SIZE:
            x, shape = ops.upsample(x), (shape[0], shape[1] * 2, shape[2] * 2)
        return ops.layer(convolution("conv_out", shape, 3, 3, role=Role.OUTPUT), x)

    def _do_convolution(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        stride = rng.choice([1, 1, 2]) if shape[1] > 2 else 1
        spec = convolution(name, shape, rng.choice(CHANNELS), rng.choice([1, 3]) if stride == 1 else 3, stride=stride)
        return ops.layer(spec, x), spec.out_shape

    def _do_norm(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return ops.norm(name, x, A.groups, A.eps), shape

    def _do_norm_silu(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return ops.norm_silu(name, x, A.groups, A.eps), shape

    def _do_timed_norm_silu(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return ops.timed_norm_silu(name, f"{name}.norm", x, A.groups, A.eps), shape

    def _do_layer_norm(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return ops.layer_norm(name, x), shape

    def _do_geglu(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[0] % 64:
            return None
        return ops.geglu(x), (shape[0] // 2, *shape[1:])

    def _do_time(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return ops.add_time(name, x, shape[0]), shape

    def _do_add(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        other = rng.choice([v for v in values if v[1] == shape])[0]
        return ops.add(*((x, other) if rng.random() < 0.5 else (other, x))), shape

    def _do_concat(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        other, more = rng.choice([v for v in values if v[1][1:] == shape[1:]])
        if shape[0] + more[0] > MOST_CHANNELS:
            return None
        return ops.concat(x, other), (shape[0] + more[0], *shape[1:])

    def _do_attention(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[0] % 96:
            spec = convolution(name, shape, 96, 1, role=Role.QKV)
            x, shape = ops.layer(spec, x), spec.out_shape
        return ops.attention(x, shape[0] // 3, rng.choice([1, 2])), (shape[0] // 3, *shape[1:])

    def _do_upsample(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[1] >= SIZE:
            return None
        return ops.upsample(x), (shape[0], 2 * shape[1], 2 * shape[2])

    def _do_upsampled_convolution(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[1] >= SIZE:
            return None
        spec = convolution(name, (shape[0], 2 * shape[1], 2 * shape[2]), rng.choice(CHANNELS), 3, upsampled=True)
        return ops.layer(spec, ops.upsample(x)), spec.out_shape

    def _do_pool(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[1] <= 2:
            return None
        return ops.avg_pool(x), (shape[0], shape[1] // 2, shape[2] // 2)

    def _do_resnet_block(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        channels = rng.choice(CHANNELS)
        return resnet(ops, A, name, x, shape, channels), (channels, *shape[1:])

    def _do_halving_resnet_block(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[1] <= 2:
            return None
        return resnet(ops, A, name, x, shape, shape[0], half=True), (shape[0], shape[1] // 2, shape[2] // 2)

    def _do_doubling_resnet_block(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        if shape[1] >= SIZE:
            return None
        return resnet(ops, A, name, x, shape, shape[0], double=True), (shape[0], 2 * shape[1], 2 * shape[2])

    def _do_attention_block(self, ops, rng, name, values):
        x, shape = rng.choice(values[-3:])
        return pixel_attention(ops, A, name, x, shape, rng.choice([1, 2])), shape


def random_case(seed, function=None):
    """A random network (or `function`) with random weights, calibrated on three steps of two images."""
    network = traced(tiny_config(SIZE, (1,), ()), function or RandomFunction(seed))
    return make_case(network, Checkpoint(random_params(network, seed), f"random-{seed}", ""), 3, 2, 3)


def random_modes(case, seed):
    """Scales with a mode for each layer, by a seed."""
    rng, scales = Random(seed), case.scales()
    modes = {name: rng.choice(["int8", "float", layer.mode, layer.mode]) for name, layer in scales.layers.items()}
    return with_modes(scales, {name: mode for name, mode in modes.items() if mode != scales.layers[name].mode})


def in_float(case):
    scales = case.scales()
    return with_modes(scales, dict.fromkeys(scales.layers, "float"))
