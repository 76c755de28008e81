"""Where the nodes of a traced model go: an analysis of its graph that changes nothing.

A tensor that enters a quantized operation is quantized once, at its producer's end of the chain
Conv/Linear -> BatchNorm -> activation; every consumer shares that node. Operations that only move or select values
share the grid of their input. Sums, products, concatenations, averages and element-wise functions of quantized tensors
get a node of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from ..graph.containers import Calls, readers
from ..graph.fixed_values import computing_nodes
from ..graph.subgraph import module_of_nodes
from ..int8.average_pooling import AveragePooling, Mean
from ..int8.integer_operation import IntegerOperation, Multiplication
from ..int8.lookup import Lookup
from ..qat.batch_norms import evaluation_form
from ..qat.config import QATConfig
from ..qat.layer_types import layer_type_of, obstacle_of, takes_batch_norm
from . import operations
from .function_layers import FunctionLayer, function_layer
from .integer_operations import integer_operation
from .pointwise import pointwise_region
from .report import SKIPPED


@dataclass
class Chain:
    """A layer, a module or a ``function``, with what runs in its wrapper. ``end`` is the last node of the chain, whose
    value is quantized; ``source`` is the node whose grid the input is on, where the layer takes values, and
    ``dropouts`` are what lies between and takes values off it in training."""

    node: fx.Node
    layer: nn.Module
    config: QATConfig
    function: FunctionLayer | None = None
    batch_norm: fx.Node | None = None
    activation: fx.Node | None = None
    quantizes_output: bool = True
    source: fx.Node | None = None
    dropouts: tuple[fx.Node, ...] = ()

    @property
    def end(self) -> fx.Node:
        return self.activation or self.batch_norm or self.node

    @property
    def input(self) -> fx.Node | None:
        """The node of the layer's input, where the layer takes values (an embedding takes indices)."""
        operand = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        return operand if isinstance(operand, fx.Node) and operations.is_float_tensor(operand) else None


@dataclass
class Joined:
    """An operation other than a layer that computes on integers, and the activation that runs with it.

    ``operands`` are what it reads in the graph, ``sources`` the nodes whose grids these are on, ``dropouts`` what lies
    between. ``nodes`` are all that it stands for: several for a region that is one table.
    """

    node: fx.Node
    operation: IntegerOperation
    operands: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    activation: fx.Node | None = None
    sources: tuple[fx.Node, ...] = ()
    dropouts: tuple[fx.Node, ...] = ()
    config: QATConfig = field(default_factory=QATConfig)

    @property
    def end(self) -> fx.Node:
        return self.activation or self.node


@dataclass
class Placement:
    """Chains and joined operations to wrap, other values to quantize with their configuration, what shares the grid of
    its input, what computes weights, the layers that stay float with the reason (by name, or by node where a function
    is the layer), and the parameters that functions take as weights, quantized or skipped."""

    chains: list[Chain] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    quantized: dict[fx.Node, QATConfig] = field(default_factory=dict)
    sharing: set[fx.Node] = field(default_factory=set)
    weights: set[fx.Node] = field(default_factory=set)
    float_layers: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    float_functions: dict[fx.Node, str] = field(default_factory=dict)


def place(graph: fx.Graph, modules: Mapping[str, nn.Module], config: QATConfig, prefix: str = "") -> Placement:
    """Decides for every node; ``node.meta["tensor"]`` tells which values are floating-point tensors.

    Args:
        graph: of a part of the model, with marks (:mod:`.graph.containers`).
        modules: what it calls, by name.
        config: what to quantize, and how.
        prefix: the name of the part in the model.
    """
    return _Placer(graph, modules, config, prefix).place()


def skip_reason(name: str, layer: nn.Module, config: QATConfig) -> str | None:
    """Why a layer of a supported type stays float; None where it is quantized."""
    if config.for_layer(name, layer) is None:
        return SKIPPED
    return obstacle_of(layer)


