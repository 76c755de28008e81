"""The converted model as one that ``torch.onnx`` can write: every integer module gives way to what a file states.

Values between modules are codes, as in the converted model, so every consumer of codes has a dequantize node of its
own. Operations of the graph that only move codes get nodes before and after them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

from ..graph.containers import graph_of, is_part
from ..graph.generated_forward import source_of
from ..graph.nodes import SHAPE_QUERIES, add_module, owner_of
from ..graph.subgraph import module_of_nodes
from ..graph.unflattening import set_forwards
from ..int8.average_pooling import AveragePooling
from ..int8.integer_module import IntegerModule
from ..int8.integer_operation import Concatenation
from ..int8.layers import Int8Convolution, Int8ConvTranspose2d, Int8Embedding, Int8Layer, Int8Linear
from ..int8.lookup import Lookup
from ..int8.operations import Dequantize, Int8Operation, Int8ReLU, Int8Selection, Quantize
from ..targets import Conventions
from .grid_nodes import GridNodes
from .qdq_average_layers import average_as_layer
from .qdq_averages import average
from .qdq_layers import QDQConvolution, QDQEmbedding, QDQLinear
from .qdq_nodes import QDQDequantize, QDQQuantize, QDQReLU, QDQSelection
from .qdq_operations import QDQConcatenation, QDQOperation, QDQTable, fuses_exactly, nodes_of
from .qdq_transposed import transposed_convolution

Shapes = Mapping[IntegerModule, list[torch.Size]]

_DIVIDING = {"chunk", "split", "unbind"}
_KEEPING = {"contiguous", "clone", "detach"}


def make_export_model(converted: nn.Module, conventions: Conventions, shapes: Shapes) -> nn.Module:
    """Turns a converted model into its exported form, in place where the root itself stays.

    Args:
        converted: the model; it is changed.
        conventions: of the engine.
        shapes: what every integer module was given when the example ran.
    """
    if isinstance(converted, IntegerModule):
        return _form_of(converted, conventions, shapes)
    for part in [module for module in converted.modules() if is_part(module)]:
        _put_nodes_around_moves(part)
    forms: dict[nn.Module, nn.Module] = {}
    for name, module in list(converted.named_modules(remove_duplicate=False)):
        if isinstance(module, IntegerModule):
            if module not in forms:
                forms[module] = _form_of(module, conventions, shapes)
            converted.set_submodule(name, forms[module])
    return converted


def _form_of(module: IntegerModule, conventions: Conventions, shapes: Shapes) -> nn.Module:
    on_codes = conventions.exact
    if isinstance(module, Quantize):
        return QDQQuantize(module, on_codes)
    if isinstance(module, Dequantize):
        return QDQDequantize(module)
    if isinstance(module, Int8ReLU):
        return QDQReLU(module, on_codes)
    if isinstance(module, Int8Selection):
        return QDQSelection.of(module)
    if isinstance(module, Int8Operation):
        if isinstance(module.operation, AveragePooling) and (conventions.exact or conventions.averages_as_layers):
            found = shapes.get(module, [])
            return average(module, found) if conventions.exact else average_as_layer(module, found, conventions)
        if conventions.concatenates_one_grid and isinstance(module.operation, Concatenation):
            return QDQConcatenation(module)
        if conventions.exact and isinstance(module.operation, Lookup) and not fuses_exactly(module):
            return QDQTable(module)
        return QDQOperation(module, on_codes)
    if isinstance(module, Int8Linear):
        return QDQLinear(module, on_codes)
    if isinstance(module, Int8Convolution):
        return QDQConvolution(module, on_codes)
    if isinstance(module, Int8ConvTranspose2d):
        return transposed_convolution(module, on_codes)
    if isinstance(module, Int8Embedding):
        return QDQEmbedding(module)
    raise NotImplementedError(f"{type(module).__name__} has no form in an exported file")


def _put_nodes_around_moves(part: nn.Module) -> None:
    """Dequantizes before and quantizes after every operation of a graph that moves codes."""
    graph = graph_of(part)
    modules = dict(part.named_modules())
    grids: dict[fx.Node, GridNodes] = {}
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, IntegerModule):
            grid = _output_grid(module)
            if grid is not None:
                grids[node] = grid
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in grids or _name_of(node) in SHAPE_QUERIES:
            continue
        grid = grids[source]
        if _name_of(node) not in _KEEPING and not _takes_a_part(node, source):
            node = _between_nodes(part, graph, node, grid, modules)
        grids[node] = grid
    set_forwards(part, graph, source_of(part).given[0], runs_own_code=False)


def _between_nodes(
    part: nn.Module, graph: fx.Graph, node: fx.Node, grid: GridNodes, modules: Mapping[str, nn.Module]
) -> fx.Node:
    inputs = tuple(node.all_input_nodes)
    selection = QDQSelection(grid, module_of_nodes([node], inputs, modules))
    name = add_module(part, owner_of(node), node.name, selection)
    with graph.inserting_after(node):
        moved = graph.call_module(name, inputs)
    node.replace_all_uses_with(moved)
    moved.meta.update(name=_name_of(node), nn_module_stack=node.meta.get("nn_module_stack"))
    graph.erase_node(node)
    return moved


def _output_grid(module: IntegerModule) -> GridNodes | None:
    """The grid of the codes that an integer module returns; None where it returns floats."""
    if isinstance(module, (Quantize, Int8ReLU, Int8Selection)):
        return GridNodes(module.scale, module.zero_point, module.scheme)
    if isinstance(module, Int8Operation):
        return nodes_of(module.output_parameters)
    if isinstance(module, Int8Layer) and module.output_scheme is not None:
        assert module.output_scale is not None and module.output_zero_point is not None
        return GridNodes(module.output_scale, module.output_zero_point, module.output_scheme)
    return None


def _name_of(node: fx.Node) -> str:
    """What a node calls: the name of the function, of the method, or of the attribute that it gets."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    return str(node.meta.get("name") or getattr(node.target, "__name__", node.target))


def _takes_a_part(node: fx.Node, source: fx.Node) -> bool:
    """Whether the node takes one of several tensors that an operation returned."""
    return node.target is operator.getitem and _name_of(source) in _DIVIDING
