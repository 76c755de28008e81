"""What makes XNNPACK compute this library's integers: changes to a QDQ program before it is handed over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .qdq_program import constant_of

_decomposed: Any = torch.ops.quantized_decomposed
_QUANTIZE: Any = _decomposed.quantize_per_tensor.default
_DEQUANTIZE: Any = _decomposed.dequantize_per_tensor.default
_DEQUANTIZE_CHANNELS = _decomposed.dequantize_per_channel.default
_aten: Any = torch.ops.aten
_ACTIVATIONS = {_aten.relu.default, _aten.hardtanh.default}
_LAYERS = {
    _aten.linear.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.convolution.default,
}


def fold_biases(program: torch.export.ExportedProgram) -> None:
    """Writes int32 biases as the float32 values that ExecuTorch makes the same integers of.

    It takes biases as floats alone, and divides them by the product of the scales of input and weight.
    """
    folded: set[fx.Node] = set()  # a layer that is called twice has one bias
    with _changed(program) as graph:
        for node in list(graph.nodes):
            if node.target is not _DEQUANTIZE_CHANNELS or node.args[-1] is not torch.int32:
                continue
            placeholder = node.args[0]
            assert isinstance(placeholder, fx.Node)
            if placeholder not in folded:
                codes, scale = (constant_of(program, argument) for argument in node.args[:2])
                assert codes is not None
                assert codes.dtype is torch.int32
                assert scale is not None
                _set_constant(program, placeholder, _bias_values(codes, scale))
                placeholder.meta["val"] = node.meta["val"]
                folded.add(placeholder)
            node.replace_all_uses_with(placeholder)
            graph.erase_node(node)


def keep_grids_apart(program: torch.export.ExportedProgram) -> None:
    """Puts the result of an activation on its input's grid before it goes on another.

    ExecuTorch fuses an activation with the layer before it, whatever grid lies between, and the first of two roundings
    would be lost.
    """
    with _changed(program) as graph:
        for node in list(graph.nodes):
            if node.target is not _QUANTIZE:
                continue
            activation = node.args[0]
            if not isinstance(activation, fx.Node) or activation.target not in _ACTIVATIONS:
                continue
            (source,) = activation.all_input_nodes
            if source.target != _DEQUANTIZE or source.args[1:] == node.args[1:]:
                continue
            grid: tuple[Any, ...] = source.args[1:]
            with graph.inserting_before(node):
                codes = graph.call_function(_QUANTIZE, (activation, *grid))
                values = graph.call_function(_DEQUANTIZE, (codes, *grid))
            codes.meta = dict(node.meta)
            values.meta = dict(activation.meta)
            node.args = (values, *node.args[1:])


def divide_what_is_quantized(program: torch.export.ExportedProgram) -> None:
    """Divides floats by their scale before they are quantized, where layers alone read the codes.

    XNNPACK multiplies by the reciprocal, which comes out otherwise for one code in a million. Of values that were
    divided the grid has a scale of one; each layer's weights have the product of the two scales in place of their own,
    which is the number that its multiplier begins with anyway.
    """
    with _changed(program) as graph:
        for node in list(graph.nodes):
            if node.target is not _QUANTIZE or not _is_float(node.args[0]):
                continue
            input, scale, zero_point, *ends = node.args
            layers = _layers_behind(node)
            if layers is None or scale == 1:
                continue
            scales = [constant_of(program, weight.args[1]) for weight in layers.values()]
            assert isinstance(input, fx.Node)
            with graph.inserting_before(node):
                steps = graph.call_function(_aten.div.Tensor, (input, scale))
            steps.meta = dict(node.meta, val=input.meta["val"])
            node.args = (steps, 1.0, zero_point, *ends)
            for (dequantize, weight), weight_scale in zip(layers.items(), scales, strict=True):
                assert weight_scale is not None
                dequantize.args = (dequantize.args[0], 1.0, *dequantize.args[2:])
                placeholder = weight.args[1]
                assert isinstance(placeholder, fx.Node)
                _set_constant(program, placeholder, weight_scale * torch.tensor(scale, dtype=torch.float32))


def _layers_behind(quantize: fx.Node) -> dict[fx.Node, fx.Node] | None:
    """The dequantize nodes that read codes, each with the one of the weights that it is multiplied by; None where one
    of them is read by anything but one layer, or where a layer's weights are others' too."""
    found: dict[fx.Node, fx.Node] = {}
    for reader in quantize.users:
        users = list(reader.users)
        if reader.target is not _DEQUANTIZE or len(users) != 1 or users[0].target not in _LAYERS:
            return None
        input, weight = users[0].args[:2]
        if input is not reader or not isinstance(weight, fx.Node) or weight.target is not _DEQUANTIZE_CHANNELS:
            return None
        scale = weight.args[1]
        if not isinstance(scale, fx.Node) or len(scale.users) != 1 or len(weight.users) != 1:
            return None
        found[reader] = weight
    return found


def _is_float(value: Any) -> bool:
    """Whether a value is not what XNNPACK computes on codes: an argument, made from floats alone, or codes of another
    grid as floats."""
    if not isinstance(value, fx.Node):
        return False
    sources = {_DEQUANTIZE, _DEQUANTIZE_CHANNELS}
    return value.target is _DEQUANTIZE or not any(node.target in sources for node in _sources_of(value))


def _sources_of(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads, through an activation that is fused with its input."""
    for source in node.all_input_nodes:
        yield source
        if node.target in _ACTIVATIONS:
            yield from source.all_input_nodes


def _bias_values(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values nearest to ``codes * scale`` that come out as ``codes`` when quantized."""
    values = (codes.double() * scale.double()).to(torch.float32)
    zeros = torch.zeros_like(codes, dtype=torch.int64)
    for direction in (torch.inf, -torch.inf):
        ends = torch.iinfo(torch.int32)
        made = _decomposed.quantize_per_channel(values, scale, zeros, 0, ends.min, ends.max, torch.int32)
        neighbours = torch.nextafter(values, torch.tensor(direction))
        redone = _decomposed.quantize_per_channel(neighbours, scale, zeros, 0, ends.min, ends.max, torch.int32)
        values = torch.where((made != codes) & (redone == codes), neighbours, values)
    return values


def _set_constant(program: torch.export.ExportedProgram, placeholder: fx.Node, value: Tensor) -> None:
    for spec in program.graph_signature.input_specs:
        if getattr(spec.arg, "name", None) == placeholder.name:
            assert spec.target is not None
            (program.state_dict if spec.target in program.state_dict else program.constants)[spec.target] = value


@contextlib.contextmanager
def _changed(program: torch.export.ExportedProgram) -> Iterator[fx.Graph]:
    """The program's graph, checked and compiled again afterwards."""
    yield program.graph
    program.graph.lint()
    program.graph_module.recompile()