class _Placer:
    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module], config: QATConfig, prefix: str) -> None:
        self.prefix = f"{prefix}." if prefix else ""
        self.calls = Calls(graph)
        self.graph = graph
        self.modules = modules
        self.config = config
        self.placement = Placement()
        self.chain_of_end: dict[fx.Node, Chain] = {}
        self.on_grid: set[fx.Node] = set()

    def place(self) -> Placement:
        for node in self.graph.nodes:
            chain = self._layer_of_module(node) if node.op == "call_module" else self._layer_of_function(node)
            if chain is not None:
                self._start_chain(chain)
        for chain in self.placement.chains:
            chain.quantizes_output = not self._is_linear_result(chain)
            if chain.quantizes_output:
                self.on_grid.add(chain.end)
        for chain in self.placement.chains:
            if chain.input is not None:
                self._demand(self.base(chain.input))
        while self._join_operation():
            pass
        # Only now is it known which values are on a grid, and so what a ReLU shares its grid with.
        for chain in self.placement.chains:
            if chain.input is not None:
                chain.source = self.base(chain.input)
                chain.dropouts = self._dropouts_before(chain.input)
        for entry in self.placement.joined:
            entry.sources = tuple(map(self.base, entry.operands))
            entry.dropouts = self._dropouts_before(*entry.operands)
        for entry in self.placement.joined:
            entry.config = self._config_of_readers(entry.end)
        ends = {chain.end for chain in self.placement.chains} | {entry.end for entry in self.placement.joined}
        self.placement.sharing = set(filter(self._shares_grid, self.graph.nodes))
        self.placement.quantized = {
            node: self._config_of_readers(node)
            for node in self.graph.nodes
            if node in self.on_grid and node not in ends and not self._shares_grid(node)
        }
        return self.placement

    def _config_of_readers(self, node: fx.Node) -> QATConfig:
        """Of the layers that read a value, the configuration with the finest grid."""
        readers = [chain.config for chain in self.placement.chains if chain.source is node]
        return max(readers, key=lambda config: config.activation_bits, default=self.config)

    def _layer_of_module(self, node: fx.Node) -> Chain | None:
        name, layer = str(node.target), self.modules[str(node.target)]
        if layer_type_of(layer) is None:
            return None
        reason = skip_reason(f"{self.prefix}{name}", layer, self.config)
        config = self.config.for_layer(f"{self.prefix}{name}", layer)
        if reason is not None or config is None:
            self.placement.float_layers[name] = str(reason)
            return None
        if len(node.args) + len(node.kwargs) != 1:
            self.placement.float_layers[name] = "it is called with more than its input"
            return None
        return Chain(node, layer, config)

    def _layer_of_function(self, node: fx.Node) -> Chain | None:
        found = function_layer(node, self.modules)
        if found is None:
            return None
        if isinstance(found, str):
            self.placement.float_functions[node] = found
            return None
        config = found.config(self.config, self.modules, self.prefix)
        nodes = {step for given in found.given for step in computing_nodes(given)}
        read = {str(step.target) for step in nodes if step.op == "get_attr"}
        if config is None:
            self.placement.float_functions[node] = SKIPPED
            self.placement.skipped |= read
            return None
        self.placement.weights |= nodes
        self.placement.read |= read
        return Chain(node, found.layer, config, found)

    def _start_chain(self, chain: Chain) -> None:
        follower = _only_user(chain.node)
        if follower is not None and self._folds(follower, chain):
            chain.batch_norm = follower
            form = evaluation_form(self.modules[str(follower.target)])
            follower = _only_user(follower) if form is not None and form.activation is None else None
        if follower is not None and operations.clipping_module(follower, self.modules) is not None:
            chain.activation = follower
        self.placement.chains.append(chain)
        self.chain_of_end[chain.end] = chain

    def _folds(self, follower: fx.Node, chain: Chain) -> bool:
        if follower.op != "call_module":
            return False
        if isinstance(chain.layer, nn.Linear) and len(chain.node.meta["tensor"].shape) != 2:
            return False  # batch normalization runs over axis 1, the layer's channels lie along the last
        return takes_batch_norm(chain.layer, self.modules[str(follower.target)])

    def _is_linear_result(self, chain: Chain) -> bool:
        """Whether a linear layer gives the model's result: no quantized layer reads what is computed from it."""
        if chain.config.quantize_last_linear or not isinstance(chain.layer, nn.Linear):
            return False
        layers = {other.node for other in self.placement.chains}
        pending, seen = [chain.end], {chain.end}
        while pending:
            readers = set(pending.pop().users) - seen
            if readers & layers:
                return False
            seen |= readers
            pending.extend(readers)
        return True

    def base(self, node: fx.Node) -> fx.Node:
        """The node whose grid ``node`` is on: back through whatever preserves values."""
        return self._path(node)[-1]

    def _path(self, node: fx.Node) -> list[fx.Node]:
        """From ``node`` back to the one whose grid it is on."""
        path = [node]
        while self._shares_grid(path[-1]):
            path.append(path[-1].args[0])  # type: ignore[arg-type]
        return path

    def _dropouts_before(self, *operands: fx.Node) -> tuple[fx.Node, ...]:
        """What takes values off their grid in training, on the way to these."""
        path = (node for operand in operands for node in self._path(operand))
        return tuple(
            node for node in path if node.op == "call_module" and operations.is_dropout(self.modules[str(node.target)])
        )

    def _shares_grid(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node in self.chain_of_end:
            return False
        if operations.preserves_values(node, self.modules):
            # What is taken out of a tuple or a dictionary shares a grid only if those are parts of one tensor.
            return operations.is_float_tensor(source) or self._shares_grid(source)
        if operations.is_relu(node, self.modules):
            # At the end of a chain the ReLU comes first and is quantized; elsewhere it finds its input on a grid.
            return source in self.on_grid or self._shares_grid(source)
        return False

    def _demand(self, base: fx.Node) -> None:
        """Quantizes a value because a quantized operation reads it."""
        self.on_grid.add(base)
        chain = self.chain_of_end.get(base)
        if chain is not None:
            chain.quantizes_output = True

    def _join_operation(self) -> bool:
        """Brings one operation that reads a quantized value to integers, with its operands; False when none is left."""
        done = {node for entry in self.placement.joined for node in entry.nodes} | set(self.chain_of_end)
        nodes = [node for node in self.graph.nodes if node not in done and not self._shares_grid(node)]
        # Regions first: a product inside of one is part of its table.
        entry = next(filter(None, map(self._region, nodes)), None) or next(
            filter(None, map(self._operation, nodes)), None
        )
        if entry is None:
            return False
        for operand in entry.operands:
            self._demand(self.base(operand))
        self.placement.joined.append(entry)
        self.on_grid.add(entry.end)
        return True

    def _region(self, node: fx.Node) -> Joined | None:
        """What ends at a value that a quantized operation reads, and is a function of one that is on a grid."""
        if node not in self.on_grid:
            return None
        region = pointwise_region(node, self.modules, self._is_on_codes)
        if region is None or not self.calls.are_whole(region.nodes):
            return None
        called = {str(inner.target) for inner in region.nodes if inner.op == "call_module"}
        function = module_of_nodes(region.nodes, (region.source,), self.modules)
        lookup = Lookup(function, tuple(self.modules[name] for name in sorted(called)))
        return Joined(node, lookup, (region.source,), region.nodes)

    def _is_on_codes(self, node: fx.Node) -> bool:
        return self.base(node) in self.on_grid

    def _operation(self, node: fx.Node) -> Joined | None:
        call = integer_operation(node, self.modules)
        if call is None:
            return None
        operation, operands = call
        if not self._joins(node, operation, [self.base(operand) for operand in operands]):
            return None
        entry = Joined(node, operation, operands, (node,))
        follower = _only_user(node)
        if operation.clips and follower is not None and operations.clipping_module(follower, self.modules) is not None:
            entry.activation, entry.nodes = follower, (node, follower)
        return entry

    def _is_held(self, base: fx.Node) -> bool:
        """Whether a value is on a grid, or a function, element by element, of one that is."""
        return base in self.on_grid or pointwise_region(base, self.modules, self._is_on_codes) is not None

    def _joins(self, node: fx.Node, operation: IntegerOperation, bases: list[fx.Node]) -> bool:
        """Whether an operation on these values is to be quantized: one is held by a grid, and the others can be.

        An operand may be a mask, whose large or infinite values no grid can hold beside ordinary ones. So what comes
        from outside the graph's own computation does not join, and neither does what was zero in the example (a mask
        that hid nothing), or so large that one step of its grid exceeds everything that the others hold.
        """
        held = {base for base in bases if self._is_held(base)}
        if not held:
            return False
        if isinstance(operation, Multiplication):
            # A factor computed in float (one over a deviation, say) may need all its digits.
            return held == set(bases)
        if isinstance(operation, AveragePooling) and isinstance(operation.pooling, Mean) and node not in self.on_grid:
            return False  # part of a normalization written out
        extents = {base: base.meta["tensor"].extent for base in bases}
        largest = max(extents[base] for base in held)
        return all(
            base in held
            or (
                base.op not in ("placeholder", "get_attr")
                and 0 < extents[base] <= largest * 2**self.config.activation_bits
            )
            for base in bases
        )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = readers(node)
    return users[0] if len(users) == 1 else None
