"""Carries a placement out: edits a model's graph and its module tree together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from ..graph.containers import Calls, is_mark, readers
from ..graph.nodes import add_module, label_of, owner_of, replace_module
from ..graph.watching import PATCHED
from ..int8.lookup import Lookup
from ..qat.batch_norms import Normalization, plain_batch_norm
from ..qat.config import QATConfig
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import FUNCTIONS, GivenWeightWrapper, arguments_of_call
from ..qat.qat_module_wrapper import QATModuleWrapper, activation_node
from ..qat.qat_operation import QATOperation
from ..scheme import QuantizationScheme
from . import operations
from .function_layers import FunctionLayer
from .neighbours import note_readers
from .placement import Chain, Joined, Placement
from .quantized_reads import quantize_reads
from .report import ReportEntry
from .shares import multiply_adds_of


class GraphRewriter:
    """Wraps chains, puts operations on codes in and inserts nodes, in ``root`` and in ``graph``.

    Args:
        root: the model; its submodules are replaced in place.
        graph: its graph.
        modules: its submodules by name, before.
        config: for what no layer's configuration covers.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module], config: QATConfig) -> None:
        self.root = root
        self.graph = graph
        self.modules = modules
        self.config = config
        self.calls = Calls(graph)
        self.grid_of: dict[fx.Node, FakeQuantizeLayer] = {}
        self.first_wrapper: dict[nn.Module, QATModuleWrapper] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.erased: set[fx.Node] = set()
        self.weight_nodes: dict[tuple[str, QuantizationScheme], FakeQuantizeLayer] = {}
        self.work = {node: _multiply_adds(node) for node in graph.nodes}
        self.device = next((tensor.device for tensor in (*root.parameters(), *root.buffers())), None)

    def rewrite(self, placement: Placement) -> list[ReportEntry]:
        """Does it all; returns an account of every operation."""
        wrappers = [self._wrapper(chain) for chain in placement.chains]
        nodes = [self._node(node, config) for node, config in placement.quantized.items()]
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        joined = sorted(placement.joined, key=lambda entry: order[entry.node])
        operation_modules = [self._operation(entry) for entry in joined]
        accounts = self._float_operations(placement)
        for chain, wrapper in zip(placement.chains, wrappers, strict=True):
            if chain.source is not None:
                wrapper.take_input_from(self.grid_of[chain.source], self._modules_of(chain.dropouts))
            if chain.function is None:
                self._put_wrapper(chain, wrapper)
                name = str(chain.node.target)
            else:
                name = self._put_given_weight_wrapper(chain, chain.function, wrapper)
            accounts[chain.node] = replace(layer_entry(name, wrapper), multiply_adds=self.work[chain.node])
        for entry, operation in zip(joined, operation_modules, strict=True):
            accounts[entry.node] = self._put_operation(entry, operation)
        for node, layer in zip(placement.quantized, nodes, strict=True):
            accounts[node] = self._put_node(node, layer, placement)
        self._note_direct_edges()
        note_readers(self.root, self.graph, self.modules, {node: self._grid_made_by(node) for node in self.graph.nodes})
        found = {accounts[node].name: accounts[node] for node in sorted(accounts, key=order.__getitem__, reverse=True)}
        return list(reversed(found.values()))  # of a module that is called several times, the first account

    def _wrapper(self, chain: Chain) -> QATModuleWrapper:
        batch_norm = None if chain.batch_norm is None else self.modules[str(chain.batch_norm.target)]
        activation = None if chain.activation is None else operations.clipping_module(chain.activation, self.modules)
        if chain.function is None:
            wrapper = QATModuleWrapper(
                chain.layer,
                chain.config,
                batch_norm=batch_norm,
                activation=activation,
                shares_weight_of=self.first_wrapper.get(chain.layer),
            )
            self.first_wrapper.setdefault(chain.layer, wrapper)
        else:
            wrapper = self._given_weight_wrapper(chain, chain.function, batch_norm, activation)
        wrapper.input_fake_quantize = None
        if chain.quantizes_output:
            assert wrapper.output_fake_quantize is not None
            self.grid_of[chain.end] = wrapper.output_fake_quantize
        else:
            wrapper.output_fake_quantize = None
        return wrapper

    def _given_weight_wrapper(
        self, chain: Chain, function: FunctionLayer, batch_norm: nn.Module | None, activation: nn.Module | None
    ) -> GivenWeightWrapper:
        weight, bias = function.values(self.modules)
        function.layer.train(self.modules[function.owner].training)
        wrapper = GivenWeightWrapper(
            function.layer, weight, bias, chain.config, batch_norm=batch_norm, activation=activation
        )
        if function.weight.op == "get_attr":  # a parameter read at several places is quantized by one node
            node = wrapper.weight_fake_quantize
            assert node is not None
            wrapper.weight_fake_quantize = self.weight_nodes.setdefault(
                (str(function.weight.target), node.scheme), node
            )
        return wrapper

    def _node(self, node: fx.Node, config: QATConfig) -> FakeQuantizeLayer:
        layer = activation_node(config, operations.is_never_negative(node, self.modules))
        self.grid_of[node] = layer.to(self.device)
        return layer

    def _operation(self, entry: Joined) -> QATOperation:
        activation = None if entry.activation is None else operations.clipping_module(entry.activation, self.modules)
        sources = [self.grid_of[source] for source in entry.sources]
        operation = QATOperation(
            entry.config,
            entry.operation,
            sources,
            activation,
            non_negative=self._is_never_negative(entry),
            dropouts=self._modules_of(entry.dropouts),
        )
        self.grid_of[entry.end] = operation.output_fake_quantize
        return operation

    def _modules_of(self, nodes: tuple[fx.Node, ...]) -> tuple[nn.Module, ...]:
        return tuple(self.modules[str(node.target)] for node in nodes)

    def _is_never_negative(self, entry: Joined) -> bool:
        """Whether the operation itself says so, or makes its values of values that are all on grids without sign."""
        if isinstance(entry.operation, Lookup):
            return operations.is_never_negative(entry.node, self.modules)
        schemes = [self.grid_of[source].scheme for source in entry.sources]
        return all(scheme.symmetric_zero_point == scheme.quant_min and scheme.symmetric for scheme in schemes)

    def _put_wrapper(self, chain: Chain, wrapper: QATModuleWrapper) -> None:
        name = str(chain.node.target)
        present = self.root.get_submodule(name)
        if isinstance(present, QATModuleWrapper):  # called before: every call site has an output node of its own
            parent, _, last = name.rpartition(".")
            chain.node.target = add_module(self.root, parent, f"{last}_call", wrapper)
        else:
            replace_module(self.root, present, wrapper)
        chain.node.args, chain.node.kwargs = tuple(chain.node.all_input_nodes), {}
        self._close_up(chain.end, chain.node, chain.activation, chain.batch_norm)

    def _put_given_weight_wrapper(self, chain: Chain, function: FunctionLayer, wrapper: QATModuleWrapper) -> str:
        """Puts it into the module whose code calls the function; returns the layer's name in the model."""
        owner = self.root.get_submodule(function.owner)
        name = add_module(self.root, function.owner, _description(chain.node, self.modules), wrapper)
        call = arguments_of_call(chain.node.target, chain.node.args, chain.node.kwargs)  # type: ignore[arg-type]
        with self.graph.inserting_before(chain.node):
            replacement = self.graph.call_module(name, (call["input"], *function.given))
        replacement.meta = dict(chain.node.meta)
        self._close_up(chain.end, replacement, chain.activation, chain.batch_norm, chain.node)
        return function.owner if isinstance(owner, type(function.layer)) else name

    def _put_node(self, node: fx.Node, layer: FakeQuantizeLayer, placement: Placement) -> ReportEntry:
        def reads_integers(reader: fx.Node) -> bool:
            if reader in placement.sharing:
                return any(map(reads_integers, readers(reader)))
            module = self.root.get_submodule(str(reader.target)) if reader.op == "call_module" else None
            return isinstance(module, (QATModuleWrapper, QATOperation))

        quantize_reads(self.root, self.graph, node, layer, reads_integers)
        name, kind = self._name(node), _description(node, self.modules)
        if node.op in ("placeholder", "get_attr"):
            return ReportEntry(name, kind, True, str(layer.scheme))
        detail = f"{self._why_float(node, placement) or 'computed in float'}, read as {layer.scheme}"
        return ReportEntry(name, kind, False, detail, self.work[node])

    def _put_operation(self, entry: Joined, operation: QATOperation) -> ReportEntry:
        self._swallow(entry)
        name = add_module(self.root, owner_of(entry.nodes[0]), label_of(entry.node), operation)
        # Before the first of its nodes: what these read may be changed in place before the last.
        with self.graph.inserting_before(entry.nodes[0]):
            call = self.graph.call_module(name, tuple(self.replaced.get(node, node) for node in entry.operands))
        self._replace(entry.end, call)
        for node in entry.nodes:  # a container that returned what is now inside of the operation returns its result
            node.replace_all_uses_with(call, delete_user_cb=is_mark)
        for node in reversed(entry.nodes):
            # A part of a region may have other readers, or be what another operation ends with.
            if not node.users and node not in self.erased:
                self.erased.add(node)
                self.graph.erase_node(node)
        name = self._name(entry.node) if entry.node.op == "call_module" else name
        detail = f"output {operation.output_fake_quantize.scheme}"
        return ReportEntry(name, operation.operation.kind, True, detail)

    def _note_direct_edges(self) -> None:
        """Tells those that compute on codes where their input comes from the node that made the codes, as it is."""
        for node in self.graph.nodes:
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, (QATModuleWrapper, QATOperation)) and node.args:
                source = module.input_source
                is_direct = source is not None and self._grid_made_by(node.args[0]) is source
                module.input_passes = self._modules_between(node.args[0], node) if is_direct else None

    def _modules_between(self, producer: fx.Node, consumer: fx.Node) -> tuple[nn.Module, ...]:
        """The module that makes a value, and the containers that it may pass on the way: a hook of any of these can
        change it."""
        names = {str(producer.target)}
        for target in (str(producer.target), str(consumer.target)):
            parts = target.split(".")
            names.update(".".join(parts[:length]) for length in range(1, len(parts)))
        return tuple(self.root.get_submodule(name) for name in sorted(names))

    def _grid_made_by(self, node: object) -> FakeQuantizeLayer | None:
        """The fake-quantize node whose output a graph's node is."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.root.get_submodule(str(node.target))
        if isinstance(module, (QATModuleWrapper, QATOperation)):
            return module.output_fake_quantize
        return module if isinstance(module, FakeQuantizeLayer) else None

    def _swallow(self, entry: Joined) -> None:
        """Takes out the marks of containers that the operation stands for whole."""
        inside = self.calls.inside(entry.nodes, self.calls.of_node[entry.end])
        for call in inside if isinstance(entry.operation, Lookup) else ():
            for mark in (call.first, call.last):
                if mark is not None:
                    self.graph.erase_node(mark)

    def _close_up(self, end: fx.Node, replacement: fx.Node, *obsolete: fx.Node | None) -> None:
        """Hands the uses of a chain's end over and erases what runs inside the replacement; last node first."""
        if end is not replacement:
            self._replace(end, replacement)
        for node in obsolete:
            if node is not None:
                node.replace_all_uses_with(replacement, delete_user_cb=is_mark)
                self.graph.erase_node(node)

    def _replace(self, end: fx.Node, replacement: fx.Node) -> None:
        end.replace_all_uses_with(replacement)
        self.replaced[end] = replacement

    def _float_operations(self, placement: Placement) -> dict[fx.Node, ReportEntry]:
        """Operations on float tensors that stay as they are."""
        wrapped = {node for chain in placement.chains for node in (chain.node, chain.batch_norm, chain.activation)}
        wrapped |= {node for entry in placement.joined for node in entry.nodes}
        accounts = {}
        for node in self.graph.nodes:
            if (
                node in wrapped
                or node in self.grid_of
                or node.op not in ("call_module", "call_function", "call_method")
            ):
                continue
            returns_several = node.op == "call_module" and "tensor" not in node.meta
            if not (returns_several or operations.is_float_tensor(node)):
                continue
            if node in placement.sharing or node in placement.weights:
                continue
            if operations.preserves_values(node, self.modules):
                continue
            if str(node.target) in placement.float_layers:
                continue
            reason = self._why_float(node, placement) or "no integer form"
            accounts[node] = ReportEntry(
                self._name(node), _description(node, self.modules), False, reason, self.work[node]
            )
        return accounts

    def _why_float(self, node: fx.Node, placement: Placement) -> str | None:
        """What is known of why a node computes in float."""
        if operations.is_call_of(node, self.modules, (operations.Patched,), set()):
            return PATCHED
        if operations.is_call_of(node, self.modules, operations.OPAQUE_MODULES, set()):
            return "it reads the weights of its layers without calling them"
        return placement.float_functions.get(node) or placement.float_layers.get(str(node.target))

    def _name(self, node: fx.Node) -> str:
        """What an operation is called in the report: as the model names the module that it is."""
        owner = owner_of(node)
        if node.op == "call_module" and isinstance(self.modules[str(node.target)], Normalization):
            return owner
        if node.op == "call_module":
            return str(node.target)
        kind = FUNCTIONS[node.target][1] if node.target in FUNCTIONS else ()
        if isinstance(self.modules[owner], kind):
            return owner
        return f"{owner}.{node.name}" if owner else node.name


def layer_entry(name: str, wrapper: QATModuleWrapper, how: str = "") -> ReportEntry:
    """The account of a wrapped layer."""
    node = wrapper.weight_fake_quantize
    weights = "" if node is None else f"weight {node.scheme}"
    output = "float" if wrapper.output_fake_quantize is None else wrapper.output_fake_quantize.scheme
    detail = ", ".join(filter(None, (weights, f"output {output}", how)))
    return ReportEntry(name, type(wrapper.layer).__name__, True, detail)


def _multiply_adds(node: fx.Node) -> int:
    """Of the example, where the node calls a function that is a layer."""
    if node.target not in FUNCTIONS or "tensor" not in node.meta:
        return 0
    call = arguments_of_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    shapes = [each.meta["tensor"].shape for each in (call["weight"], call["input"], node)]
    return multiply_adds_of(FUNCTIONS[node.target][1], *shapes)


def _description(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, operations.Patched):
            module = module.patched
        return type(plain_batch_norm(module) or module).__name__
    if node.op in ("placeholder", "get_attr"):
        return "input" if node.op == "placeholder" else "parameter"
    return str(getattr(node.target, "__name__", node.target))
