"""Passes over an exported graph that put nodes where engines expect them, and out of the way of what engines would do.

They edit an ``onnx.GraphProto`` in place; torch.onnx has noted at each node in which module it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .onnx_graph import UnusedNames, consumers_of, copy_of_node, remove_unread, replace_nodes, scopes_of

_FLOAT, _UINT8, _INT8 = 1, 2, 3  # of onnx.TensorProto
_INT = 2  # of onnx.AttributeProto

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
_SMALL_WEIGHTS = range(-64, 65)


def remove_idle_pairs(graph: Any) -> None:
    """Takes out a dequantize and a quantize node of the same grid with nothing between them."""
    makers = {output: node for node in graph.node for output in node.output}
    outputs = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
        before = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        idle = before is not None and before.op_type == "DequantizeLinear" and before.input[1:] == node.input[1:]
        if idle and node.output[0] not in outputs:
            instead[node.output[0]] = makers[node.input[0]].input[0]
    replace_nodes(graph, [node for node in graph.node if node.output[0] not in instead])
    remove_unread(graph)


def fold_padding_into_convolutions(graph: Any) -> None:
    """Lets convolutions pad with zeros by themselves where a padding of the same grid comes before and nothing else
    reads it."""
    makers = {output: node for node in graph.node for output in node.output}
    consumers = consumers_of(graph)
    kinds = ("DequantizeLinear", "QuantizeLinear", "Pad", "DequantizeLinear")
    for convolution in graph.node:
        if convolution.op_type != "Conv":
            continue
        chain: list[Any] = []
        value = convolution.input[0]
        for kind in kinds:
            node = makers.get(value)
            if node is None or node.op_type != kind or len(consumers[value]) > 1:
                break
            chain.append(node)
            value = node.input[0]
        if len(chain) == len(kinds):
            dequantize, _, pad, before = chain
            if before.input[1:] == dequantize.input[1:] and _add_padding(graph, convolution, pad):
                dequantize.input[0] = before.input[0]
    remove_unread(graph)


def give_consumers_their_own_dequantize(graph: Any) -> None:
    """Copies dequantize nodes until each has one consumer, which engines that fuse node by node expect."""
    consumers = consumers_of(graph)
    outputs = {value.name for value in graph.output}
    names = UnusedNames(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear":
            continue
        shared = consumers[node.output[0]]
        for consumer, position in shared if node.output[0] in outputs else shared[1:]:
            copy = copy_of_node(node, names)
            nodes.append(copy)
            consumer.input[position] = copy.output[0]
    replace_nodes(graph, nodes)


def give_sums_their_own_quantize(graph: Any) -> None:
    """Copies a quantize node that a sum and other operations read: the sum's branch gets one of its own."""
    consumers = consumers_of(graph)
    names = UnusedNames(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "QuantizeLinear":
            continue
        readers = [reader for reader, _ in consumers[node.output[0]] if reader.op_type == "DequantizeLinear"]
        sums = [reader for reader in readers if [user.op_type for user, _ in consumers[reader.output[0]]] == ["Add"]]
        if sums and len(sums) < len(readers):
            for reader in sums:
                copy = copy_of_node(node, names)
                nodes.append(copy)
                reader.input[0] = copy.output[0]
    replace_nodes(graph, nodes)


def make_concatenations_unsigned(graph: Any) -> None:
    """Raises the int8 codes of concatenations by 128 to uint8, and their zero points with them: the same values."""
    consumers = consumers_of(graph)
    constants = {value.name: value for value in graph.initializer}
    concatenated = {output for node in graph.node if node.op_type == "Concat" for output in node.output}
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in concatenated:
            continue
        zero_point = constants[node.input[2]]
        if zero_point.data_type != _INT8:
            continue
        raised = type(zero_point)(name=f"{zero_point.name}_unsigned", data_type=_UINT8, dims=zero_point.dims)
        # The two's complement of an int8 differs from the uint8 that is 128 higher by its first bit.
        raised.raw_data = bytes(byte ^ 128 for byte in _bytes_of(zero_point))
        if raised.name not in constants:
            constants[raised.name] = raised
            graph.initializer.append(raised)
        node.input[2] = raised.name
        for reader, _ in consumers[node.output[0]]:
            reader.input[2] = raised.name


def give_weights_their_own_initializers(graph: Any) -> None:
    """Copies int8 weights and zero points until no two layers share one of those that ONNX Runtime would rewrite.

    On a processor where its products of uint8 and int8 saturate, the session option ``session.x64quantprecision`` makes
    them exact: for each node that dequantizes weights, it adds 128 to weights and zero point, as uint8, and names the
    results after them. Of what two nodes share it would make two of the same name, and refuses the file.
    """
    constants = {value.name: value for value in graph.initializer}
    names = UnusedNames(graph)
    owned: set[str] = set()
    for node in graph.node:
        weight = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != _INT8 or _is_small(weight):
            continue
        # All of them have a zero point, which takes a byte for each channel. The weights themselves are copied where a
        # layer is called more than once, which is then in the file as often as it is called.
        for position in (0, 2):
            name = node.input[position]
            if name in owned:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = names.unused(name)
                node.input[position] = copy.name
            owned.add(name)


def keep_floats_float(graph: Any, integer_modules: Iterable[str]) -> None:
    """Writes out the arithmetic of dequantize nodes that operations outside of integer modules read.

    Where ONNX Runtime finds such an operation between dequantize and quantize nodes, it takes it for an integer one: it
    quantizes the weights of a layer that was left float by itself, and adds, multiplies and averages by other formulas.
    Where it finds codes brought from one grid to another, it takes both for one that is neither. A cast, a subtraction
    and a multiplication give the same values as a dequantize node and are nothing that it looks for.
    """
    integer = set(integer_modules)
    consumers = consumers_of(graph)
    names = UnusedNames(graph)
    nodes = []
    for node in graph.node:
        fuses = node.op_type == "DequantizeLinear" and any(
            (reader.op_type in _FUSED and not integer.intersection(scopes_of(reader)))
            or (reader.op_type == "QuantizeLinear" and reader.input[1:] != node.input[1:])
            for reader in _readers(node.output[0], consumers)
        )
        nodes.extend(_arithmetic_of(node, names) if fuses else [node])
    replace_nodes(graph, nodes)


def _add_padding(graph: Any, convolution: Any, pad: Any) -> bool:
    """Adds to a convolution's padding what a node pads with zeros; False where that is not what it does."""
    import onnx

    constants = {
        value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer if value.name in pad.input
    }
    modes = [attribute.s for attribute in pad.attribute if attribute.name == "mode"]
    own = next((attribute for attribute in convolution.attribute if attribute.name == "pads"), None)
    names = [name for name in pad.input[1:] if name]
    if modes not in ([], [b"constant"]) or len(pad.input) > 3 or own is None or not constants.keys() >= set(names):
        return False
    lengths, *values = [constants[name].tolist() for name in names]
    before, after = lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]
    if any(values) or any(before[:2]) or any(after[:2]) or min(lengths) < 0:
        return False
    own.ints[:] = [extra + length for extra, length in zip(before[2:] + after[2:], own.ints, strict=True)]
    return True


