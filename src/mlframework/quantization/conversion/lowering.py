"""Lowers the graph of a prepared model: nodes become integer modules, and edges carry codes wherever they can."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import fx, nn

from ..graph.containers import Call, Calls, is_mark, readers
from ..graph.nodes import SHAPE_QUERIES, add_module, label_of, owner_of, replace_module, unused_name
from ..graph.subgraph import module_of_nodes
from ..int8.layers import Int8Embedding
from ..int8.operations import Dequantize, Int8ReLU, Int8Selection, Quantize
from ..preparation import operations
from ..qat.batch_norms import Normalization, plain_batch_norm
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from .between_floats import between_floats
from .given_weights import drop_unread, take_weights_in


def lower(root: nn.Module, graph: fx.Graph) -> CodeEdges:
    """Replaces nodes in ``root`` by integer modules and edits ``graph`` to match, both in place.

    Every value is either float or codes on the grid of one node. Operations that only move or select values take
    codes as they are; where anything else reads codes, they are dequantized once.

    Returns:
        What stands between codes and floats at the edges of containers.
    """
    lowering = _Lowering(root, graph)
    for node in list(graph.nodes):
        lowering.visit(node)
    lowering.finish()
    return CodeEdges(lowering.grid_of)


class CodeEdges:
    """Between the codes that a graph passes to and fro and the floats that a container's hooks see."""

    def __init__(self, grid_of: Mapping[fx.Node, FakeQuantizeLayer]) -> None:
        self.grid_of = grid_of

    def quantize(self, node: fx.Node) -> Quantize | None:
        """To the codes of a node's value; None where that is no codes."""
        grid = self.grid_of.get(node)
        return None if grid is None else Quantize(grid.parameters_on_grid)

    def dequantize(self, node: fx.Node) -> Dequantize:
        """From the codes of a node's value."""
        return Dequantize(self.grid_of[node].parameters_on_grid)


