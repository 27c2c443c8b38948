"""The UNet as ONNX nodes: the operations of `unet2d`, with the modulated layer as a local function (`function`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from modiff_trt.core.grid import SMALLEST_SCALE, grid_max
from modiff_trt.core.kinds import Mode
from modiff_trt.core.manifest import DOMAIN, FUNCTION, PLUGIN_VERSION
from modiff_trt.core.scales import LayerScales
from modiff_trt.networks.operations import LAYER_NORM_EPS, Block, LayerSpec, Network
from modiff_trt.networks.split import skip_factors

# The prompt in the graph's float type.
PROMPT = "prompt"


@dataclass(frozen=True)
class LayerConstants:
    """What a layer needs: float weight [C_out, C_in, K, K] and bias, or int8 weight with its scales."""

    weight: np.ndarray
    bias: np.ndarray
    scales: LayerScales


@dataclass(frozen=True)
class Value:
    """A tensor of the graph and its shape for one image."""

    name: str
    shape: tuple[int, ...]


def inside(kernel: int, size: int, outputs: int, *, stride: int, before: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one side of an image: the kinds of output by which elements of the kernel lie on the image and not on its padding,
    float64 [kinds, kernel], and the kind of each output, int64 [outputs]."""
    at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] - before
    kinds, of_output = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return kinds.astype(np.float64), of_output.reshape(-1).astype(np.int64)


