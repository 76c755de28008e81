"""The flat buffer of a ``.tflite`` file: tensors, operators, and what they are called by.

Source: LiteRT's schema, ``tflite/schema/schema.fbs``, version 3.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .package import import_builder, import_schema

_SCHEMA_VERSION = 3
_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16  # of constants, which kernels read in vectors
_TYPES = {
    torch.float32: "FLOAT32",
    torch.int8: "INT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
# The first version of an operator that does what is asked of it here, where it is not 1. Older runtimes refuse it.
_VERSIONS = {
    "ADD": 2,
    "BROADCAST_TO": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 12,
    "MAX_POOL_2D": 2,
    "MAXIMUM": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "STRIDED_SLICE": 2,
    "TRANSPOSE": 2,
    "TRANSPOSE_CONV": 3,
}


class Grid(NamedTuple):
    """Scales and zero points of a tensor's codes: one of each, or one for each index along ``axis``."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int = 0


class FlatModel:
    """A model of one subgraph, which grows by an operator at a time.

    Raises:
        ImportError: ai-edge-litert is not installed.
    """

    def __init__(self) -> None:
        self.schema = import_schema()
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._origins: dict[int, str] = {}
        self._buffers = [self.schema.BufferT()]  # the first one is that of whatever is no constant

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, grid: Grid | None = None, data: Tensor | None = None
    ) -> int:
        """A new tensor; its number.

        Args:
            name: for people who read the file.
            shape: of the tensor as it lies in memory.
            dtype: of its elements.
            grid: of its codes; its axis is one of ``shape``.
            data: of a constant.

        Raises:
            KeyError: LiteRT has no such dtype here.
        """
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = name, list(shape), True
        tensor.type = getattr(self.schema.TensorType, _TYPES[dtype])
        tensor.buffer = 0 if data is None else self._buffer(data)
        if grid is not None:
            quantization = self.schema.QuantizationParametersT()
            quantization.scale, quantization.zeroPoint = list(grid.scale), list(grid.zero_point)
            quantization.quantizedDimension = grid.axis
            tensor.quantization = quantization
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def operator(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], options: Any = None, origin: str = ""
    ) -> None:
        """Adds an operator.

        Args:
            name: among the schema's built-in ones, such as ``"CONV_2D"``.
            inputs, outputs: numbers of tensors.
            options: from :meth:`options`.
            origin: what it is made from, for :attr:`origins`.
        """
        operator = self.schema.OperatorT()
        self._origins[id(operator)] = origin
        operator.opcodeIndex = self._codes.setdefault(name, len(self._codes))
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        if options is not None:
            operator.builtinOptions = options
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
        self._operators.append(operator)

    def options(self, kind: str, **fields: Any) -> Any:
        """An operator's options: ``options("Pool2DOptions", strideW=2)``."""
        options = getattr(self.schema, kind + "T")()
        for name, value in fields.items():
            assert hasattr(options, name), (kind, name)
            setattr(options, name, value)
        return options

    @property
    def origins(self) -> list[str]:
        """What each operator is made from; in the order of the file once there is one."""
        return [self._origins[id(operator)] for operator in self._operators]

    def to_bytes(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> bytes:
        """The file: a subgraph with the signature ``serving_default``, which calls its tensors by these names."""
        self._drop_unread(outputs.values())
        inputs, outputs = self._renumber(inputs, outputs)
        schema = self.schema
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = self._names(inputs), self._names(outputs)
        model = schema.ModelT()
        model.version, model.description = _SCHEMA_VERSION, "mlframework.quantization"
        model.subgraphs, model.signatureDefs, model.buffers = [graph], [signature], self._buffers
        model.operatorCodes = [self._operator_code(name) for name in self._codes]
        builder = import_builder()()
        builder.Finish(model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def _drop_unread(self, results: Collection[int]) -> None:
        """Drops operators that nobody reads the output of."""
        read = set(results)
        kept = []
        for operator in reversed(self._operators):
            if read.intersection(operator.outputs):
                read.update(operator.inputs)
                kept.append(operator)
        self._operators = kept[::-1]

    def _renumber(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Drops tensors that no operator has, with what they hold; inputs and outputs by their new numbers."""
        kept = {*inputs.values(), *outputs.values()}
        for operator in self._operators:
            kept.update(operator.inputs, operator.outputs)
        numbers = {old: new for new, old in enumerate(sorted(kept))}
        self._tensors = [self._tensors[old] for old in numbers]
        held = {old: new for new, old in enumerate(sorted({0, *(tensor.buffer for tensor in self._tensors)}))}
        self._buffers = [self._buffers[old] for old in held]
        for tensor in self._tensors:
            tensor.buffer = held[tensor.buffer]
        used = {old: new for new, old in enumerate(sorted({operator.opcodeIndex for operator in self._operators}))}
        names = list(self._codes)
        self._codes = {names[old]: new for old, new in used.items()}
        for operator in self._operators:
            operator.opcodeIndex = used[operator.opcodeIndex]
            operator.inputs = [numbers[old] for old in operator.inputs]
            operator.outputs = [numbers[old] for old in operator.outputs]
        first, second = ({name: numbers[old] for name, old in part.items()} for part in (inputs, outputs))
        return first, second

    def _names(self, tensors: Mapping[str, int]) -> list[Any]:
        maps = []
        for name, index in tensors.items():
            entry = self.schema.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            maps.append(entry)
        return maps

    def _operator_code(self, name: str) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # all that runtimes before 2020 read
        code.version = _VERSIONS.get(name, 1)
        return code

    def _buffer(self, data: Tensor) -> int:
        buffer = _aligned_buffer_of(self.schema)()
        buffer.data = data.detach().contiguous().numpy().tobytes()
        self._buffers.append(buffer)
        return len(self._buffers) - 1


@functools.cache
def _aligned_buffer_of(schema: Any) -> Any:
    """The class of a buffer whose bytes begin at a multiple of 16. The schema asks it; its Python classes ignore it."""

    class AlignedBuffer(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:  # the schema's name
            builder.StartVector(1, len(self.data), _ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return AlignedBuffer
