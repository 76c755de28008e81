"""Operations on codes against ONNX Runtime, which computes them on codes itself: equal for every pair of codes.

Its models state them between DequantizeLinear and QuantizeLinear and are fused; scales have rank 0, as fusing takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme
from mlframework.quantization.int8.average_pooling import AveragePooling, Mean
from mlframework.quantization.int8.integer_operation import Addition, Concatenation, IntegerOperation, Multiplication
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.int8.operations import Int8Operation

UNSIGNED, SIGNED = QuantizationScheme(signed=False, symmetric=False), QuantizationScheme(symmetric=False)
SCHEMES = pytest.mark.parametrize("scheme", [UNSIGNED, SIGNED], ids=["uint8", "int8"])
TENSOR_TYPES = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8}

# Where 12,000 of the 65,536 sums depend on which operand the formula takes first, and as many on its fused roundings.
ORDER_MATTERS = ((0.0325, 139), (0.0195, 111), (0.013, 59))

# Scales and zero points (of unsigned codes) of two operands and the result. Powers of two make ties.
GRIDS = {
    "ordinary": ((0.0213, 131), (0.00731, 12), (0.0257, 117)),
    "right is coarser": ((0.0011, 0), (0.213, 255), (0.217, 128)),
    "ties": ((0.5, 128), (0.25, 3), (1.0, 100)),
    "odd ties": ((0.375, 7), (0.125, 200), (0.25, 251)),
    "wide": ((0.07, 90), (0.03, 160), (0.9, 33)),
    "order matters": ORDER_MATTERS,
    "order matters more than fusing": ((0.15, 243), (0.45, 85), (0.3, 199)),
    "narrow": ((0.07, 128), (0.07, 128), (0.01, 128)),
}
EVERY_GRID = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)

Grids = Sequence[tuple[float, int]]


def parameters(grids: Grids, scheme: QuantizationScheme) -> list[QuantizationParameters]:
    offset = -128 if scheme.signed else 0
    return [
        QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point + offset]), scheme)
        for scale, zero_point in grids
    ]


def session(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[QuantizationParameters],
    output: QuantizationParameters,
    constants: dict[str, np.ndarray] | None = None,
    file: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Runs nodes from the floats ``v0``, ``v1``, ... to ``result``; ``file`` is where the model is kept as it runs."""
    tensors = dict(constants or {})
    for index, grid in enumerate([*inputs, output]):
        tensors[f"s{index}"] = grid.scale.numpy().reshape(())
        tensors[f"z{index}"] = grid.zero_point.to(grid.scheme.dtype).numpy().reshape(())
    last = len(inputs)
    dequantize = [
        helper.make_node("DequantizeLinear", [f"q{index}", f"s{index}", f"z{index}"], [f"v{index}"])
        for index in range(last)
    ]
    quantize = helper.make_node("QuantizeLinear", ["result", f"s{last}", f"z{last}"], ["codes"])
    graph = helper.make_graph(
        [*dequantize, *nodes, quantize],
        "operation",
        [
            helper.make_tensor_value_info(f"q{index}", TENSOR_TYPES[grid.scheme.dtype], None)
            for index, grid in enumerate(inputs)
        ],
        [helper.make_tensor_value_info("codes", TENSOR_TYPES[output.scheme.dtype], None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if file is not None:
        options.optimized_model_filepath = str(file)
        options.log_severity_level = 3  # it says that such a file is for this machine alone
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def runtime(
    operator: str,
    inputs: Sequence[QuantizationParameters],
    output: QuantizationParameters,
    relu: bool = False,
    **attributes: Any,
) -> onnxruntime.InferenceSession:
    names = [f"v{index}" for index in range(len(inputs))]
    if not relu:
        return session([helper.make_node(operator, names, ["result"], **attributes)], inputs, output)
    nodes = [helper.make_node(operator, names, ["sum"], **attributes), helper.make_node("Relu", ["sum"], ["result"])]
    return session(nodes, inputs, output)


def run(model: onnxruntime.InferenceSession, *codes: Tensor) -> Tensor:
    (result,) = model.run(None, {f"q{index}": tensor.numpy() for index, tensor in enumerate(codes)})
    return torch.from_numpy(np.array(result))


def all_codes(scheme: QuantizationScheme) -> Tensor:
    return torch.arange(scheme.quant_min, scheme.quant_max + 1).to(scheme.dtype)


def all_pairs(scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    codes = all_codes(scheme)
    return codes.repeat_interleave(256), codes.repeat(256)


def random_codes(scheme: QuantizationScheme, *shape: int) -> Tensor:
    return torch.randint(scheme.quant_min, scheme.quant_max + 1, shape).to(scheme.dtype)


ON_TWO = {"Add": Addition(), "Mul": Multiplication()}
EVERY_OPERATOR = pytest.mark.parametrize("operator", ON_TWO)


@EVERY_OPERATOR
@SCHEMES
@EVERY_GRID
def test_every_pair_of_codes(operator: str, scheme: QuantizationScheme, grids: Grids) -> None:
    *inputs, output = parameters(grids, scheme)
    pairs = all_pairs(scheme)
    result = Int8Operation(ON_TWO[operator], inputs, output)(*pairs)
    assert torch.equal(result, run(runtime(operator, inputs, output), *pairs))


@EVERY_OPERATOR
@SCHEMES
@EVERY_GRID
def test_a_relu_is_a_saturation(operator: str, scheme: QuantizationScheme, grids: Grids) -> None:
    *inputs, output = parameters((*grids[:2], (grids[2][0], 0)), scheme)
    pairs = all_pairs(scheme)
    result = Int8Operation(ON_TWO[operator], inputs, output, (0.0, math.inf))(*pairs)
    assert torch.equal(result, run(runtime(operator, inputs, output, relu=True), *pairs))


SHAPES = [
    ((2, 3, 4, 5), (2, 3, 4, 5)),
    ((2, 3, 64, 64), (1, 3, 1, 1)),
    ((2, 3, 64, 64), (3, 1, 1)),
    ((2, 300), (2, 1)),
    ((2, 300), (300,)),
    ((300, 1), (1, 300)),
    ((7, 1, 90), (1, 40, 1)),
    ((7, 40, 1), (1, 40, 1)),
    ((40, 1, 1), (1, 40, 1)),
    ((500, 1), (1, 1)),
    ((500,), ()),
    ((1, 1), (500,)),
    ((0, 4), (4,)),
]


@EVERY_OPERATOR
@pytest.mark.parametrize("shapes", [*SHAPES, *((right, left) for left, right in SHAPES)], ids=str)
def test_operands_broadcast(operator: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    *inputs, output = parameters(ORDER_MATTERS, UNSIGNED)
    codes = [random_codes(UNSIGNED, *shape) for shape in shapes]
    result = Int8Operation(ON_TWO[operator], inputs, output)(*codes)
    expected = run(runtime(operator, inputs, output), *codes)
    assert result.shape == expected.shape
    assert torch.equal(result, expected)


@EVERY_OPERATOR
@pytest.mark.parametrize("shapes", [((1,), (1,)), ((1, 1, 1), (1,)), ((), (1, 1)), ((), ())], ids=str)
def test_operands_of_one_value_each(operator: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    *inputs, output = parameters(ORDER_MATTERS, UNSIGNED)
    operation, model = Int8Operation(ON_TWO[operator], inputs, output), runtime(operator, inputs, output)
    for _ in range(200):
        codes = [random_codes(UNSIGNED, *shape) for shape in shapes]
        result, expected = operation(*codes), run(model, *codes)
        assert result.shape == expected.shape
        assert torch.equal(result, expected)


@SCHEMES
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concatenation(scheme: QuantizationScheme, axis: int) -> None:
    grids = ((0.021, 131), (0.5, 0), (0.013, 255), (0.25, 128), (0.125, 100))
    *inputs, output = parameters((*grids, (0.25, 100)), scheme)
    inputs.append(output)  # one that is on the result's grid
    codes = [all_codes(scheme).view(2, 8, 16) for _ in inputs]
    result = Int8Operation(Concatenation(axis), inputs, output)(*codes)
    assert torch.equal(result, run(runtime("Concat", inputs, output, axis=axis), *codes))


def test_concatenation_of_unequal_parts() -> None:
    inputs = parameters(((0.021, 131), (0.5, 0)), UNSIGNED)
    parts = random_codes(UNSIGNED, 2, 3, 5), random_codes(UNSIGNED, 2, 0, 5), random_codes(UNSIGNED, 2, 1, 5)
    concatenation = Int8Operation(Concatenation(1), (*inputs, inputs[0]), inputs[1])
    expected = run(runtime("Concat", (*inputs, inputs[0]), inputs[1], axis=1), *parts)
    assert torch.equal(concatenation(*parts), expected)


def test_concatenation_of_signed_and_unsigned_codes() -> None:
    (left,), (right,) = parameters(((0.1, 100),), UNSIGNED), parameters(((0.1, 128 - 28),), SIGNED)
    result = Int8Operation(Concatenation(0), (left, right), left)(all_codes(UNSIGNED), all_codes(SIGNED))
    assert torch.equal(result, all_codes(UNSIGNED).repeat(2))


@SCHEMES
@pytest.mark.parametrize(
    "pooling", [Mean((2, 3), True), Mean((-1, 2), False), nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((7, 5))], ids=str
)
@pytest.mark.parametrize("grids", [((0.021, 131), (0.0137, 90)), ((0.5, 3), (0.25, 255)), ((0.07, 255), (0.5, 0))])
def test_global_averages(scheme: QuantizationScheme, pooling: nn.Module, grids: Grids) -> None:
    inputs, output = parameters(grids, scheme)
    codes = random_codes(scheme, 8, 50, 7, 5)
    codes[0, 0] = scheme.quant_max
    expected = run(runtime("GlobalAveragePool", [inputs], output), codes)
    result = Int8Operation(AveragePooling(pooling), [inputs], output)(codes)
    assert torch.equal(result.view(8, 50, 1, 1), expected)


@SCHEMES
@pytest.mark.parametrize(
    "pooling", [nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d((2, 3), (3, 2), (1, 0))], ids=str
)
def test_average_pools_are_depthwise_convolutions(scheme: QuantizationScheme, pooling: nn.AvgPool2d) -> None:
    """A convolution of ones from scale 1 to scale 1 requantizes exact sums with the scale of its weight."""
    grid, output = parameters(((0.0213, 131), (0.0157, 117)), scheme)
    one, to_one = (QuantizationParameters(torch.ones(1), side.zero_point, scheme) for side in (grid, output))
    kernel, stride, (bottom, right) = (
        nn.modules.utils._pair(n) for n in (pooling.kernel_size, pooling.stride, pooling.padding)
    )
    constants = {
        "ones": np.ones((6, 1, *kernel), np.int8),
        "multiplier": (grid.scale / (output.scale * math.prod(kernel))).numpy().reshape(()),
        "zero": np.int8(0).reshape(()),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["ones", "multiplier", "zero"], ["weight"]),
        helper.make_node(
            "Conv", ["v0", "weight"], ["result"], group=6, strides=stride, pads=[bottom, right, bottom, right]
        ),
    ]
    codes = random_codes(scheme, 8, 6, 17, 19)
    result = Int8Operation(AveragePooling(pooling), [grid], output)(codes)
    assert torch.equal(result, run(session(nodes, [one], to_one, constants), codes))


@SCHEMES
@pytest.mark.parametrize("grids", [((0.05, 131), (1 / 256, 0)), ((0.031, 60), (0.0041, 7)), ((0.5, 128), (0.25, 128))])
@pytest.mark.parametrize(
    ("operator", "function"),
    # A slope that float32 holds exactly: ONNX states others rounded.
    [("Sigmoid", nn.Sigmoid()), ("LeakyRelu", nn.LeakyReLU(0.125))],
    ids=["sigmoid", "leaky relu"],
)
def test_tables(scheme: QuantizationScheme, grids: Grids, operator: str, function: nn.Module) -> None:
    inputs, output = parameters(grids, scheme)
    attributes = {"alpha": function.negative_slope} if isinstance(function, nn.LeakyReLU) else {}
    expected = run(runtime(operator, [inputs], output, **attributes), all_codes(scheme))
    assert torch.equal(Int8Operation(Lookup(function), [inputs], output)(all_codes(scheme)), expected)


@SCHEMES
@pytest.mark.parametrize(
    ("operator", "count", "fused", "attributes"),
    [
        ("Add", 2, "QLinearAdd", {}),
        ("Mul", 2, "QLinearMul", {}),
        ("Concat", 3, "QLinearConcat", {"axis": 0}),
        ("GlobalAveragePool", 1, "QLinearGlobalAveragePool", {}),
        ("Sigmoid", 1, "QLinearSigmoid", {}),
        ("LeakyRelu", 1, "QLinearLeakyRelu", {"alpha": 0.125}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_runtime_computes_on_codes(
    scheme: QuantizationScheme, operator: str, count: int, fused: str, attributes: dict[str, Any], tmp_path: Path
) -> None:
    """What the other tests compare with is no float arithmetic."""
    *inputs, output = parameters(((0.1, 3),) * count + ((0.2, 5),), scheme)
    node = helper.make_node(operator, [f"v{index}" for index in range(count)], ["result"], **attributes)
    session([node], inputs, output, file=tmp_path / "fused.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node] == [fused]


def test_reports_name_the_operations() -> None:
    operations: list[IntegerOperation] = [Addition(), Multiplication(), Concatenation(1), Lookup(nn.SiLU())]
    assert [str(operation) for operation in operations] == ["sum", "product", "concat", "lookup"]
    assert str(AveragePooling(nn.AvgPool2d(2))) == "average pool"
    assert [operation.clips for operation in operations] == [True, True, False, False]
