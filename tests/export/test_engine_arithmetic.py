"""ONNX Runtime's integer operators compute this library's arithmetic: what an exported file stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from mlframework.quantization import QuantizationScheme, arithmetic

DTYPES = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8}
EVERY_CODE = torch.arange(256)

Grid = tuple[Tensor, Tensor]  # scale and zero point


class Graph:
    """Quantize and dequantize nodes around one operation, scales of rank 0."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        self.dtype = dtype
        self.folder = folder
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def call(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def input(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> str:
        name = f"input_{len(self.inputs)}"
        shape = [f"{name}_{index}" for index in range(codes.dim())]
        self.inputs.append(helper.make_tensor_value_info(name, DTYPES[self.dtype], shape))
        return self.call("DequantizeLinear", name, *self._grid(scale, zero_point))

    def _grid(self, scale: Tensor, zero_point: Tensor) -> tuple[str, str]:
        return self.constant(scale.numpy().reshape(())), self.constant(zero_point.to(self.dtype).numpy().reshape(()))

    def run(self, fused: str, value: str, grid: Grid, *codes: Tensor) -> Tensor:
        """The output's codes, from a kernel of that kind."""
        output = self.call("QuantizeLinear", value, *self._grid(*grid))
        shape = [f"output_{index}" for index in range(max(part.dim() for part in codes))]
        outputs = [helper.make_tensor_value_info(output, DTYPES[self.dtype], shape)]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(self.folder / "optimized.onnx")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert fused in [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        feed = {value.name: part.numpy() for value, part in zip(session.get_inputs(), codes, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])


def _random_grid(dtype: torch.dtype, tie: bool) -> Grid:
    scale = torch.exp(torch.empty(1).uniform_(-6, 1))
    if tie:  # powers of two put many sums half-way between two codes
        scale = 2.0 ** torch.round(torch.log2(scale))
    ends = torch.iinfo(dtype)
    return scale, torch.randint(ends.min, ends.max + 1, (1,))


def _scheme(dtype: torch.dtype) -> QuantizationScheme:
    return QuantizationScheme(signed=dtype is torch.int8, symmetric=False)


def _pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = (EVERY_CODE + torch.iinfo(dtype).min).to(dtype)
    return codes.repeat_interleave(256), codes.repeat(256)


EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
TRIALS = 40


@EVERY_DTYPE
def test_sums_of_every_pair_of_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    left, right = _pairs(dtype)
    ends = torch.iinfo(dtype)
    for trial in range(TRIALS):
        one, other, output = (_random_grid(dtype, tie=trial % 2 == 0) for _ in range(3))
        graph = Graph(dtype, tmp_path)
        total = graph.call("Add", graph.input(left, *one), graph.input(right, *other))
        actual = graph.run("QLinearAdd", total, output, left, right)
        left_ratio, right_ratio, constant = arithmetic.add_constants(*one, *other, *output)
        expected = arithmetic.add_codes(left, left_ratio, right, right_ratio, constant, ends.min, ends.max, dtype)
        assert torch.equal(actual, expected)


@EVERY_DTYPE
def test_products_of_every_pair_of_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    left, right = _pairs(dtype)
    ends = torch.iinfo(dtype)
    for trial in range(TRIALS):
        one, other, output = (_random_grid(dtype, tie=trial % 2 == 0) for _ in range(3))
        output = (one[0] * other[0] * 2.0 ** torch.randint(3, 9, (1,)), output[1])
        graph = Graph(dtype, tmp_path)
        product = graph.call("Mul", graph.input(left, *one), graph.input(right, *other))
        actual = graph.run("QLinearMul", product, output, left, right)
        ratio = arithmetic.multiply_ratio(one[0], other[0], output[0])
        expected = arithmetic.multiply_codes(left, one[1], right, other[1], ratio, output[1], ends.min, ends.max, dtype)
        assert torch.equal(actual, expected)


@EVERY_DTYPE
def test_concatenations_bring_every_code_to_the_output(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = (EVERY_CODE + torch.iinfo(dtype).min).to(dtype)[None]
    for trial in range(TRIALS):
        one, other, output = (_random_grid(dtype, tie=trial % 2 == 0) for _ in range(3))
        graph = Graph(dtype, tmp_path)
        joined = graph.call("Concat", graph.input(codes, *one), graph.input(codes, *other), axis=1)
        actual = graph.run("QLinearConcat", joined, output, codes, codes)
        tables = [
            arithmetic.lookup_table(None, *grid, _scheme(dtype), *output, _scheme(dtype)) for grid in (one, other)
        ]
        assert torch.equal(actual, torch.cat(tables)[None])


@EVERY_DTYPE
def test_global_averages(dtype: torch.dtype, tmp_path: Path) -> None:
    ends = torch.iinfo(dtype)
    for trial in range(TRIALS):
        size = torch.randint(1, 12, (2,)).tolist()
        codes = torch.randint(ends.min, ends.max + 1, (32, 5, *size)).to(dtype)
        grid, output = _random_grid(dtype, tie=trial % 2 == 0), _random_grid(dtype, tie=False)
        output = (grid[0] * (0.25 if trial % 2 == 0 else 0.3), output[1])
        graph = Graph(dtype, tmp_path)
        mean = graph.call("GlobalAveragePool", graph.input(codes, *grid))
        actual = graph.run("QLinearGlobalAveragePool", mean, output, codes)
        sums = (codes.to(torch.int32) - grid[1]).sum((2, 3), keepdim=True)
        multiplier = arithmetic.average_multiplier(grid[0], output[0], torch.tensor([size[0] * size[1]]))
        expected = arithmetic.requantize_accumulator(sums, multiplier, output[1], ends.min, ends.max, dtype)
        assert torch.equal(actual, expected)


def test_a_convolution_between_unit_scales_multiplies_by_its_weights_scale(tmp_path: Path) -> None:
    """What averages over windows are made of."""
    for _ in range(TRIALS):
        codes = torch.randint(0, 256, (8, 4, 6, 6)).to(torch.uint8)
        zero_point, output_zero_point = torch.randint(0, 256, (2, 1))
        multiplier = torch.rand(1) * 0.3
        unit = torch.ones(1)
        graph = Graph(torch.uint8, tmp_path)
        weight = graph.call(
            "DequantizeLinear",
            graph.constant(np.ones((4, 1, 2, 2), np.int8)),
            graph.constant(multiplier.numpy().reshape(())),
            graph.constant(np.zeros((), np.int8)),
        )
        value = graph.call("Conv", graph.input(codes, unit, zero_point), weight, group=4, strides=[2, 2])
        actual = graph.run("QLinearConv", value, (unit, output_zero_point), codes)
        sums = torch.nn.functional.avg_pool2d(codes.float() - zero_point, 2, divisor_override=1)
        expected = arithmetic.requantize_accumulator(sums, multiplier, output_zero_point, 0, 255, torch.uint8)
        assert torch.equal(actual, expected)
