"""The start of a trajectory for an exported file: a_hat and o_hat of every modulated layer, for one image. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from modiff_trt.core.dither import dither_offset
from modiff_trt.core.manifest import CONV_ATTRIBUTES, FUNCTION, NetworkManifest, decode_array

Array = np.ndarray[Any, np.dtype[np.float32]]
# Weights of one graph in float32: one file of more than 2 GiB cannot be.
MOST_BYTES = 2**28


def start_state(model: onnx.ModelProto, manifest: NetworkManifest, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """`a_hat.<layer>` and `o_hat.<layer>` [C, H, W] float32 by name, of the shapes of the file's inputs.

    Without dither a_hat is zero and o_hat the bias. With it, a_hat is the offset, and o_hat the bias plus the layer's
    own convolution of the offset, with the integer weights that the file holds.
    """
    start: dict[str, Array] = {}
    for layer in manifest.get("modulated", []):
        bias = decode_array(manifest["o_hat_start"][layer])
        start[f"a_hat.{layer}"] = np.zeros(shapes[f"a_hat.{layer}"], np.float32)
        start[f"o_hat.{layer}"] = np.broadcast_to(bias[:, None, None], shapes[f"o_hat.{layer}"]).copy()
    if start and manifest["dither"]:
        for layer, (offset, answer) in _answers(model, shapes, manifest["upsampled"]).items():
            start[f"a_hat.{layer}"] += offset
            start[f"o_hat.{layer}"] += answer
    return start


def _answers(
    model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], upsampled: list[str]
) -> dict[str, tuple[Array, Array]]:
    """Per layer its offset and W_q * offset, by graphs that hold nothing but those convolutions."""
    constants = {i.name: i for i in model.graph.initializer}
    opset = [o for o in model.opset_import if o.domain == ""]
    found: dict[str, tuple[Array, Array]] = {}
    nodes: list[Any] = []
    inputs: list[Any] = []
    outputs: list[Any] = []
    weights: list[Any] = []
    feed: dict[str, Array] = {}
    held = 0

    def run() -> None:
        graph = helper.make_graph(nodes, "start_state", inputs, outputs, weights)
        alone = helper.make_model(graph, opset_imports=opset, ir_version=model.ir_version).SerializeToString()
        answers = ort.InferenceSession(alone, providers=["CPUExecutionProvider"]).run(None, feed)
        found.update({layer: (feed[layer][0], np.asarray(answer[0])) for layer, answer in zip(feed, answers, strict=True)})

    # A layer is its function, or in an inlined file its convolution; both carry the convolution's attributes.
    for node in model.graph.node:
        layer = node.name
        if node.op_type not in (FUNCTION, "Conv") or f"a_hat.{layer}" not in shapes:
            continue
        weight, scale = (
            numpy_helper.to_array(constants[f"{layer}.{part}"]).astype(np.float32) for part in ("weight", "weight_scale")
        )
        if held and held + weight.nbytes > MOST_BYTES:
            run()
            nodes, inputs, outputs, weights, feed, held = [], [], [], [], {}, 0
        held += weight.nbytes
        step = float(numpy_helper.to_array(constants[f"{layer}.scale"]))
        offset = dither_offset(layer, shapes[f"a_hat.{layer}"], step, upsampled=layer in upsampled)
        weights.append(numpy_helper.from_array(weight * scale[:, None, None, None], f"w.{layer}"))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        window = {name: attributes[name] for name in CONV_ATTRIBUTES}
        nodes.append(helper.make_node("Conv", [layer, f"w.{layer}"], [f"y.{layer}"], **window))
        inputs.append(helper.make_tensor_value_info(layer, TensorProto.FLOAT, [1, *offset.shape]))
        outputs.append(helper.make_tensor_value_info(f"y.{layer}", TensorProto.FLOAT, None))
        feed[layer] = offset[None]
    if feed:
        run()
    return found
