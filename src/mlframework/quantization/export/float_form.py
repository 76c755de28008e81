"""From an ONNX graph with quantize and dequantize nodes to the float graph that it approximates, and its grids.

Each quantized tensor of the one is a tensor of the other with an :class:`Encoding`: a value that a quantize node takes,
a weight or bias that a dequantize node makes. Float weights are what those of the integer model stand for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any, NamedTuple

from .encodings import Encoding
from .onnx_graph import UnusedNames, consumers_of, remove_unread, replace_nodes

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_GRAPHS = (5, 10)  # GRAPH and GRAPHS of onnx.AttributeProto
_BYTES = (2, 3)  # UINT8 and INT8 of onnx.TensorProto

# What a layer's scale is called by export_onnx: of its weights, of its bias, of its table.
_SCALES = re.compile(r"(?P<layer>.+?)(\.weights)?\.(bias_)?scale(_\d+)?")


class _Grid(NamedTuple):
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    dtype: str
    axis: int | None


def float_form(model: Any) -> tuple[Any, list[Encoding]]:
    """The float ``onnx.ModelProto``, and an encoding for every tensor that the given one quantizes.

    A value gets the name of the codes that it was quantized to; inputs and outputs of the model keep theirs. Where a
    value is quantized for some of its readers only, or to several grids, each of these is an ``Identity`` node's.

    Raises:
        ValueError: something computes on codes, or takes them for codes of another grid; the message names it.
    """
    result = type(model)()
    result.CopyFrom(model)
    rewriting = _Rewriting(result.graph)
    for node in model.graph.node:
        rewriting.visit(node)
    replace_nodes(result.graph, rewriting.nodes)
    del result.graph.value_info[:]  # of values that are not there anymore
    remove_unread(result.graph)
    return result, list(rewriting.encodings.values())


def layer_of_scale(scale: str) -> str | None:
    """The layer whose weights or bias have a scale of this name; None where export_onnx did not name it."""
    match = _SCALES.fullmatch(scale)
    return match["layer"] if match else None


class _Rewriting:
    """Goes through a graph in its order.

    Attributes:
        nodes: the float graph's, so far.
        encodings: by tensor of the float graph.
    """

    def __init__(self, graph: Any) -> None:
        self.nodes: list[Any] = []
        self.encodings: dict[str, Encoding] = {}
        self._graph = graph
        self._constants = {value.name: value for value in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._readers = consumers_of(graph)
        self._names = UnusedNames(graph)
        self._uses: dict[str, list[Any]] = defaultdict(list)  # nodes of the float graph that make or read a tensor
        self._made: set[str] = set()  # tensors that nodes of the float graph make
        self._instead: dict[str, str] = {}  # the float tensor for codes, and for what is made of them
        self._grids: dict[str, _Grid] = {}  # by codes
        self._parameters: dict[tuple[str, _Grid], str] = {}

    def visit(self, node: Any) -> None:
        """Adds what stands for a node."""
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            raise ValueError(f"model must have no graphs within nodes, got one in {node.op_type} {node.name!r}")
        if node.op_type == _QUANTIZE:
            self._quantize(node)
        elif node.op_type == _DEQUANTIZE:
            self._dequantize(node)
        elif not self._looks_up(node) and node.output[0] not in self._instead:
            for name in node.input:
                if name in self._grids:
                    raise ValueError(
                        f"model must dequantize codes before anything reads them, got {node.op_type} {node.name!r} "
                        f"on the codes {name!r}: files for 'onnxruntime' have that, those for other targets have not"
                    )
            self._add(node)

    def _quantize(self, node: Any) -> None:
        """A value on a grid from here on: the value itself, under the codes' name, or another tensor of that name."""
        source, codes = node.input[0], node.output[0]
        grid = self._grid_of(node)
        value = self._instead.get(source, source)
        known = self.encodings.get(value)
        if known is not None and self._encoding(value, grid) == known:
            pass  # it is on that grid already
        elif known is None and source not in self._outputs and self._all_quantize(source, grid):
            if value in self._made:
                value = self._rename(value, codes)
            self._instead[source] = value
        else:
            value = self._identity(value, codes)
        self.encodings[value] = self._encoding(value, grid)
        self._grids[codes], self._instead[codes] = grid, value

    def _all_quantize(self, value: str, grid: _Grid) -> bool:
        readers = [reader for reader, _ in self._readers[value]]
        return all(reader.op_type == _QUANTIZE and self._grid_of(reader) == grid for reader in readers)

    def _dequantize(self, node: Any) -> None:
        codes, values = node.input[0], node.output[0]
        grid = self._grid_of(node)
        if codes in self._constants:
            value = self._parameter(codes, grid, node.input[1])
        elif codes not in self._grids:
            raise ValueError(f"model must quantize what it dequantizes, got codes of another origin: {codes!r}")
        elif self._grids[codes] != grid:
            raise ValueError(
                f"model must dequantize codes with their own grid, got {codes!r} with another in {node.name!r}: files "
                "for 'onnxruntime' have that, those for other targets have not"
            )
        else:
            value = self._instead[codes]
        self._instead[values] = value
        if values in self._outputs:
            self._return_as(values, value)

    def _return_as(self, output: str, value: str) -> None:
        """Gives a tensor the name by which the model returns it, or a copy of it where it has such a name."""
        if value in self._made and value not in self._outputs:
            self._rename(value, output)
        else:
            self._identity(value, output)
            self.encodings[output] = replace(self.encodings[value], name=output, is_parameter=False)

    def _looks_up(self, node: Any) -> bool:
        """Whether a node picks rows of a table of codes, which is then one of float values."""
        table = self._constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type not in _BYTES:
            return False
        rows = node.output[0]
        readers = [reader for reader, _ in self._readers[rows]]
        if readers and all(reader.op_type == _DEQUANTIZE for reader in readers):
            grid = self._grid_of(readers[0])
            self._add(node, [self._parameter(table.name, grid, readers[0].input[1]), node.input[1]])
            self.encodings[rows] = self._encoding(rows, grid)
            self._grids[rows], self._instead[rows] = grid, rows
            return True
        product, scale = self._scaled_rows(node, readers)
        if product is None:
            return False
        scales = tuple(self._array(scale).reshape(-1).tolist())
        grid = _Grid(scales, (0,) * len(scales), str(self._array(table.name).dtype), 0)
        self._add(node, [self._parameter(table.name, grid, scale), node.input[1]], [product])
        self._instead[readers[0].output[0]] = self._instead[product] = product  # the cast, and the product
        return True

    def _scaled_rows(self, lookup: Any, readers: list[Any]) -> tuple[str | None, str]:
        """The product of rows with scales that are looked up alike, and the table of those; None if there is none."""
        if [reader.op_type for reader in readers] == ["Cast"]:
            products = [product for product, _ in self._readers[readers[0].output[0]]]
            for scales in self._graph.node if [product.op_type for product in products] == ["Mul"] else ():
                is_alike = scales.op_type == "Gather" and scales.input[1] == lookup.input[1]
                if is_alike and scales.output[0] in products[0].input and scales.input[0] in self._constants:
                    return products[0].output[0], scales.input[0]
        return None, ""

    def _parameter(self, codes: str, grid: _Grid, scale: str) -> str:
        """The float constant that an integer one stands for."""
        key = codes, grid
        if key not in self._parameters:
            import numpy as np
            from onnx import numpy_helper

            layer = layer_of_scale(scale)
            kind = "bias" if ".bias_scale" in scale else "weight"
            wanted = f"{layer}.{kind}" if layer else f"{codes}_float"
            name = self._parameters[key] = self._names.like(wanted)
            integers = self._array(codes).astype(np.int64)
            shape = [-1 if axis == grid.axis else 1 for axis in range(integers.ndim)]
            scales, zero_points = np.asarray(grid.scale, np.float32).reshape(shape), np.reshape(grid.zero_point, shape)
            values = (integers - zero_points).astype(np.float32) * scales
            self._graph.initializer.append(numpy_helper.from_array(values, name))
            self.encodings[name] = self._encoding(name, grid)
        return self._parameters[key]

    def _grid_of(self, node: Any) -> _Grid:
        """What a quantize or a dequantize node states."""
        names = list(node.input[1:])
        if not set(names) <= self._constants.keys():
            raise ValueError(f"model must have constant scales and zero points, got {node.op_type} {node.name!r}")
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes.get("block_size"):
            raise ValueError(f"model must have one scale per tensor or channel, got blocks in {node.name!r}")
        scale = self._array(names[0])
        if len(names) > 1:
            zero_point = self._array(names[1])
        else:
            dtype = self._array(node.input[0]).dtype if node.input[0] in self._constants else "uint8"
            zero_point = scale.astype(dtype) * 0
        axis = attributes.get("axis", 1) if scale.ndim else None
        return _Grid(
            tuple(scale.reshape(-1).tolist()), tuple(zero_point.reshape(-1).tolist()), str(zero_point.dtype), axis
        )

    def _array(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._constants[name])

    def _encoding(self, name: str, grid: _Grid) -> Encoding:
        signed = grid.dtype.startswith("int")
        bits = int(grid.dtype.removeprefix("u").removeprefix("int"))
        return Encoding(name, grid.scale, grid.zero_point, bits, signed, grid.axis, self._is_constant(name))

    def _is_constant(self, name: str) -> bool:
        return name in self._constants or name in self._parameters.values()

    def _add(self, like: Any, inputs: list[str] | None = None, outputs: list[str] | None = None) -> None:
        """A node like one of the given graph, on the float tensors."""
        node = type(like)()
        node.CopyFrom(like)
        node.input[:] = [self._instead.get(name, name) for name in like.input] if inputs is None else inputs
        if outputs is not None:
            node.output[:] = outputs
        self.nodes.append(node)
        self._made.update(node.output)
        for name in {*node.input, *node.output}:
            self._uses[name].append(node)

    def _identity(self, value: str, name: str) -> str:
        """A tensor of another name with the same values."""
        node = type(self._graph.node[0])(op_type="Identity", name=self._names.like(f"{name}_identity"))
        self._add(node, [value], [name])
        return name

    def _rename(self, value: str, name: str) -> str:
        """Another name for a tensor that a node of the float graph makes."""
        self._uses[name] = self._uses.pop(value)
        for node in self._uses[name]:
            for values in (node.input, node.output):
                values[:] = [name if each == value else each for each in values]
        self._made.remove(value)
        self._made.add(name)
        self._instead.update({key: name for key, known in self._instead.items() if known == value})
        if value in self.encodings:
            self.encodings[name] = replace(self.encodings.pop(value), name=name)
        return name
