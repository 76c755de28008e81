"""Passes over an exported graph that put nodes where engines expect them, and out of the way of what engines would do.

They edit an ``onnx_ir.Model`` in place; torch.onnx has noted at each node in which module it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .onnx_graph import (
    UnusedNames,
    add_initializer,
    array_of,
    copy_after,
    input_of,
    maker_of,
    readers_of,
    remove_unread,
    scopes_of,
)

if TYPE_CHECKING:
    import onnx_ir as ir

# What ONNX Runtime has integer forms of, and what it carries quantize and dequantize nodes across.
_FUSED = (
    "Add",
    "AveragePool",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "Mul",
    "Sigmoid",
    "Softmax",
)
_MOVES = ("Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")

# The weights of which ONNX Runtime's products never saturate, and which it therefore leaves as they are.
_SMALLEST, _LARGEST = -64, 64


def remove_idle_pairs(model: ir.Model) -> None:
    """Takes out a dequantize and a quantize node of the same grid with nothing between them."""
    for node in model.graph:
        before = maker_of(node.inputs[0], "DequantizeLinear") if node.op_type == "QuantizeLinear" else None
        if before is None or before.inputs[1:] != node.inputs[1:] or node.outputs[0].is_graph_output():
            continue
        node.outputs[0].replace_all_uses_with(input_of(before))
    remove_unread(model)


def fold_padding_into_convolutions(model: ir.Model) -> None:
    """Lets convolutions pad with zeros by themselves where a padding of the same grid comes before and nothing else
    reads it."""
    for convolution in model.graph:
        if convolution.op_type != "Conv":
            continue
        chain: list[ir.Node] = []
        value = convolution.inputs[0]
        for kind in ("DequantizeLinear", "QuantizeLinear", "Pad", "DequantizeLinear"):
            node = maker_of(value, kind)
            if node is None or len(node.outputs[0].uses()) > 1 or node.outputs[0].is_graph_output():
                break
            chain.append(node)
            value = node.inputs[0]
        else:
            dequantize, _, pad, before = chain
            if before.inputs[1:] == dequantize.inputs[1:] and _add_padding(convolution, pad):
                dequantize.replace_input_with(0, before.inputs[0])
    remove_unread(model)


def give_consumers_their_own_dequantize(model: ir.Model) -> None:
    """Copies dequantize nodes until each has one consumer, which engines that fuse node by node expect."""
    names = UnusedNames(model.graph)
    for node in tuple(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        last = node
        shared = tuple(node.outputs[0].uses())
        for consumer, position in shared if node.outputs[0].is_graph_output() else shared[1:]:
            last = copy_after(node, last, names)
            consumer.replace_input_with(position, last.outputs[0])


def give_sums_their_own_quantize(model: ir.Model) -> None:
    """Copies a quantize node that a sum and other operations read: the sum's branch gets one of its own."""
    names = UnusedNames(model.graph)
    for node in tuple(model.graph):
        if node.op_type != "QuantizeLinear":
            continue
        readers = [reader for reader in readers_of(node.outputs[0]) if reader.op_type == "DequantizeLinear"]
        sums = [reader for reader in readers if [user.op_type for user in readers_of(reader.outputs[0])] == ["Add"]]
        if len(sums) < len(readers):
            last = node
            for reader in sums:
                last = copy_after(node, last, names)
                reader.replace_input_with(0, last.outputs[0])


def make_concatenations_unsigned(model: ir.Model) -> None:
    """Raises the int8 codes of concatenations by 128 to uint8, and their zero points with them: the same values."""
    constants = model.graph.initializers
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or maker_of(node.inputs[0], "Concat") is None:
            continue
        zero_point = _int8_constant(node.inputs[2])
        if zero_point is None:
            continue
        name = f"{zero_point.name}_unsigned"
        if name not in constants:
            # The two's complement of an int8 differs from the uint8 that is 128 higher by its first bit.
            add_initializer(model.graph, name, array_of(zero_point).view("uint8") ^ 128)
        node.replace_input_with(2, constants[name])
        for reader in readers_of(node.outputs[0]):
            reader.replace_input_with(2, constants[name])


