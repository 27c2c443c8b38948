"""The modulated layer as a function of domain `modiff`, whose body is standard operators with the QDQ pattern. A runtime that
knows nothing of it inlines the body; TensorRT takes a registered plugin of that name, version and namespace.
"""

from __future__ import annotations

import onnx
from onnx import helper

from modiff_trt.core.manifest import CONV_ATTRIBUTES, DOMAIN, FUNCTION

OPSET = 21
IR_VERSION = 10


def modulated_conv_function() -> onnx.FunctionProto:
    """`ModulatedConv`: (o_hat', a_hat') from x, a_hat, o_hat, the row's multiplier and the layer's constants.

    Every Q/DQ scale is a constant of the caller; the multiplier stays outside Q/DQ because TensorRT cannot build an
    INT8 convolution from a scale that it does not know. `low` and `high` bound the residual to the grid of fewer
    than 8 bits; for 8 bits they change nothing.
    """
    node = helper.make_node
    conv = node("Conv", ["d", "w"], ["y"])
    for name in CONV_ATTRIBUTES:
        reference = onnx.AttributeProto()
        reference.name = reference.ref_attr_name = name
        reference.type = onnx.AttributeProto.INTS
        conv.attribute.append(reference)
    body = [
        node("Sub", ["x", "a_hat"], ["r"]),
        node("Div", ["r", "m"], ["rm"]),
        node("Clip", ["rm", "low", "high"], ["rc"]),
        node("QuantizeLinear", ["rc", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("Mul", ["d", "m"], ["dm"]),
        node("Add", ["a_hat", "dm"], ["a_hat_out"]),
        node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=0),
        conv,
        node("Mul", ["y", "m"], ["ym"]),
        node("Add", ["ym", "o_hat"], ["o_hat_out"]),
    ]
    inputs = ["x", "a_hat", "o_hat", "m", "low", "high", "scale", "zero", "weight", "weight_scale", "weight_zero"]
    return helper.make_function(
        DOMAIN,
        FUNCTION,
        inputs,
        ["o_hat_out", "a_hat_out"],
        body,
        [helper.make_opsetid("", OPSET)],
        attributes=list(CONV_ATTRIBUTES),
    )
