"""What the timestep gives each block, as ONNX nodes: tables looked up by the input `t`, and conditions of each image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from modiff_trt.core.kinds import Mode
from modiff_trt.core.moving_grids import shifts
from modiff_trt.core.scales import Scales
from modiff_trt.export.onnx.ops import OnnxOps
from modiff_trt.networks.operations import Network


@dataclass(frozen=True)
class TimeLines:
    """Which lines of tables by timestep a file keeps, all where `kept` is None, and the tensor int64 [N] that says which of
    them `t` [N] asks for."""

    kept: list[int] | None
    line: str

    def of(self, ops: OnnxOps, table: np.ndarray, name: str) -> str:
        """The lines of a table [T, C] that `t` asks for, float32 [N, C]."""
        return self.of_kept(ops, table if self.kept is None else table[self.kept], name)

    def of_kept(self, ops: OnnxOps, table: np.ndarray, name: str) -> str:
        """The same of a table that has the kept lines alone."""
        return ops.node("Gather", [ops.constant(f"{name}_table", table.astype(np.float32)), self.line], f"{name}_rows", axis=0)


def bind_lines(ops: OnnxOps, timesteps: Collection[int] | None, steps: int) -> TimeLines:
    """Only lines of `timesteps` are kept, where they are given: a trained process has a thousand, a sampler some tens. See
    `only_known_times`."""
    if timesteps is None:
        return TimeLines(None, "t")
    kept = sorted(set(timesteps))
    lines = np.zeros(steps, np.int64)
    lines[kept] = np.arange(len(kept))
    return TimeLines(kept, ops.node("Gather", [ops.constant("time_lines", lines), "t"], "time_line", axis=0))


def bind_times(ops: OnnxOps, network: Network, table: Mapping[str, np.ndarray], lines: TimeLines) -> None:
    """Looks up what the timestep gives all blocks, in one table [T, sum of channels], float32, by `t` [N]."""
    whole = np.concatenate([table[b] for b in network.time_channels], axis=1)
    ops.split_times(lines.of(ops, whole, "time"))


def bind_moving_grids(ops: OnnxOps, network: Network, scales: Scales, lines: TimeLines) -> None:
    """Looks up what layers without state shift their grids by at the timestep `t` [N], and what their biases make of it."""
    names = [name for name, layer in scales.layers.items() if layer.mode == Mode.INT8]
    if not scales.moving_grids or not names or lines.kept is None:
        return
    moved = shifts(np.asarray(lines.kept), max(network.layer(name).in_shape[0] for name in names))
    biases = [ops.bias_of_shifts(name, moved[:, : network.layer(name).in_shape[0]]) for name in names]
    back = lines.of_kept(ops, np.concatenate(biases, axis=1), "shift_bias")
    ops.split_shifts(lines.of_kept(ops, moved, "shift"), back, names)


def only_known_times(ops: OnnxOps, eps: str, output: str, *, timesteps: Collection[int], steps: int) -> None:
    """`output` is `eps` [N, C, H, W], float32, and NaN for an image whose timestep has no line, so that it cannot pass for
    right. In the table itself NaN would vanish: it is quantized like any number."""
    known = np.full(steps, np.nan, np.float32)
    known[sorted(set(timesteps))] = 0
    known_now = ops.node("Gather", [ops.constant("time_known", known), "t"], "time_known_now", axis=0)
    shape = ops.constant("shape.image_scalar", np.asarray([-1, 1, 1, 1], np.int64))
    ops.node("Add", [eps, ops.node("Reshape", [known_now, shape], "time_known_image")], output)


def bind_conditions(
    ops: OnnxOps, network: Network, params: Mapping[str, np.ndarray], *, table: np.ndarray, lines: TimeLines
) -> None:
    """What the timestep gives all blocks together with what a class or a prompt as a whole says of each image, by the names
    of `networks.binding`; `table` float32 [T, C] is the embedding of each timestep, before anything is added to it."""
    a = network.config.architecture

    def linear(x: str, names: list[str], output: str) -> str:
        weight = np.concatenate([params[f"{name}.weight"] for name in names]).T
        bias = np.concatenate([params[f"{name}.bias"] for name in names])
        inputs = [x, ops.constant(f"{output}.weight", weight), ops.constant(f"{output}.bias", bias)]
        return ops.node("Gemm", inputs, output)

    def silu(x: str) -> str:
        return ops.node("Mul", [x, ops.node("Sigmoid", [x], f"{x}.gate")], f"{x}.silu")

    h = lines.of(ops, table, "time")
    if a.classes:
        classes = ops.constant("class_embedding.weight", params["class_embedding.weight"])
        h = ops.node("Add", [h, ops.node("Gather", [classes, "class_labels"], "class_rows", axis=0)], "classed")
    if a.added_channels:
        # Sinusoids of each time id, beside the prompt as a whole.
        half = a.added_times // 2
        frequency = np.exp(np.arange(half) * (-np.log(10000) / (half - a.freq_shift))).astype(np.float32)
        axes = ops.constant("axes.last", np.asarray([-1], np.int64))
        ids = ops.node("Unsqueeze", ["time_ids", axes], "time_ids.last")
        angle = ops.node("Mul", [ids, ops.constant("time_ids.frequency", frequency)], "time_ids.angle")
        waves = [ops.node(op, [angle], f"time_ids.{op.lower()}") for op in ("Sin", "Cos")]
        waves = waves[::-1] if a.flip_sin_to_cos else waves
        waved = ops.node("Concat", waves, "time_ids.waves", axis=2)
        flat = ops.constant("shape.time_ids", np.asarray([0, -1], np.int64))
        waved = ops.node("Reshape", [waved, flat], "time_ids.flat")
        both = ops.node("Concat", ["text_embeds", waved], "added", axis=1)
        both = silu(linear(both, ["add_embedding.linear_1"], "added.linear_1"))
        h = ops.node("Add", [h, linear(both, ["add_embedding.linear_2"], "added.linear_2")], "embedded")
    projections = [f"{block}.time_emb_proj" for block in network.time_channels]
    ops.split_times(linear(silu(h), projections, "time_projections"))
