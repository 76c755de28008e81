"""From an ONNX graph with quantize and dequantize nodes to the float graph that it approximates, and its grids.

Each quantized tensor of the one is a tensor of the other with an :class:`Encoding`: a value that a quantize node takes,
a weight or bias that a dequantize node makes. Float weights are what those of the integer model stand for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .encodings import Encoding
from .onnx_graph import (
    UnusedNames,
    add_initializer,
    array_of,
    forget_types,
    input_of,
    maker_of,
    readers_of,
    remove_unread,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

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
        ValueError: something computes on codes, returns them, or takes them for codes of another grid; the message
            names it.
    """
    import onnx_ir

    result = onnx_ir.from_proto(model)
    rewriting = _Rewriting(result.graph)
    for node in result.graph:
        rewriting.visit(node)
    encodings = [_encoding(value, grid) for value, grid in rewriting.grids.items()]
    remove_unread(result)
    forget_types(result)
    return onnx_ir.to_proto(result), encodings


def layer_of_scale(scale: str) -> str | None:
    """The layer whose weights or bias have a scale of this name; None where export_onnx did not name it."""
    match = _SCALES.fullmatch(scale)
    return match["layer"] if match else None


class _Rewriting:
    """Goes through a graph in its order, and puts float values in the place of codes and of what is made of them.

    Attributes:
        grids: of float values.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.grids: dict[ir.Value, _Grid] = {}
        self._graph = graph
        self._names = UnusedNames(graph)
        self._parameters: dict[tuple[ir.Value, _Grid], ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        """Makes a node one of the float graph, or takes it out."""
        if any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values()):
            raise ValueError(f"model must have no graphs within nodes, got one in {node.op_type} {node.name!r}")
        if node.op_type == _QUANTIZE:
            self._quantize(node)
        elif node.op_type == _DEQUANTIZE:
            self._dequantize(node)
        elif node.op_type == "Gather":
            self._look_up(node)

    def _quantize(self, node: ir.Node) -> None:
        """A value on a grid from here on: the value itself, under the codes' name, or another tensor of that name."""
        value, codes = input_of(node), node.outputs[0]
        grid = _grid_of(node)
        _check_readers(codes, grid)
        if value not in self.grids and not value.is_graph_output() and _all_quantize(readers_of(value), grid):
            if value.producer() is not None:
                value.name = codes.name
        elif self.grids.get(value) != grid:
            value = _identity(value, codes.name, node)
        self.grids[value] = grid
        self._replace(codes, value)

    def _dequantize(self, node: ir.Node) -> None:
        value, returned = input_of(node), node.outputs[0]
        if value not in self.grids:
            if not value.is_initializer():
                raise ValueError(
                    f"model must quantize what it dequantizes, got codes of another origin: {value.name!r}"
                )
            value = self._parameter(value, _grid_of(node), input_of(node, 1))
        if returned.is_graph_output() and (value.producer() is None or value.is_graph_output()):
            grid = self.grids[value]
            value = _identity(value, returned.name, node)
            self.grids[value] = grid
        self._replace(returned, value)

    def _look_up(self, node: ir.Node) -> None:
        """Where a node picks rows of a table of codes, has it pick those of one of float values."""
        table, rows = input_of(node), node.outputs[0]
        if not table.is_initializer() or array_of(table).dtype not in ("uint8", "int8"):
            return
        readers = readers_of(rows)
        if readers and all(reader.op_type == _DEQUANTIZE for reader in readers):
            grid = _grid_of(readers[0])
            _check_readers(rows, grid)
            node.replace_input_with(0, self._parameter(table, grid, input_of(readers[0], 1)))
            self.grids[rows] = grid
            return
        product, scale = _scaled_rows(node, readers)
        if product is not None and scale is not None:
            scales = tuple(array_of(scale).reshape(-1).tolist())
            grid = _Grid(scales, (0,) * len(scales), str(array_of(table).dtype), 0)
            node.replace_input_with(0, self._parameter(table, grid, scale))
            rows.name = product.name
            self._replace(product, rows)

    def _replace(self, value: ir.Value, instead: ir.Value) -> None:
        """Has readers of a value, and the model where it returns it, take another; what made the value goes."""
        if value.is_graph_output():
            instead.name, instead.type, instead.shape = value.name, value.type, value.shape
        value.replace_all_uses_with(instead, replace_graph_outputs=True)
        node = value.producer()
        assert node is not None
        self._graph.remove(node, safe=True)

    def _parameter(self, codes: ir.Value, grid: _Grid, scale: ir.Value) -> ir.Value:
        """The float constant that an integer one stands for."""
        key = codes, grid
        if key not in self._parameters:
            import numpy as np

            layer = layer_of_scale(str(scale.name))
            kind = "bias" if ".bias_scale" in str(scale.name) else "weight"
            name = self._names.like(f"{layer}.{kind}" if layer else f"{codes.name}_float")
            integers = array_of(codes).astype(np.int64)
            shape = [-1 if axis == grid.axis else 1 for axis in range(integers.ndim)]
            scales, zero_points = np.asarray(grid.scale, np.float32).reshape(shape), np.reshape(grid.zero_point, shape)
            values = (integers - zero_points).astype(np.float32) * scales
            self._parameters[key] = add_initializer(self._graph, name, values)
            self.grids[self._parameters[key]] = grid
        return self._parameters[key]


