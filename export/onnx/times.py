"""What the timestep gives each block, as ONNX nodes: tables looked up by the input `t`, and conditions of each image."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from modiff_trt.export.onnx.ops import OnnxOps
from modiff_trt.networks.operations import Network


def bind_times(ops: OnnxOps, network: Network, table: Mapping[str, np.ndarray], timesteps: Collection[int] | None) -> None:
    """Looks up what the timestep gives all blocks, in one table [T, sum of channels], float32, by `t` [N]."""
    whole = np.concatenate([table[b] for b in network.time_channels], axis=1)
    ops.split_times(_time_lines(ops, whole, timesteps))


def _time_lines(ops: OnnxOps, table: np.ndarray, timesteps: Collection[int] | None) -> str:
    """The lines of a table [T, C] that `t` asks for. Only lines of `timesteps` are kept, where they are given: a trained
    process has a thousand, a sampler some tens. See `only_known_times`."""
    table, line = table.astype(np.float32), "t"
    if timesteps is not None:
        kept = sorted(set(timesteps))
        lines = np.zeros(len(table), np.int64)
        lines[kept] = np.arange(len(kept))
        line = ops.node("Gather", [ops.constant("time_lines", lines), "t"], "time_line", axis=0)
        table = table[kept]
    return ops.node("Gather", [ops.constant("time_table", table), line], "time_rows", axis=0)


def only_known_times(ops: OnnxOps, eps: str, output: str, *, timesteps: Collection[int], steps: int) -> None:
    """`output` is `eps` [N, C, H, W], float32, and NaN for an image whose timestep has no line, so that it cannot pass for
    right. In the table itself NaN would vanish: it is quantized like any number."""
    known = np.full(steps, np.nan, np.float32)
    known[sorted(set(timesteps))] = 0
    known_now = ops.node("Gather", [ops.constant("time_known", known), "t"], "time_known_now", axis=0)
    shape = ops.constant("shape.image_scalar", np.asarray([-1, 1, 1, 1], np.int64))
    ops.node("Add", [eps, ops.node("Reshape", [known_now, shape], "time_known_image")], output)


def bind_conditions(
    ops: OnnxOps, network: Network, params: Mapping[str, np.ndarray], *, table: np.ndarray, timesteps: Collection[int] | None
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

    h = _time_lines(ops, table, timesteps)
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
