"""Takes a model down as a graph of calls, as far as it can be traced without changing what it computes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .decisions import AnsweringProxy, ExampleAnswers, drop_guards_against_batches, drop_unread_answers
from .dropouts import arguments_besides_dropout, modules_for_dropouts
from .example_run import reproduces
from .in_place import change_through_view, route_through_in_place_operations
from .nodes import create_argument, is_constant, owner_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Trace(NamedTuple):
    """The graph, or None where the model itself cannot be traced; and the modules kept whole, with the reason."""

    graph: fx.Graph | None
    kept_whole: dict[str, str]


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> Trace:
    """Traces ``model`` (whose class must not rely on being called during the trace) with given example inputs.

    Submodules whose code does not trace (control flow on values), depends on the training mode, or changes a tensor
    in place through a view, and those that have hooks, are kept whole: called as they are. Arguments that the
    examples leave out keep their defaults.

    Args:
        model: the model; dropout modules and constants may be added to it.
        args, kwargs: example inputs; they run through the model and through the graph, in evaluation mode.
        is_leaf: whether to keep a module whole whatever is in it.
    """
    if "forward" in vars(model):
        return Trace(None, {"": "its forward was replaced on the instance"})
    arguments = _by_name(model, args, kwargs)
    kept_whole = {
        name: "it has hooks of its own"
        for name, module in model.named_modules()
        if name and not is_leaf(module) and any(getattr(module, hooks) for hooks in _HOOKS)
    }
    training = {module: module.training for module in model.modules()}
    try:
        while True:
            tracers = {}
            for mode in (True, False):
                model.train(mode)
                tracers[mode] = _ModelTracer(arguments, kept_whole, is_leaf)
                failure = tracers[mode].try_to_trace(model)
                if failure is not None:
                    break
            else:
                failure = _difference(model, tracers[True].graph, tracers[False].graph)
                failure = failure or change_through_view(model, tracers[False].graph, arguments)
            if failure is None:
                break
            name, reason = failure
            if not name or name in kept_whole:
                return Trace(None, {"": reason})
            kept_whole[name] = reason
        graph = tracers[False].graph
        modules_for_dropouts(model, graph, tracers[True].graph)
        model.eval()
        _buffers_for_constants(model, graph)
        if not reproduces(model, graph, args, kwargs, arguments):
            return Trace(None, {"": "its trace does not reproduce its output"})
        drop_unread_answers(graph)
        drop_guards_against_batches(model, graph, args, kwargs, arguments)
        route_through_in_place_operations(model, graph)
        _reshapes_for_views(graph)
    finally:
        for module in model.modules():
            module.training = training.get(module, training[model])
    return Trace(graph, kept_whole)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The example's arguments by name, in the order of the signature; those that ``**kwargs`` takes come last."""
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


class _ModelTracer(fx.Tracer):
    """Records calls; code that asks for shapes and types is answered from the example."""

    proxy_buffer_attributes = True
    create_arg = create_argument

    def __init__(
        self, arguments: dict[str, Any], kept_whole: dict[str, str], is_leaf: Callable[[nn.Module], bool]
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.kept_whole = kept_whole
        self.is_leaf = is_leaf
        self.active: list[str] = []
        self.failed_in = ""

    def try_to_trace(self, model: nn.Module) -> tuple[str, str] | None:
        """Traces; returns the innermost module that failed and why, or None."""
        try:
            self.trace(model)
        except Exception as error:  # a model's own code may raise anything at a value that is not there
            reason = str(error).strip().splitlines()
            return self.failed_in, f"its code does not trace ({reason[0] if reason else type(error).__name__})"
        return None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return AnsweringProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        return (operator.getitem(obj, index) for index in range(len(obj)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.kept_whole
            or self.is_leaf(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.active.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.active[-1]
            raise
        finally:
            self.active.pop()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for the arguments that the example gives; the others stay at their defaults."""
        parameters = inspect.signature(root_fn).parameters
        names, values = [], []
        for name in self.arguments:
            parameter = parameters.get(name)
            if parameter is not None and parameter.kind is parameter.VAR_POSITIONAL:
                raise TypeError(f"it takes any number of arguments (*{name})")
            default = () if parameter is None or parameter.default is parameter.empty else (parameter.default,)
            names.append(name)
            values.append(self.create_proxy("placeholder", name, default, {}))
        self.answers = ExampleAnswers(self.root, self.graph, self.arguments)

        def call(root: nn.Module, *proxies: fx.Proxy) -> Any:
            return root_fn(root, **dict(zip(names, proxies, strict=True)))

        return call, [self.root, *values]


def _difference(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> tuple[str, str] | None:
    """Where the graphs of the two modes part: the module whose code it is, and why; None where they agree."""
    nodes, others = list(training.nodes), list(evaluation.nodes)
    positions = {node: index for index, node in enumerate(nodes)} | {node: index for index, node in enumerate(others)}

    def arguments(node: fx.Node) -> str:
        return str(fx.map_arg(arguments_besides_dropout(node), lambda argument: positions[argument]))

    for node, other in zip(nodes, others, strict=False):
        if is_constant(node) and is_constant(other):
            # Constants made while tracing are alike in both traces; random ones are not.
            same = torch.equal(getattr(model, str(node.target)), getattr(model, str(other.target)))
        else:
            same = node.op == other.op and node.target == other.target and arguments(node) == arguments(other)
        if not same:
            return _owner_of_difference(nodes, others) or owner_of(node), "its code depends on the training mode"
    return None


def _owner_of_difference(nodes: list[fx.Node], others: list[fx.Node]) -> str:
    """The module that makes other calls in one graph than in the other; empty for the model itself."""

    def calls(owner: str, graph: list[fx.Node]) -> list[Any]:
        return ["constant" if is_constant(node) else node.target for node in graph if owner_of(node) == owner]

    owners = dict.fromkeys(map(owner_of, [*nodes, *others]))
    return next((owner for owner in owners if owner and calls(owner, nodes) != calls(owner, others)), "")


def _buffers_for_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Constants made while tracing move with the model, and stay out of its state dict."""
    used = {str(node.target) for node in graph.nodes if is_constant(node)}
    for name in [name for name in vars(model) if name.startswith("_tensor_constant")]:
        value = getattr(model, name)
        delattr(model, name)
        if name in used:
            model.register_buffer(name, value, persistent=False)


def _reshapes_for_views(graph: fx.Graph) -> None:
    """An integer convolution may lay its output out in another order than a float one; a reshape takes any."""
    for node in graph.nodes:
        reads_bits = any(isinstance(argument, torch.dtype) for argument in node.args)
        if node.op == "call_method" and node.target == "view" and not reads_bits and not node.kwargs:
            node.target = "reshape"
