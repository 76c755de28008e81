"""Takes a model down as a graph of calls, as far as it can be traced without changing what it computes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

# Dropout called as a function has the training flag of the moment it was traced; a module has its own.
_DROPOUTS: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class TensorInfo(NamedTuple):
    """What a node's value was when the example inputs ran: ``node.meta["tensor"]``, absent where it is no tensor."""

    dtype: torch.dtype
    shape: torch.Size


class Trace(NamedTuple):
    """The graph, or None where the model itself cannot be traced; and the modules kept whole, with the reason."""

    graph: fx.Graph | None
    kept_whole: dict[str, str]


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> Trace:
    """Traces ``model`` (whose class must not rely on being called during the trace) with given example inputs.

    Submodules whose code does not trace (control flow on values), depends on the training mode, or has hooks, are
    kept whole: called as they are. Arguments that the examples leave out keep their defaults.

    Args:
        model: the model; dropout modules and constants may be added to it.
        args, kwargs: example inputs; they run once through the model and once through the graph, in evaluation mode.
        is_leaf: whether to keep a module whole whatever is in it.
    """
    if "forward" in vars(model):
        return Trace(None, {"": "its forward was replaced on the instance"})
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
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
                tracers[mode] = _ModelTracer(bound.arguments, kept_whole, is_leaf)
                failure = tracers[mode].try_to_trace(model)
                if failure is not None:
                    break
            else:
                failure = _difference(model, tracers[True].graph, tracers[False].graph)
            if failure is None:
                break
            name, reason = failure
            if not name or name in kept_whole:
                return Trace(None, {"": reason})
            kept_whole[name] = reason
        graph = tracers[False].graph
        _modules_for_dropouts(model, graph)
        model.eval()
        _buffers_for_constants(model, graph)
        if not _reproduces(model, graph, args, kwargs, bound.arguments):
            return Trace(None, {"": "its trace does not reproduce its output"})
        _route_through_in_place_operations(model, graph)
        _reshapes_for_views(graph)
    finally:
        for module in model.modules():
            module.training = training.get(module, training[model])
    return Trace(graph, kept_whole)


class _ModelTracer(fx.Tracer):
    proxy_buffer_attributes = True

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
        names, values = [], []
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if name not in self.arguments:
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"it takes any number of arguments (*{name})")
            default = () if parameter.default is parameter.empty else (parameter.default,)
            names.append(name)
            values.append(self.create_proxy("placeholder", name, default, {}))

        def call(root: nn.Module, *proxies: fx.Proxy) -> Any:
            return root_fn(root, **dict(zip(names, proxies, strict=True)))

        return call, [self.root, *values]


def _difference(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> tuple[str, str] | None:
    """Where the graphs of the two modes part: the module whose code it is, and why; None where they agree."""
    nodes, others = list(training.nodes), list(evaluation.nodes)
    positions = {node: index for index, node in enumerate(nodes)} | {node: index for index, node in enumerate(others)}

    def arguments(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, node.kwargs), lambda argument: positions[argument]))

    for node, other in zip(nodes, others, strict=False):
        if _is_constant(node) and _is_constant(other):
            # Constants made while tracing are alike in both traces; random ones are not.
            same = torch.equal(getattr(model, str(node.target)), getattr(model, str(other.target)))
        else:
            same = node.op == other.op and node.target == other.target
            same = same and (node.target in _DROPOUTS or arguments(node) == arguments(other))
        if not same:
            return _owner_of_difference(nodes, others) or _owner(node), "its code depends on the training mode"
    return None


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")


def _owner(node: fx.Node) -> str:
    """The innermost module whose code made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()] if stack else []
    if node.op == "call_module":  # the module called is on the stack as well
        names = [name for name in names if name != node.target]
    return names[-1] if names else ""


def _owner_of_difference(nodes: list[fx.Node], others: list[fx.Node]) -> str:
    """The module that makes other calls in one graph than in the other; empty for the model itself."""

    def calls(owner: str, graph: list[fx.Node]) -> list[Any]:
        return ["constant" if _is_constant(node) else node.target for node in graph if _owner(node) == owner]

    owners = dict.fromkeys(map(_owner, [*nodes, *others]))
    return next((owner for owner in owners if owner and calls(owner, nodes) != calls(owner, others)), "")


def _modules_for_dropouts(model: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            name = unused_name(model, node.name)
            probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            model.add_module(name, _DROPOUTS[node.target](probability))
            with graph.inserting_after(node):
                module = graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(module)
            graph.erase_node(node)


def _buffers_for_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Constants made while tracing move with the model, and stay out of its state dict."""
    used = {str(node.target) for node in graph.nodes if _is_constant(node)}
    for name in [name for name in vars(model) if name.startswith("_tensor_constant")]:
        value = getattr(model, name)
        delattr(model, name)
        if name in used:
            model.register_buffer(name, value, persistent=False)


def _route_through_in_place_operations(model: nn.Module, graph: fx.Graph) -> None:
    """Whoever reads a tensor after an operation changed it in place reads that operation's result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(changed, fx.Node) and "tensor" in changed.meta and _is_in_place(model, node):
            changed.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023


def _is_in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    return (
        node.target in _IN_PLACE_OPERATORS
        or bool(node.kwargs.get("inplace"))
        or getattr(node.target, "__name__", "").endswith("_")
    )


def _reshapes_for_views(graph: fx.Graph) -> None:
    """An integer convolution may lay its output out in another order than a float one; a reshape takes any."""
    for node in graph.nodes:
        reads_bits = any(isinstance(argument, torch.dtype) for argument in node.args)
        if node.op == "call_method" and node.target == "view" and not reads_bits and not node.kwargs:
            node.target = "reshape"


@torch.no_grad()
def _reproduces(
    model: nn.Module, graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
) -> bool:
    """Whether model and graph agree on the example, bit for bit; leaves :class:`TensorInfo` at the nodes."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    placeholders = [arguments[str(node.target)] for node in graph.nodes if node.op == "placeholder"]
    with torch.random.fork_rng(devices=[]):
        seed = torch.random.get_rng_state()
        expected = type(model).forward(model, *_copies(args), **_copies(kwargs))
        torch.random.set_rng_state(seed)
        actual = _Recorder(model, graph=graph).run(*_copies(placeholders))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    (expected, structure), (actual, other) = tree_flatten(expected), tree_flatten(_plain(actual))
    return structure == other and all(map(_same, expected, actual))


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["tensor"] = TensorInfo(result.dtype, result.shape)
        return result


def _copies(values: Any) -> Any:
    """In-place operations of a forward must not reach the caller's examples."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


def _plain(value: Any) -> Any:
    """Results as a generated forward returns them: an interpreter returns fx's own dictionaries and lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        items = tuple(_plain(item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else items
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    return bool(operator.eq(one, other))


def unused_name(model: nn.Module, wanted: str) -> str:
    """``wanted``, or with a number behind it where the model has an attribute of that name."""
    name, number = wanted, 0
    while hasattr(model, name):
        number += 1
        name = f"{wanted}_{number}"
    return name