def give_weights_their_own_initializers(model: ir.Model) -> None:
    """Copies int8 weights and zero points until no two layers share one of those that ONNX Runtime would rewrite.

    On a processor where its products of uint8 and int8 saturate, the session option ``session.x64quantprecision`` makes
    them exact: for each node that dequantizes weights, it adds 128 to weights and zero point, as uint8, and names the
    results after them. Of what two nodes share it would make two of the same name, and refuses the file.
    """
    names = UnusedNames(model.graph)
    owned: set[ir.Value] = set()
    for node in model.graph:
        weight = _int8_constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or _is_small(weight):
            continue
        # All of them have a zero point, which takes a byte for each channel. The weights themselves are copied where a
        # layer is called more than once, which is then in the file as often as it is called.
        for position in (0, 2):
            value = input_of(node, position)
            if value in owned:
                value = add_initializer(model.graph, names.unused(str(value.name)), array_of(value))
                node.replace_input_with(position, value)
            owned.add(value)


def keep_floats_float(model: ir.Model, integer_modules: Iterable[str]) -> None:
    """Writes out the arithmetic of dequantize nodes that operations outside of integer modules read.

    Where ONNX Runtime finds such an operation between dequantize and quantize nodes, it takes it for an integer one: it
    quantizes the weights of a layer that was left float by itself, and adds, multiplies and averages by other formulas.
    Where it finds codes brought from one grid to another, it takes both for one that is neither. A cast, a subtraction
    and a multiplication give the same values as a dequantize node and are nothing that it looks for.
    """
    integer = set(integer_modules)
    names = UnusedNames(model.graph)
    for node in tuple(model.graph):
        if node.op_type == "DequantizeLinear" and any(
            (reader.op_type in _FUSED and not integer.intersection(scopes_of(reader)))
            or (reader.op_type == "QuantizeLinear" and reader.inputs[1:] != node.inputs[1:])
            for reader in _computing_readers(node.outputs[0])
        ):
            _write_out(model.graph, node, names)


def _add_padding(convolution: ir.Node, pad: ir.Node) -> bool:
    """Adds to a convolution's padding what a node pads with zeros; False where that is not what it does."""
    import onnx_ir as ir

    own = convolution.attributes.get_ints("pads")
    given = [value for value in pad.inputs[1:] if value is not None]
    if own is None or pad.attributes.get_string("mode", "constant") != "constant" or len(pad.inputs) > 3:
        return False
    if not all(value.is_initializer() for value in given):
        return False
    lengths, *values = [array_of(value).tolist() for value in given]
    before, after = lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]
    if any(values) or any(before[:2]) or any(after[:2]) or min(lengths) < 0:
        return False
    pads = [extra + length for extra, length in zip(before[2:] + after[2:], own, strict=True)]
    convolution.attributes.add(ir.AttrInt64s("pads", pads))
    return True


def _computing_readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute with a value, past those that only move it."""
    for reader in readers_of(value):
        if reader.op_type in _MOVES:
            for output in reader.outputs:
                yield from _computing_readers(output)
        else:
            yield reader


def _write_out(graph: ir.Graph, node: ir.Node, names: UnusedNames) -> None:
    """``(codes - zero point) * scale`` in place of a dequantize node, per tensor."""
    import onnx_ir as ir

    codes, scale, zero_point = node.inputs
    values = node.outputs[0]
    made: list[ir.Node] = []

    def add(kind: str, part: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        output = ir.Value(name=names.unused(f"{values.name}_{part}"))
        made.append(ir.node(kind, inputs, attributes, outputs=[output]))
        return output

    cast = add("Cast", "codes", [codes], to=ir.DataType.FLOAT)
    offset = add("Cast", "zero", [zero_point], to=ir.DataType.FLOAT)
    product = add("Mul", "values", [add("Sub", "steps", [cast, offset]), scale])
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [values], [product])


def _int8_constant(value: ir.Value | None) -> ir.Value | None:
    """The value, where it is an int8 initializer."""
    is_constant = value is not None and value.is_initializer() and array_of(value).dtype == "int8"
    return value if is_constant else None


def _is_small(weight: ir.Value) -> bool:
    codes = array_of(weight)
    return bool(((codes >= _SMALLEST) & (codes <= _LARGEST)).all())