def _check_readers(codes: ir.Value, grid: _Grid) -> None:
    """Refuses codes that are not only dequantized, or not with their own grid."""
    if codes.is_graph_output():
        raise ValueError(f"model must dequantize codes before it returns them, got the codes {codes.name!r}")
    for reader in readers_of(codes):
        if reader.op_type != _DEQUANTIZE:
            raise ValueError(
                f"model must dequantize codes before anything reads them, got {reader.op_type} {reader.name!r} "
                f"on the codes {codes.name!r}: files for 'onnxruntime' have that, those for other targets have not"
            )
        if _grid_of(reader) != grid:
            raise ValueError(
                f"model must dequantize codes with their own grid, got {codes.name!r} with another in {reader.name!r}: "
                "files for 'onnxruntime' have that, those for other targets have not"
            )


def _all_quantize(readers: list[ir.Node], grid: _Grid) -> bool:
    return all(reader.op_type == _QUANTIZE and _grid_of(reader) == grid for reader in readers)


def _scaled_rows(lookup: ir.Node, readers: list[ir.Node]) -> tuple[ir.Value | None, ir.Value | None]:
    """The product of rows with scales that are looked up alike, and the table of those; None if there is none."""
    if [reader.op_type for reader in readers] == ["Cast"]:
        products = readers_of(readers[0].outputs[0])
        for factor in products[0].inputs if [product.op_type for product in products] == ["Mul"] else ():
            scales = maker_of(factor, "Gather")
            if scales is not None and scales.inputs[1] is lookup.inputs[1] and input_of(scales).is_initializer():
                return products[0].outputs[0], scales.inputs[0]
    return None, None


def _identity(value: ir.Value, name: str | None, before: ir.Node) -> ir.Value:
    """A tensor of another name with the same values."""
    import onnx_ir as ir

    copy = ir.Value(name=name)
    before.prepend(ir.node("Identity", [value], outputs=[copy]))
    return copy


def _grid_of(node: ir.Node) -> _Grid:
    """What a quantize or a dequantize node states."""
    constants = [value for value in node.inputs[1:] if value is not None]
    if not all(value.is_initializer() for value in constants):
        raise ValueError(f"model must have constant scales and zero points, got {node.op_type} {node.name!r}")
    if node.attributes.get_int("block_size", 0):
        raise ValueError(f"model must have one scale per tensor or channel, got blocks in {node.name!r}")
    scale, *zero_points = [array_of(value) for value in constants]
    if zero_points:
        zero_point = zero_points[0]
    else:
        codes = input_of(node) if node.op_type == _DEQUANTIZE else node.outputs[0]
        zero_point = scale.astype(array_of(codes).dtype if codes.is_initializer() else "uint8") * 0
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    return _Grid(tuple(scale.reshape(-1).tolist()), tuple(zero_point.reshape(-1).tolist()), str(zero_point.dtype), axis)


def _encoding(value: ir.Value, grid: _Grid) -> Encoding:
    signed = grid.dtype.startswith("int")
    bits = int(grid.dtype.removeprefix("u").removeprefix("int"))
    return Encoding(str(value.name), grid.scale, grid.zero_point, bits, signed, grid.axis, value.is_initializer())
