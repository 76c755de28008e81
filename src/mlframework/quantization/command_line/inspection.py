"""What is in an ONNX file with quantize and dequantize nodes: layers, their grids, and what stayed float."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..export.float_form import layer_of_scale
from .files import loaded

_PREFIX = "mlframework.quantization."
_FLOAT, _BYTES = 1, (2, 3)  # of onnx.TensorProto; uint8 and int8

# What stands between an operation and the nodes of its grids: activations, and what only moves values.
_FOLLOWS = ("Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")

# What computes on values, apart from layers; lookups in tables are functions of single codes.
_OPERATIONS = (
    *(
        "Add",
        "AveragePool",
        "Concat",
        "Div",
        "Erf",
        "Exp",
        "Gelu",
        "GatherElements",
        "GlobalAveragePool",
        "HardSigmoid",
    ),
    *("HardSwish", "LayerNormalization", "LeakyRelu", "Log", "MaxPool", "Mul", "Pow", "ReduceMean", "ReduceSum"),
    *("Resize", "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh"),
)


class Layer(NamedTuple):
    """A layer with weights, or a product of two activations.

    Attributes:
        name: of the layer, as far as its constants tell it; else of the node.
        operator: of ONNX.
        weights: how many there are.
        weight_grid: in words; "float", or "" where there are none.
        input_grid, output_grid: in words; "float" where the value is not quantized, "" where it has no values.
        multiply_adds: for one sample; 0 where the file does not tell the sizes.
        is_integer: whether it takes codes and integer weights.
    """

    name: str
    operator: str
    weights: int
    weight_grid: str
    input_grid: str
    output_grid: str
    multiply_adds: int
    is_integer: bool


@dataclass(frozen=True)
class Inspection:
    """What is known of a file.

    Attributes:
        layers: in the order of the graph.
        operations: other operators, with how many of them compute on codes, and how many on floats.
        size: of the file, in bytes.
        float_size: of its weights and biases as float32, in bytes.
        opset, ir_version: of the file.
        producer: what wrote it.
        target: what this library noted; None in other files.
        sizes_of_one: inputs' dimensions of any size, taken for 1 where multiply-adds are counted.
    """

    layers: list[Layer]
    operations: dict[str, tuple[int, int]]
    size: int
    float_size: int
    opset: int
    ir_version: int
    producer: str
    target: str | None
    sizes_of_one: list[str]

    @property
    def float_multiply_adds(self) -> float:
        """The share of multiply-adds that are float layers'."""
        total = sum(layer.multiply_adds for layer in self.layers)
        return sum(layer.multiply_adds for layer in self.layers if not layer.is_integer) / total if total else 0.0

    @property
    def float_weights(self) -> float:
        """The share of layers' weights that are float."""
        total = sum(layer.weights for layer in self.layers)
        return sum(layer.weights for layer in self.layers if layer.weight_grid == "float") / total if total else 0.0


def inspected(path: Path) -> Inspection:
    """Reads a file.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file.
    """
    model = loaded(path)
    graph = _Graph(model)
    return Inspection(
        layers=list(graph.layers()),
        operations=graph.operations(),
        size=path.stat().st_size,
        float_size=graph.float_size(),
        opset=next((entry.version for entry in model.opset_import if not entry.domain), 0),
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        target=next((entry.value for entry in model.metadata_props if entry.key == f"{_PREFIX}target"), None),
        sizes_of_one=graph.sizes_of_one,
    )