def _readers(value: str, consumers: Mapping[str, list[tuple[Any, int]]]) -> Iterator[Any]:
    """The nodes that compute with a value, past those that only move it."""
    for reader, _ in consumers.get(value, ()):
        if reader.op_type in _MOVES:
            for output in reader.output:
                yield from _readers(output, consumers)
        else:
            yield reader


def _arithmetic_of(node: Any, names: UnusedNames) -> list[Any]:
    """``(codes - zero point) * scale`` in place of a dequantize node, per tensor."""
    codes, scale, zero_point = node.input
    cast, offset, difference = (names.unused(f"{node.output[0]}_{part}") for part in ("codes", "zero", "steps"))
    parts = [
        ("Cast", [codes], cast, {"to": _FLOAT}),
        ("Cast", [zero_point], offset, {"to": _FLOAT}),
        ("Sub", [cast, offset], difference, {}),
        ("Mul", [difference, scale], node.output[0], {}),
    ]
    made = []
    for kind, inputs, output, attributes in parts:
        part = type(node)(op_type=kind, name=names.unused(f"{node.name}_{kind}"), input=inputs, output=[output])
        for name, value in attributes.items():
            part.attribute.add(name=name, i=value, type=_INT)
        made.append(part)
    return made


def _is_small(weight: Any) -> bool:
    return all((byte ^ 128) - 128 in _SMALL_WEIGHTS for byte in set(_bytes_of(weight)))


def _bytes_of(value: Any) -> bytes:
    """The bytes of an int8 initializer, however it holds them."""
    return value.raw_data or bytes(number & 255 for number in value.int32_data)