class _Lowering:
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.graph = graph
        self.given = take_weights_in(root, graph)
        self.modules = operations.recognizable(root)
        self.grid_of: dict[fx.Node, FakeQuantizeLayer] = {}
        self.calls = Calls(graph)
        self.floats: dict[tuple[fx.Node, Call], fx.Node] = {}
        self.replacements: dict[str, nn.Module] = {}
        self.folded: set[nn.Module] = set()

    def visit(self, node: fx.Node) -> None:
        if is_mark(node):
            return
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantizeLayer) and module.layer is None:
            self.replacements[str(node.target)] = Quantize(module.parameters_on_grid)
            self._to_floats(node)
            self.grid_of[node] = module
        elif isinstance(module, QATModuleWrapper):
            self._visit_wrapper(node, module)
        elif isinstance(module, QATOperation):
            self._read_codes(node, module.sources)
            self.replacements[str(node.target)] = module.to_integer()
            self.grid_of[node] = module.output_fake_quantize
        elif module is not None and operations.is_dropout(module):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(node)
        elif self._takes_codes(node):
            self._keep_on_codes(node)
        elif not _asks_for_shape(node):
            self._to_floats(node)

    def _visit_wrapper(self, node: fx.Node, wrapper: QATModuleWrapper) -> None:
        name = str(node.target)
        self.folded.update(plain_batch_norm(module) or module for module in wrapper.following)
        if wrapper.input_fake_quantize is not None:  # a node of its own: an integer layer between floats
            self._to_floats(node)
            self.replacements[name] = between_floats(wrapper)
            return
        if wrapper.input_source is not None:
            self._read_codes(node, (wrapper.input_source,))
        layer = wrapper.to_integer()
        self.replacements[name] = layer
        output = wrapper.output_fake_quantize
        if output is None:
            return
        if isinstance(layer, Int8Embedding):  # its rows are on the grid of the table
            quantize = self._add(node, f"{label_of(node)}_quantize", Quantize(output.parameters_on_grid))
            with self.graph.inserting_after(node):
                codes = self.graph.call_module(quantize, (node,))
            node.replace_all_uses_with(codes, delete_user_cb=lambda user: user is not codes)
            node = self._beside(node, codes)
        self.grid_of[node] = output

    def _takes_codes(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.grid_of:
            return False
        if operations.is_division(node) and not all(map(_takes_one_part, readers(node))):
            return False  # a tuple of codes is no operand: its reader has no way to dequantize it
        return operations.preserves_values(node, self.modules) or operations.is_relu(node, self.modules)

    def _keep_on_codes(self, node: fx.Node) -> None:
        grid = self.grid_of[node.args[0]]  # type: ignore[index]
        if operations.is_relu(node, self.modules):
            name = self._add(node, f"{label_of(node)}_codes", Int8ReLU(grid.parameters_on_grid))
            with self.graph.inserting_after(node):
                relu = self._beside(node, self.graph.call_module(name, (node.args[0],)))
            node.replace_all_uses_with(relu)
            self.graph.erase_node(node)
            node = relu
        elif operations.is_selection(node, self.modules):
            node = self._select_codes(node, grid)
        self.grid_of[node] = grid

    def _read_codes(self, node: fx.Node, sources: Sequence[FakeQuantizeLayer]) -> None:
        """Quantizes again, once each, what an integer module reads but came to it by way of floats."""
        for operand, source in zip(node.all_input_nodes, sources, strict=False):
            if operand not in self.grid_of:
                name = self._add(node, f"{label_of(operand)}_quantize", Quantize(source.parameters_on_grid))
                with self.graph.inserting_before(node):
                    codes = self._beside(node, self.graph.call_module(name, (operand,)))
                self.grid_of[codes] = source
                node.replace_input_with(operand, codes)

    def _select_codes(self, node: fx.Node, grid: FakeQuantizeLayer) -> fx.Node:
        inputs = tuple(node.all_input_nodes)
        selection = Int8Selection(grid.parameters_on_grid, module_of_nodes([node], inputs, self.modules))
        name = self._add(node, f"{label_of(node)}_codes", selection)
        with self.graph.inserting_after(node):
            selected = self._beside(node, self.graph.call_module(name, inputs))
        node.replace_all_uses_with(selected)
        self.graph.erase_node(node)
        return selected

    def _to_floats(self, node: fx.Node) -> None:
        """Dequantizes, once each, the codes that an operation on floats reads."""
        for operand in node.all_input_nodes:
            if operand not in self.grid_of:
                continue
            here = operand, self.calls.of_node[node]
            if here not in self.floats:
                dequantize = Dequantize(self.grid_of[operand].parameters_on_grid)
                name = self._add(node, f"{label_of(operand)}_dequantize", dequantize)
                with self.graph.inserting_before(node):
                    self.floats[here] = self._beside(node, self.graph.call_module(name, (operand,)))
            node.replace_input_with(operand, self.floats[here])

    def _add(self, node: fx.Node, name: str, module: nn.Module) -> str:
        """Adds a module to the container whose code a node is."""
        return add_module(self.root, owner_of(node), name, module)

    def _beside(self, node: fx.Node, added: fx.Node) -> fx.Node:
        """Has a new node belong to the container whose code another is."""
        added.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        self.calls.of_node[added] = self.calls.of_node[node]
        return added

    def finish(self) -> None:
        """Puts the integer modules in place and takes out what was folded into them."""
        self._keep_parameters_read()
        for name, module in self.replacements.items():
            replace_module(self.root, self.modules[name], module)
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        called_batch_norms = {plain_batch_norm(self.modules.get(name)) for name in called}
        for name, module in self.modules.items():
            if module in self.folded and name not in called and module not in called_batch_norms:
                remains = nn.Identity()
                remains._modules.update(_without_normalization(module))  # an activation inside may be called
                self.root.set_submodule(name, remains)
        drop_unread(self.root, self.graph, self.given)

    def _keep_parameters_read(self) -> None:
        """What the graph also reads by name (tied weights, running statistics) stays, under names of its own."""
        for node in self.graph.nodes:
            layer, _, last = str(node.target).rpartition(".")
            if node.op == "get_attr" and (layer in self.replacements or self.modules.get(layer) in self.folded):
                value = getattr(self.modules[layer], last)
                owner = owner_of(node)
                container = self.root.get_submodule(owner)
                name = unused_name(container, node.name)
                node.target = f"{owner}.{name}" if owner else name
                if all(user.target is getattr and user.args[1] in ("dtype", "device") for user in node.users):
                    container.register_buffer(name, value.detach().new_empty(0), persistent=False)
                elif isinstance(value, nn.Parameter):
                    container.register_parameter(name, value)
                else:
                    container.register_buffer(name, value)


def _without_normalization(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if not isinstance(child, Normalization)}


def _takes_one_part(node: fx.Node) -> bool:
    """Whether the node takes one tensor out of several."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _asks_for_shape(node: fx.Node) -> bool:
    """Whether the node needs no values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in SHAPE_QUERIES
    return node.op == "call_method" and node.target in SHAPE_QUERIES