class _Graph:
    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.constants = {value.name: value for value in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)  # with the positions
        for node in self.graph.node:
            for position, name in enumerate(node.input):
                self.readers[name].append((node, position))
        self.sizes_of_one: list[str] = []
        self.values = self._values(model)

    def layers(self) -> Iterator[Layer]:
        for node in self.graph.node:
            constant, scale = self._weight(node)
            if constant is None and not (node.op_type == "MatMul" and self._is_float(node.input[0])):
                continue
            sources = (
                [] if node.op_type == "Gather" else [name for name in node.input[:2] if not self._is_constant(name)]
            )
            grids = [self._grid_before(name) for name in sources]
            yield Layer(
                name=self._name(node, constant, scale),
                operator=node.op_type,
                weights=0 if constant is None else math.prod(constant.dims),
                weight_grid="" if constant is None else self._weight_grid(constant, scale),
                input_grid=" and ".join(dict.fromkeys(grids)),
                output_grid=self._grid_after(node.output[0]),
                multiply_adds=self._multiply_adds(node, constant),
                is_integer=(constant is None or constant.data_type != _FLOAT) and "float" not in grids,
            )

    def operations(self) -> dict[str, tuple[int, int]]:
        counts: dict[str, Counter[bool]] = {}
        for node in self.graph.node:
            kinds = {self.values[name][0] for name in node.input if name in self.values}
            if node.op_type in _OPERATIONS and kinds & {_FLOAT, *_BYTES}:
                on_grids = all(self._is_constant(name) or self._grid_before(name) != "float" for name in node.input)
                is_integer = bool(kinds & {*_BYTES}) or (on_grids and self._grid_after(node.output[0]) != "float")
                counts.setdefault(node.op_type, Counter())[is_integer] += 1
        return {kind: (counts[kind][True], counts[kind][False]) for kind in sorted(counts)}

    def float_size(self) -> int:
        of_grids = {
            name
            for node in self.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
            for name in node.input[1:]
        }
        parameters = [
            value
            for name, value in self.constants.items()
            if name not in of_grids and (value.data_type == _FLOAT or self._is_dequantized(name))
        ]
        return sum(4 * math.prod(value.dims) for value in parameters)

    def _weight(self, node: Any) -> tuple[Any, str | None]:
        """The constant that a layer's weights are, and the name of its scale if it is one of codes."""
        positions = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1, 0), "Gather": (0,)}
        for position in positions.get(node.op_type, ()):
            name = node.input[position]
            maker = self.makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.constants:
                return self.constants[maker.input[0]], maker.input[1]
            constant = self.constants.get(name)
            if constant is not None and len(constant.dims) > 1 and constant.data_type in (_FLOAT, *_BYTES):
                is_of_scales = node.op_type == "Gather" and constant.dims[-1] == 1
                return (None, None) if is_of_scales else (constant, None)
        return None, None

    def _is_dequantized(self, name: str) -> bool:
        return any(
            reader.op_type in ("DequantizeLinear", "Gather") and position == 0
            for reader, position in self.readers[name]
        )

    def _is_constant(self, name: str) -> bool:
        maker = self.makers.get(name)
        return name in self.constants or (maker is not None and maker.input[:1] and maker.input[0] in self.constants)

    def _is_float(self, name: str) -> bool:
        return name in self.values and self.values[name][0] == _FLOAT

    def _name(self, node: Any, constant: Any, scale: str | None) -> str:
        if constant is None:
            return str(node.name)
        layer = layer_of_scale(scale) if scale is not None else None
        return layer or constant.name.removesuffix(".weight").removesuffix(".table")

    def _weight_grid(self, constant: Any, scale: str | None) -> str:
        from onnx import numpy_helper

        if constant.data_type == _FLOAT:
            return "float"
        largest = int(abs(numpy_helper.to_array(constant).astype(int)).max(initial=0))
        scale = scale or constant.name.replace(".table", ".scale")
        per_channel = scale in self.constants and math.prod(self.constants[scale].dims) > 1
        return f"int{largest.bit_length() + 1} {'per channel' if per_channel else 'per tensor'}"

    def _grid_before(self, name: str) -> str:
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _FOLLOWS:
            maker = self.makers.get(maker.input[0])
        return self._grid(maker) if maker is not None and maker.op_type == "DequantizeLinear" else "float"

    def _grid_after(self, name: str) -> str:
        readers = [reader for reader, _ in self.readers.get(name, [])]
        while len(readers) == 1 and readers[0].op_type in _FOLLOWS:
            readers = [reader for reader, _ in self.readers.get(readers[0].output[0], [])]
        return next((self._grid(reader) for reader in readers if reader.op_type == "QuantizeLinear"), "float")

    def _grid(self, node: Any) -> str:
        from onnx import numpy_helper

        if any(name not in self.constants for name in node.input[1:3]):
            return "computed"
        arrays = [numpy_helper.to_array(self.constants[name]) for name in node.input[1:3]]
        scale, zero_point = arrays if len(arrays) == 2 else (arrays[0], None)
        dtype = "uint8" if zero_point is None else zero_point.dtype
        if scale.size > 1:
            return f"{dtype} per channel"
        return f"{dtype}, scale {scale.item():.4g}, zero {0 if zero_point is None else zero_point.item()}"

    def _multiply_adds(self, node: Any, constant: Any) -> int:
        output, input = self._sizes(node.output[0]), self._sizes(node.input[0])
        if node.op_type == "Gather" or output is None or input is None:
            return 0
        if node.op_type == "MatMul":
            return math.prod(output) * input[-1]
        if node.op_type == "Gemm":
            return math.prod(output) * (math.prod(map(int, constant.dims)) // output[-1])
        return math.prod(input if node.op_type == "ConvTranspose" else output) * math.prod(map(int, constant.dims[1:]))

    def _sizes(self, name: str) -> tuple[int, ...] | None:
        return self.values[name][1] if name in self.values else None

    def _values(self, model: Any) -> dict[str, tuple[int, tuple[int, ...] | None]]:
        """The type and the sizes of every value, for one sample."""
        import onnx

        fixed = type(model)()
        fixed.CopyFrom(model)
        for value in fixed.graph.input:
            for size in value.type.tensor_type.shape.dim:
                if not size.HasField("dim_value"):
                    if size.dim_param not in ("batch", *self.sizes_of_one):
                        self.sizes_of_one.append(size.dim_param)
                    size.dim_value = 1
        for value in fixed.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
        found: dict[str, tuple[int, tuple[int, ...] | None]] = {
            name: (value.data_type, tuple(value.dims)) for name, value in self.constants.items()
        }
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            kind = value.type.tensor_type
            known = kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim)
            found[value.name] = kind.elem_type, tuple(size.dim_value for size in kind.shape.dim) if known else None
        return found
