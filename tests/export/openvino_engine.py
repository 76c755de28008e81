"""OpenVINO on one thread, and whether its integer products are exact on this processor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from onnx import TensorProto, helper, numpy_helper

_CHANNELS = 64


def compiled_model(model: Path | bytes) -> Any:
    """A file as the CPU runs it; what is left in floats computes in float32."""
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(openvino.Core().read_model(model), "CPU", settings)


@functools.cache
def openvino_saturates() -> bool:
    """Whether the largest products come out wrong, as they do on x86 without VNNI, where they saturate in pairs."""
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "codes": np.full((_CHANNELS, _CHANNELS, 1, 1), 127, np.int8),
        "scales": np.ones(_CHANNELS, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "one", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0),
        helper.make_node("Conv", ["values", "weight"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _CHANNELS, 4, 4]) for name in "xy")
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "largest_products", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sums = compiled_model(model.SerializeToString())([np.full((1, _CHANNELS, 4, 4), 255, np.float32)])[0]
    return bool((sums != 255 * 127 * _CHANNELS).any())