class OnnxOps:
    """Collects nodes and initializers while `unet` runs over it.

    `dtype` is the type between layers. `dynamic` takes each sample's grid from its own largest magnitude (LTQ).
    """

    def __init__(
        self,
        network: Network,
        constants: Mapping[str, LayerConstants],
        params: Mapping[str, np.ndarray],
        modulated: tuple[str, ...],
        dtype: type[np.floating],
        dynamic: bool = False,
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._network = network
        self._constants = constants
        self._params = params
        self._columns = {name: i for i, name in enumerate(modulated)}
        self._dtype = dtype
        self._dynamic = dynamic
        self._moving: set[str] = set()
        self._type = TensorProto.FLOAT16 if dtype is np.float16 else TensorProto.FLOAT

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def real(self, name: str, array: np.ndarray | float) -> str:
        """A constant of the graph's float type."""
        return self.constant(name, np.asarray(array, self._dtype))

    def cast(self, name: str, output: str, to: int) -> str:
        return name if to == self._type and self._type == TensorProto.FLOAT else self.node("Cast", [name], output, to=to)

    def bind_prompt(self) -> None:
        """The prompt, in the graph's float type."""
        half = self._type == TensorProto.FLOAT16
        more = {"to": TensorProto.FLOAT16} if half else {}
        self.node("Cast" if half else "Identity", ["encoder_hidden_states"], PROMPT, **more)

    def split_times(self, rows: str) -> None:
        """What the timestep gives each block, from one tensor [N, sum of channels] for all."""
        rows = self.cast(rows, "time_rows_cast", self._type)
        sizes = self.constant("time_sizes", np.asarray(list(self._network.time_channels.values()), np.int64))
        outputs = [f"{block}.time" for block in self._network.time_channels]
        self.nodes.append(helper.make_node("Split", [rows, sizes], outputs, name="time_split", axis=1))

    def bind_rows(self, row_scale: str) -> None:
        """Splits the row's multipliers [L] into one scalar per modulated layer."""
        scale = self.cast(row_scale, "row_scale_cast", self._type)
        for layer, column in self._columns.items():
            index = self.constant(f"{layer}.column", np.asarray(column, np.int64))
            self.node("Gather", [scale, index], f"{layer}.multiplier", axis=0)

    def split_shifts(self, shifts: str, biases: str, names: Sequence[str]) -> None:
        """What moving grids of the layers `names` are shifted by in steps, [N, channels of the widest], and what their biases
        take of it out again, one tensor [N, sum of output channels]."""
        shifts, biases = (self.cast(value, f"{value}_cast", self._type) for value in (shifts, biases))
        start, axis = (
            self.constant("first", np.asarray([0], np.int64)),
            self.constant("axis.channels", np.asarray([1], np.int64)),
        )
        for channels in sorted({self._network.layer(name).in_shape[0] for name in names}):
            end = self.constant(f"size.{channels}", np.asarray([channels], np.int64))
            part = self.node("Slice", [shifts, start, end, axis], f"shifts.{channels}.line")
            self.node("Reshape", [part, self._column(channels)], f"shifts.{channels}")
        sizes = self.constant("shift_sizes", np.asarray([self._network.layer(name).out_shape[0] for name in names], np.int64))
        outputs = [f"{name}.of_shifts" for name in names]
        self.nodes.append(helper.make_node("Split", [biases, sizes], outputs, name="shift_split", axis=1))
        self._moving = set(names)

    def bias_of_shifts(self, name: str, shifts: np.ndarray) -> np.ndarray:
        """float64 [rows, C_out] of `shifts` [rows, C_in]: as `networks.modulated.bias_of_shifts`, by the graph's scales."""
        scale, weight = self._as_in_graph(name)
        return np.asarray(-scale * shifts.astype(np.float64) @ weight.sum((2, 3)).T)

    def _column(self, channels: int) -> str:
        """The shape of [N, channels] beside images."""
        return self.constant(f"shape.time.{channels}", np.asarray([0, channels, 1, 1], np.int64))

    def layer(self, spec: LayerSpec, x: Value) -> Value:
        name, constants = spec.name, self._constants[spec.name]
        window = {"kernel_shape": [spec.kernel] * 2, "pads": list(spec.padding), "strides": [spec.stride] * 2}
        if constants.scales.mode == Mode.FLOAT:
            weight, bias = self.real(f"{name}.weight", constants.weight), self.real(f"{name}.bias", constants.bias)
            return Value(self.node("Conv", [x.name, weight, bias], f"{name}.out", **window), spec.out_shape)
        if constants.scales.skip_ratio != 1.0:
            factors = self.real(f"{name}.skip_factors", skip_factors(spec, constants.scales.skip_ratio).reshape(-1, 1, 1))
            x = Value(self.node("Mul", [x.name, factors], f"{name}.split"), x.shape)
        q = grid_max(constants.scales.act_bits)
        grid = 1 / q if self._dynamic else constants.scales.scale
        x = self._shifted(spec, self._centered(spec, x))
        low, high = self.real(f"{name}.low", -(q + 1) * grid), self.real(f"{name}.high", q * grid)
        scale, zero = self.real(f"{name}.scale", grid), self.constant("zero", np.asarray(0, np.int8))
        integers = [
            self.constant(f"{name}.weight", constants.weight.astype(np.int8)),
            self.real(f"{name}.weight_scale", constants.scales.weight_scale),
            self.constant(f"zeros.{spec.out_shape[0]}", np.zeros(spec.out_shape[0], np.int8)),
        ]
        if constants.scales.mode == Mode.INT8:
            out = self._stateless(
                spec, x, low, high=high, grid=[scale, zero], weight=integers, bias=constants.bias, window=window
            )
            if name not in self._moving:
                return out
            back = self.node("Reshape", [f"{name}.of_shifts", self._column(spec.out_shape[0])], f"{name}.shift_bias")
            return Value(self.node("Add", [out.name, back], f"{name}.out_unshifted"), spec.out_shape)
        multiplier = f"{name}.multiplier"
        if self._dynamic:
            residual = self.node("Sub", [x.name, f"a_hat.{name}"], f"{name}.residual")
            multiplier = self._largest(residual, multiplier, q)
        inputs = [x.name, f"a_hat.{name}", f"o_hat.{name}", multiplier, low, high, scale, zero, *integers]
        outputs = [f"o_hat_out.{name}", f"a_hat_out.{name}"]
        self.nodes.append(
            helper.make_node(
                FUNCTION,
                inputs,
                outputs,
                name=name,
                domain=DOMAIN,
                plugin_namespace=DOMAIN,
                plugin_version=PLUGIN_VERSION,
                **window,
            )
        )
        return Value(outputs[0], spec.out_shape)

    def _stateless(
        self,
        spec: LayerSpec,
        x: Value,
        low: str,
        high: str,
        grid: list[str],
        weight: list[str],
        bias: np.ndarray,
        window: dict[str, list[int]],
    ) -> Value:
        name, value = spec.name, x.name
        if self._dynamic:
            largest = self._largest(value, f"{name}.largest", grid_max(self._constants[name].scales.act_bits))
            value = self.node("Div", [value, largest], f"{name}.unit")
        clipped = self.node("Clip", [value, low, high], f"{name}.clipped")
        q = self.node("QuantizeLinear", [clipped, *grid], f"{name}.q")
        d = self.node("DequantizeLinear", [q, *grid], f"{name}.d")
        w = self.node("DequantizeLinear", weight, f"{name}.w", axis=0)
        if self._constants[name].scales.zero_point:
            if any(spec.padding):
                product = self.node("Conv", [d, w], f"{name}.product", **window)
                return Value(self.node("Add", [product, self._image_of_bias(spec, bias)], f"{name}.out"), spec.out_shape)
            bias = bias + self._taps_of_center(spec).sum((1, 2))
        if not self._dynamic:
            return Value(self.node("Conv", [d, w, self.real(f"{name}.bias", bias)], f"{name}.out", **window), spec.out_shape)
        product = self.node("Conv", [d, w], f"{name}.product", **window)
        product = self.node("Mul", [product, largest], f"{name}.scaled")
        return Value(
            self.node("Add", [product, self.real(f"{name}.bias", bias.reshape(-1, 1, 1))], f"{name}.out"), spec.out_shape
        )

    def _center(self, name: str) -> float:
        """What is subtracted from a stateless layer's input, so that its grid is symmetric, as TensorRT requires: as the graph
        holds it, so that what the output gets for it is exact."""
        scales = self._constants[name].scales
        return float(self._dtype(-scales.zero_point * scales.scale))

    def _centered(self, spec: LayerSpec, x: Value) -> Value:
        if not self._constants[spec.name].scales.zero_point:
            return x
        center = self.real(f"{spec.name}.center", self._center(spec.name))
        return Value(self.node("Sub", [x.name, center], f"{spec.name}.centered"), x.shape)

    def _shifted(self, spec: LayerSpec, x: Value) -> Value:
        if spec.name not in self._moving:
            return x
        step = self.real(f"{spec.name}.scale", self._constants[spec.name].scales.scale)
        shift = self.node("Mul", [f"shifts.{spec.in_shape[0]}", step], f"{spec.name}.shift")
        return Value(self.node("Add", [x.name, shift], f"{spec.name}.shifted"), x.shape)

    def _as_in_graph(self, name: str) -> tuple[float, np.ndarray]:
        """The activation's scale and the dequantized weight [C_out, C_in, K, K] as the graph has them, in float64."""
        constants = self._constants[name]
        weight_scale = constants.scales.weight_scale.astype(self._dtype).astype(np.float64)
        weight = constants.weight.astype(np.float64) * weight_scale[:, None, None, None]
        return float(self._dtype(constants.scales.scale)), weight

    def _taps_of_center(self, spec: LayerSpec) -> np.ndarray:
        """float64 [C_out, K, K]: what an input that is the center everywhere adds to an output, by element of the kernel."""
        return np.asarray(self._center(spec.name) * self._as_in_graph(spec.name)[1].sum(1))

    def _image_of_bias(self, spec: LayerSpec, bias: np.ndarray) -> str:
        """bias + the layer's product of its center [C_out, P, Q]. Zeros pad what is quantized and not the center, so that it is
        another at the image's edges: one line for each kind of row and of column, and constant indices that repeat them."""
        taps = self._taps_of_center(spec)
        top, left, _, _ = spec.padding
        rows, row_of = inside(spec.kernel, spec.in_shape[1], spec.out_shape[1], stride=spec.stride, before=top)
        columns, column_of = inside(spec.kernel, spec.in_shape[2], spec.out_shape[2], stride=spec.stride, before=left)
        table = bias[:, None, None] + np.einsum("kij,ri,cj->krc", taps, rows, columns)
        name = f"{spec.name}.bias"
        lines = [self.real(name, table), self.constant(f"{name}.rows", row_of)]
        whole = self.node("Gather", lines, f"{name}.of_rows", axis=1)
        return self.node("Gather", [whole, self.constant(f"{name}.columns", column_of)], f"{name}.image", axis=2)

    def _largest(self, x: str, output: str, top: int) -> str:
        """max |x| of each sample [N, 1, 1, 1], which takes the place of the multiplier on a grid that spans -1..1 in `top`
        steps."""
        axes = self.constant("axes.sample", np.asarray([1, 2, 3], np.int64))
        peak = self.node("ReduceMax", [self.node("Abs", [x], f"{output}.abs"), axes], f"{output}.max", keepdims=1)
        smallest = max(top * SMALLEST_SCALE, float(np.finfo(self._dtype).tiny))
        return self.node("Max", [peak, self.real(f"smallest.{top}", smallest)], output)

    def norm(self, name: str, x: Value, groups: int, eps: float) -> Value:
        """GroupNorm with statistics in float32, over [N, groups, C/groups * H * W]."""
        channels, height, width = x.shape
        wide = self.cast(x.name, f"{name}.wide", TensorProto.FLOAT)
        grouped = self.constant(f"shape.groups.{groups}", np.asarray([0, groups, -1], np.int64))
        h = self.node("Reshape", [wide, grouped], f"{name}.grouped")
        ones, zeros = (
            self.constant(f"groups.one.{groups}", np.ones(groups, np.float32)),
            self.constant(f"groups.zero.{groups}", np.zeros(groups, np.float32)),
        )
        h = self.node("InstanceNormalization", [h, ones, zeros], f"{name}.normalized", epsilon=eps)
        back = self.constant(f"shape.image.{channels}.{height}.{width}", np.asarray([0, channels, height, width], np.int64))
        h = self.node("Reshape", [h, back], f"{name}.image")
        gain = self.constant(f"{name}.weight", self._params[f"{name}.weight"].astype(np.float32).reshape(-1, 1, 1))
        shift = self.constant(f"{name}.bias", self._params[f"{name}.bias"].astype(np.float32).reshape(-1, 1, 1))
        h = self.node("Mul", [h, gain], f"{name}.scaled")
        h = self.node("Add", [h, shift], f"{name}.shifted")
        return Value(self.cast(h, f"{name}.out", self._type), x.shape)

    def norm_silu(self, name: str, x: Value, groups: int, eps: float) -> Value:
        return self._silu(name, self.norm(name, x, groups, eps))

    def timed_norm_silu(self, block: str, name: str, x: Value, groups: int, eps: float) -> Value:
        channels = x.shape[0]
        h = self.norm(name, x, groups, eps)
        both = self.node("Reshape", [f"{block}.time", self._column(2 * channels)], f"{block}.time_both")
        scale, shift = f"{block}.time_scale", f"{block}.time_shift"
        sizes = self.constant(f"sizes.time.{channels}", np.full(2, channels, np.int64))
        self.nodes.append(helper.make_node("Split", [both, sizes], [scale, shift], name=f"{block}.time_parts", axis=1))
        gain = self.node("Add", [scale, self.real("one", 1.0)], f"{block}.time_gain")
        gained = self.node("Mul", [h.name, gain], f"{block}.gained")
        return self._silu(name, Value(self.node("Add", [gained, shift], f"{block}.timed"), x.shape))

    def _silu(self, name: str, h: Value) -> Value:
        gate = self.node("Sigmoid", [h.name], f"{name}.gate")
        return Value(self.node("Mul", [h.name, gate], f"{name}.silu"), h.shape)

    def add(self, a: Value, b: Value) -> Value:
        return Value(self.node("Add", [a.name, b.name], f"{a.name}+{b.name}"), a.shape)

    def add_time(self, block: str, x: Value, channels: int) -> Value:
        bias = self.node("Reshape", [f"{block}.time", self._column(channels)], f"{block}.time_bias")
        return Value(self.node("Add", [x.name, bias], f"{block}.timed"), x.shape)

    def concat(self, a: Value, b: Value) -> Value:
        out = self.node("Concat", [a.name, b.name], f"concat.{len(self.nodes)}", axis=1)
        return Value(out, (a.shape[0] + b.shape[0], *a.shape[1:]))

    def attention(self, qkv: Value, channels: int, heads: int) -> Value:
        _, height, width = qkv.shape
        prefix = f"attention.{len(self.nodes)}"
        # One head has an axis too: without it TensorRT does not fuse attention.
        parts = [0, 3 * heads, channels // heads, -1]
        flat = self.constant(f"shape.qkv.{'.'.join(map(str, parts))}", np.asarray(parts, np.int64))
        flat_qkv = self.node("Reshape", [qkv.name, flat], f"{prefix}.qkv")
        sizes = self.constant(f"sizes.qkv.{parts[1] // 3}", np.full(3, parts[1] // 3, np.int64))
        q, k, v = (f"{prefix}.{part}" for part in "qkv")
        self.nodes.append(helper.make_node("Split", [flat_qkv, sizes], [q, k, v], name=f"{prefix}.split", axis=1))
        return self._attend(prefix, q, k, v, heads=heads, shape=(channels, height, width))

    def cross_attention(self, name: str, q: Value, channels: int, heads: int) -> Value:
        """Keys and values are computed from the prompt in the graph: a thousandth of its work, and one input for all."""
        parts = [0, heads, channels // heads, -1]
        flat = self.constant(f"shape.heads.{'.'.join(map(str, parts))}", np.asarray(parts, np.int64))
        found = [self.node("Reshape", [q.name, flat], f"{name}.q")]
        for part in ("to_k", "to_v"):
            weight = self.real(f"{name}.{part}.weight", self._params[f"{name}.{part}.weight"].T)
            h = self.node("MatMul", [PROMPT, weight], f"{name}.{part}.tokens")
            h = self.node("Transpose", [h], f"{name}.{part}.channels", perm=[0, 2, 1])
            found.append(self.node("Reshape", [h, flat], f"{name}.{part}.heads"))
        return self._attend(name, *found, heads=heads, shape=q.shape)

    def _attend(self, prefix: str, q: str, k: str, v: str, *, heads: int, shape: tuple[int, ...]) -> Value:
        """Of q, k and v [N, heads, C/heads, tokens]; softmax in float32.

        In this order of products TensorRT takes all of it as one fused kernel, and never writes the scores."""
        each = shape[0] // heads
        swapped = [0, 1, 3, 2]
        q = self.node("Transpose", [q], f"{prefix}.qt", perm=swapped)
        q = self.node("Mul", [q, self.real(f"attention.scale.{each}", each**-0.5)], f"{prefix}.q_scaled")
        scores = self.node("MatMul", [q, k], f"{prefix}.scores")
        scores = self.cast(scores, f"{prefix}.scores_wide", TensorProto.FLOAT)
        weights = self.node("Softmax", [scores], f"{prefix}.softmax", axis=-1)
        weights = self.cast(weights, f"{prefix}.softmax_cast", self._type)
        v = self.node("Transpose", [v], f"{prefix}.vt", perm=swapped)
        out = self.node("MatMul", [weights, v], f"{prefix}.mixed")
        out = self.node("Transpose", [out], f"{prefix}.mixed_back", perm=swapped)
        back = self.constant(f"shape.image.{'.'.join(map(str, shape))}", np.asarray([0, *shape], np.int64))
        return Value(self.node("Reshape", [out, back], f"{prefix}.out"), shape)

    def layer_norm(self, name: str, x: Value) -> Value:
        """Over the channels, statistics in float32."""
        wide = self.cast(x.name, f"{name}.wide", TensorProto.FLOAT)
        last = self.node("Transpose", [wide], f"{name}.last", perm=[0, 2, 3, 1])
        gain, shift = (
            self.constant(f"{name}.{part}", self._params[f"{name}.{part}"].astype(np.float32)) for part in ("weight", "bias")
        )
        h = self.node("LayerNormalization", [last, gain, shift], f"{name}.normalized", axis=-1, epsilon=LAYER_NORM_EPS)
        h = self.node("Transpose", [h], f"{name}.first", perm=[0, 3, 1, 2])
        return Value(self.cast(h, f"{name}.out", self._type), x.shape)

    def geglu(self, x: Value) -> Value:
        half = x.shape[0] // 2
        sizes = self.constant(f"sizes.geglu.{half}", np.full(2, half, np.int64))
        value, gate = f"{x.name}.value", f"{x.name}.gate"
        self.nodes.append(helper.make_node("Split", [x.name, sizes], [value, gate], name=f"{x.name}.parts", axis=1))
        gate = self.node("Gelu", [gate], f"{x.name}.gelu")
        return Value(self.node("Mul", [value, gate], f"{x.name}.geglu"), (half, *x.shape[1:]))

    def upsample(self, x: Value) -> Value:
        factor = self.constant("upsample.scales", np.asarray([1, 1, 2, 2], np.float32))
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        out = self.node("Resize", [x.name, "", factor], f"upsample.{len(self.nodes)}", **attributes)
        return Value(out, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2]))

    def avg_pool(self, x: Value) -> Value:
        out = self.node("AveragePool", [x.name], f"pool.{len(self.nodes)}", kernel_shape=[2, 2], strides=[2, 2])
        return Value(out, (x.shape[0], x.shape[1] // 2, x.shape[2] // 2))

    def block(self, name: str, body: Block, x: Value) -> Value:
        return body(self, x)
