"""Where the nodes of a traced model go: an analysis of its graph that changes nothing.

A tensor is quantized if a layer reads its integers, once, and every layer that reads it shares the node. Where integers
of it can be had (it is the end of a chain Conv/Linear -> BatchNorm -> activation, or a sum, product, concatenation,
average or element-wise function of such values), they are computed, and then the operands are read as integers, too.
Otherwise it is computed in float, and the node stands between it and the layers. Operations that only move or select
values share the grid of their input. What nobody reads as integers stays float, but for the outputs of convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from ..graph.containers import Calls, readers
from ..graph.fixed_values import computing_nodes
from ..graph.subgraph import module_of_nodes
from ..int8.integer_operation import IntegerOperation
from ..int8.lookup import Lookup
from ..qat.batch_norms import evaluation_form
from ..qat.config import QATConfig
from ..qat.layer_types import layer_type_of, obstacle_of, takes_batch_norm
from ..targets import TARGETS
from . import operations
from .function_layers import FunctionLayer, function_layer
from .integer_operations import integer_operation
from .pointwise import PointwiseRegion, pointwise_region
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


def takes_output_grid(layer: nn.Module, config: QATConfig) -> bool:
    """Whether a layer's output is put on a grid even where nothing reads its integers: engines run a convolution in
    integers only between a dequantize and a quantize node, some of them a linear layer, too."""
    if isinstance(layer, nn.Linear):
        return not TARGETS[config.target].has_float_results
    return not isinstance(layer, nn.Embedding)


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
        self.late: set[fx.Node] = set()  # parts of float values that are quantized, and not the whole
        self.results: set[fx.Node] = set()  # of operations on integers
        self.anchors: dict[fx.Node, bool] = {}

    def place(self) -> Placement:
        for node in self.graph.nodes:
            chain = self._layer_of_module(node) if node.op == "call_module" else self._layer_of_function(node)
            if chain is not None:
                self._start_chain(chain)
        for chain in self.placement.chains:
            is_asked_for = chain.config.quantize_last_linear and self._is_linear_result(chain)
            if takes_output_grid(chain.layer, chain.config) or is_asked_for:
                self.on_grid.add(chain.end)
        self._demand_inputs()
        self._join_operations()
        # Only now is it known which values are on a grid, and so what a ReLU shares its grid with.
        for chain in self.placement.chains:
            chain.quantizes_output = chain.end in self.on_grid
            if chain.input is not None:
                chain.source = self.base(chain.input)
                chain.dropouts = self._dropouts_before(chain.input)
        for entry in self.placement.joined:
            entry.sources = tuple(map(self.base, entry.operands))
            entry.dropouts = self._dropouts_before(*entry.operands)
        for entry in self.placement.joined:
            entry.config = self._config_of_readers(entry.end)
        ends = self.chain_of_end.keys() | self.results
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
        if not isinstance(chain.layer, nn.Linear):
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
        return tuple(filter(self._is_dropout, (node for operand in operands for node in self._path(operand))))

    def _is_dropout(self, node: fx.Node) -> bool:
        return node.op == "call_module" and operations.is_dropout(self.modules[str(node.target)])

    def _shares_grid(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node in self.chain_of_end or node in self.late or node in self.results:
            return False
        if operations.preserves_values(node, self.modules):
            # What is taken out of a tuple or a dictionary shares a grid only if those are parts of one tensor.
            return operations.is_float_tensor(source) or self._shares_grid(source)
        if operations.is_relu(node, self.modules):
            # At the end of a chain the ReLU comes first and is quantized; elsewhere it finds its input on a grid.
            return source in self.on_grid or self._shares_grid(source)
        return False

    def _demand_inputs(self) -> None:
        """Quantizes what layers read: where integers of it are at hand; of floats, the part that all of them read."""
        paths: dict[fx.Node, list[list[fx.Node]]] = {}
        leading = {chain.node for chain in self.placement.chains}
        for chain in self.placement.chains:
            if chain.input is not None:
                path = self._path(chain.input)
                paths.setdefault(path[-1], []).append(path[::-1])
                leading.update(path)
        self.on_grid |= self.chain_of_end.keys() & paths.keys()
        for base in [node for node in self.graph.nodes if node in paths and node not in self.on_grid]:
            if self._entry(base) is not None:
                self.on_grid.add(base)
                continue
            place, has_left = base, False
            for steps in zip(*(path[1:] for path in paths[base]), strict=False):
                if len(set(steps)) > 1:
                    break
                # Others read more than the layers do, or read it as well: to them it stays as it is.
                is_read = any(reader not in leading for reader in readers(steps[0]))
                has_left = has_left or operations.takes_a_part(steps[0]) or is_read
                if has_left and operations.is_float_tensor(steps[0]):
                    place, has_left = steps[0], False
            self.late.add(place)
            self.on_grid.add(place)

    def _join_operations(self) -> None:
        """Brings operations to integers whose result is read as integers and whose operands are, or can be made from
        what is, on grids; then their operands are read as integers, too."""
        pending = [node for node in reversed(self.graph.nodes) if node in self.on_grid]
        done: set[fx.Node] = set(self.chain_of_end)
        while pending:
            node = pending.pop(0)
            if node in done or self._shares_grid(node):
                continue
            done.add(node)
            entry = self._entry(node)
            if entry is None:
                continue
            self.placement.joined.append(entry)
            self.results.add(node)
            bases = [self.base(operand) for operand in entry.operands]
            self.on_grid.update(bases)
            pending.extend(bases)

    def _entry(self, end: fx.Node) -> Joined | None:
        """The operation on integers whose result a value is, if there is one."""
        return self._clipped(end) or self._region(end) or self._operation(end)

    def _clipped(self, end: fx.Node) -> Joined | None:
        """An operation with the clipping activation that ends it."""
        node = end.args[0] if end.args else None
        if not isinstance(node, fx.Node) or operations.clipping_module(end, self.modules) is None:
            return None
        entry = None if node in self.on_grid or _only_user(node) is not end else self._operation(node)
        if entry is None or not entry.operation.clips:
            return None
        entry.activation, entry.nodes = end, (node, end)
        return entry

    def _region(self, node: fx.Node) -> Joined | None:
        """What is, element by element, a function of one value of which integers are at hand."""
        region = self._whole_region(node)
        if region is None:
            return None
        called = {str(inner.target) for inner in region.nodes if inner.op == "call_module"}
        function = module_of_nodes(region.nodes, (region.source,), self.modules)
        lookup = Lookup(function, tuple(self.modules[name] for name in sorted(called)))
        return Joined(node, lookup, (region.source,), region.nodes)

    def _whole_region(self, node: fx.Node) -> PointwiseRegion | None:
        region = pointwise_region(node, self.modules, self._is_anchor)
        return region if region is not None and self.calls.are_whole(region.nodes) else None

    def _operation(self, node: fx.Node) -> Joined | None:
        """An operation with an integer form whose operands are on grids or can be."""
        call = integer_operation(node, self.modules, TARGETS[self.config.target].operations)
        if call is None:
            return None
        operation, operands = call
        if not all(self._can_be_held(operand) for operand in operands):
            return None
        return Joined(node, operation, operands, (node,))

    def _is_anchor(self, node: fx.Node) -> bool:
        """Whether integers of a value are at hand: it is on a grid, or the result of an operation on such values."""
        base = self.base(node)
        if base in self.chain_of_end or base in self.on_grid:
            return base in self.on_grid and base not in self.late
        if base not in self.anchors:
            is_operation = self._whole_region(base) is None and self._operation(base) is not None
            self.anchors[base] = is_operation or self._clipped(base) is not None
        return self.anchors[base]

    def _can_be_held(self, node: fx.Node) -> bool:
        """Whether a value is an anchor, or a function, element by element, of one."""
        return self._is_anchor(node) or self._whole_region(self.base(node)) is not None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = readers(node)
    return users[0] if len(users) == 1 else None
