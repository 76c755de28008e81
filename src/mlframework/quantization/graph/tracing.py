"""Takes a model down as a graph of calls, as far as a graph can be proved to do what the model does."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .attributes_read import noting_reads
from .clone import scratch_of
from .containers import MarkingTracer, bound_to, readers
from .decisions import AnsweringProxy, ExampleAnswers, drop_unread_answers
from .dropouts import modules_for_dropouts
from .example_run import modules_kept, random_state_kept
from .generated_forward import base_of_generated
from .in_place import change_through_view, route_through_in_place_operations
from .mode_differences import differing_modules, modules_for_training_alone
from .nodes import CONSTANT, is_constant, owner_of, put_module, unused_name
from .proof import prove
from .signatures import Given, given_arguments, parameters_of
from .watching import ModuleCall, Observation, observe


class Trace(NamedTuple):
    """A graph of calls with marks (:mod:`.containers`), or None where the code of the model itself has to run.

    Attributes:
        graph: its nodes have :class:`.TensorInfo`.
        own_code: why the code of a module has to run, by name; the empty name is the model itself.
        given: what the graph is called with.
        reads: plain attributes that the code of each container has read, by the container's name.
    """

    graph: fx.Graph | None
    own_code: dict[str, str]
    given: tuple[Given, ...] = ()
    reads: Mapping[str, set[str]] = MappingProxyType({})


def observed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> dict[bool, Observation]:
    """What the model's own code does with the example, in training and in evaluation; on copies of the model."""
    observations = {}
    names = leaf_names(model, is_leaf)
    for mode in (True, False):
        copied = scratch_of(model)
        with random_state_kept():
            observations[mode] = observe(copied.train(mode), args, kwargs, _leaves(copied, names))
    return observations


def leaf_names(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> set[str]:
    """The names of a model's leaves: what ``is_leaf`` says, and PyTorch's own modules but for those that only call
    others in a row."""

    def decide(module: nn.Module) -> bool:
        is_pytorchs = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
        return is_pytorchs or is_leaf(module)

    return {name for name, module in model.named_modules() if name and decide(module)}


def _leaves(model: nn.Module, names: set[str]) -> Callable[[nn.Module], bool]:
    """Whether a module of the model is a leaf. A copy's leaves are those of what it was copied from, by name: a module
    that is tried for it must not be so while something is recorded."""
    return {module for name, module in model.named_modules() if name in names}.__contains__


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_leaf: Callable[[nn.Module], bool],
    observations: Mapping[bool, Observation] | None = None,
    own_code: Mapping[str, str] | None = None,
) -> Trace:
    """Traces ``model`` with given example inputs.

    Modules whose code does what a graph does not say, or cannot be traced (control flow on values), or depends on the
    training mode, are called as they are. So are those that have hooks.

    Args:
        model: dropout modules and constants may be added to it and to its containers.
        args, kwargs: example inputs.
        is_leaf: whether to call a module as it is whatever is in it.
        observations: what runs of the model's own code on the example have shown, in training and in evaluation;
            found out where they are not given.
        own_code: modules of which it is known already that their own code has to run, with the reason.
    """
    leaves = leaf_names(model, is_leaf)
    if observations is None:
        observations = observed(model, args, kwargs, is_leaf)
    own_code = dict(own_code or {})
    for seen in observations.values():
        own_code = {**seen.effects, **own_code}
        if "" in seen.changing:
            own_code.setdefault("", _CHANGES)
    if "" in own_code:
        return Trace(None, {"": own_code[""]})
    arguments = _by_name(model, args, kwargs)
    given = given_arguments(arguments, lambda part: isinstance(part, (Tensor, int, float, complex)))
    for name, module in model.named_modules():
        if name and name not in leaves and has_hooks(module):
            own_code.setdefault(name, HAS_HOOKS)
    with random_state_kept():
        while True:
            for seen in observations.values():
                _add_callers_of_changing(own_code, seen)
            known = len(own_code)
            # The code of modules that are called as they are runs many times here: on a copy.
            scratch = scratch_of(model)
            attempt = _attempt(
                scratch, args, kwargs, arguments, given, _leaves(scratch, leaves), own_code, observations
            )
            if "" in own_code:
                return Trace(None, {"": own_code[""]})
            if attempt is not None and len(own_code) == known:
                break
    graph, added, reads = attempt
    for name, value in added.items():
        owner, _, last = name.rpartition(".")
        container = model.get_submodule(owner)
        if isinstance(value, nn.Module):
            put_module(container, last, value.train(container.training))
        else:
            container.register_buffer(last, value, persistent=False)
    drop_unread_answers(graph)
    route_through_in_place_operations(model, graph)
    _reshapes_for_views(graph)
    return Trace(graph, own_code, given, reads)


_CHANGES = "it changes a list or dictionary that it is given"


def _add_callers_of_changing(own_code: dict[str, str], seen: Observation) -> None:
    """What a module of which the own code runs does to a list that it is given reaches only a caller whose own code
    runs, too: a graph hands lists over as new ones. A module that is part of the graph may change them."""
    callers = {callee: caller for caller, callees in seen.callees.items() for callee in callees}
    for name in [name for name in own_code if name in seen.changing]:
        while name in seen.changing and name in callers:
            name = callers[name]
            own_code.setdefault(name, "a module that it calls changes a list or dictionary")


def _readers_of_written(graph: fx.Graph, own_code: Mapping[str, str], writing: set[str]) -> dict[str, str]:
    """The modules whose code reads a tensor again that a module changes of which the own code runs: the graph knows
    tensors by the nodes that made them."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    return {
        owner_of(node): "a module that it calls changes a tensor that is read again"
        for node in graph.find_nodes(op="call_module")
        if str(node.target) in own_code and str(node.target) in writing
        for read in node.all_input_nodes
        if any(order[reader] > order[node] for reader in readers(read))
    }


def _attempt(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: dict[str, Any],
    given: tuple[Given, ...],
    is_leaf: Callable[[nn.Module], bool],
    own_code: dict[str, str],
    observations: Mapping[bool, Observation],
) -> tuple[fx.Graph, dict[str, nn.Module | Tensor], dict[str, set[str]]] | None:
    """A graph, modules and constants that it takes, and attributes that it has read; None where ``own_code`` has grown,
    and all is to do again."""
    known = len(own_code)
    graphs = {}
    reads: dict[str, set[str]] = {}
    for mode in (True, False):
        model.train(mode)
        tracer = _ModelTracer(arguments, given, own_code, is_leaf, observations[mode].calls)
        with modules_kept(model):
            reason = tracer.try_to_trace(model)
            made = {name: value for name, value in vars(model).items() if name.startswith(CONSTANT)}
        vars(model).update(made)
        if reason is not None:
            own_code[""] = reason
            return None
        graphs[mode] = tracer.graph
        for name, attributes in tracer.reads.items():
            reads.setdefault(name, set()).update(attributes)
    graph = graphs[False]
    if len(own_code) > known:
        return None
    names = modules_for_training_alone(model, graph, graphs[True])
    own_code.update(differing_modules(model, graphs[True], graph))
    if len(own_code) > known:
        return None
    culprit = change_through_view(model, graph, arguments)
    own_code.update([] if culprit is None else [culprit])
    for seen in observations.values():
        own_code.update(_readers_of_written(graph, own_code, seen.writing))
    if len(own_code) > known:
        return None
    names += modules_for_dropouts(model, graph, graphs[True])
    constants = _buffers_for_constants(model, graph)
    own_code.update(prove(model, graph, args, kwargs, arguments, observations))
    return graph, {**{name: model.get_submodule(name) for name in names}, **constants}, reads


HAS_HOOKS = "it has hooks of its own"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than run its code."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The example's arguments by the names of the signature's parameters."""
    signature = inspect.Signature(parameters_of(base_of_generated(type(model))))
    return dict(signature.bind(*args, **kwargs).arguments)


class _ModelTracer(MarkingTracer):
    """Records calls; code that asks for shapes and types is answered from the example. A module whose code does not
    trace becomes a call of that module, and is added to ``own_code``."""

    def __init__(
        self,
        arguments: dict[str, Any],
        given: tuple[Given, ...],
        own_code: dict[str, str],
        is_leaf: Callable[[nn.Module], bool],
        calls: Mapping[str, list[ModuleCall]],
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.given = given
        self.own_code = own_code
        self.is_leaf = is_leaf
        self.calls = calls
        self.called: dict[str, int] = {}
        self.reads: dict[str, set[str]] = {}

    def try_to_trace(self, model: nn.Module) -> str | None:
        """Traces; returns why the model's own code does not trace, or None."""
        try:
            with noting_reads(self._note_read):
                self.trace(model)
        except Exception as error:  # a model's own code may raise anything at a value that is not there
            return _does_not_trace(error)
        return None

    def _note_read(self, module: nn.Module, name: str) -> None:
        """Of the module whose code is being traced, that is."""
        running = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        if self.paths.get(module) == running:
            self.reads.setdefault(running, set()).add(name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return AnsweringProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        return (operator.getitem(obj, index) for index in range(len(obj)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.own_code or self.is_leaf(m)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise NameError(f"it calls a {type(mod).__name__} that is no submodule of the model") from None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m not in self.paths and not any(True for _ in m.parameters()):
            return m.forward(*args, **kwargs)  # made on the spot
        name = self.path_of_module(m)
        self.called[name] = self.called.get(name, -1) + 1
        if self.is_leaf_module(m, name):
            return self._call_leaf(m, name, args, kwargs)
        undo = self._undoing()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.own_code[name] = _does_not_trace(error)
            undo()
            return self._call_leaf(m, name, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **more: Any) -> Any:
        """A function that ``torch.fx.wrap`` keeps whole is looked into all the same, where its code traces: it may read
        the weights of layers."""
        if kind == "call_function" and _is_wrapped(target):
            undo = self._undoing()
            known = dict(self.own_code)
            try:
                return target(*args, **kwargs)
            except Exception:  # as of any code that does not trace
                undo()
                self.own_code.clear()
                self.own_code.update(known)
        return super().create_proxy(kind, target, args, kwargs, *others, **more)

    def _undoing(self) -> Callable[[], None]:
        """What takes the trace back to where it is now."""
        last = next(iter(reversed(self.graph.nodes)), None)
        scope, stack, counts, called = self.scope, self.module_stack.copy(), dict(self.num_calls), dict(self.called)

        def undo() -> None:
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.scope, self.module_stack, self.num_calls, self.called = scope, stack, counts, called

        return undo

    def _call_leaf(self, m: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        """A node; what it returns has the structure that it had when the example ran."""
        result: fx.Proxy = fx.Tracer.call_module(self, m, m.forward, args, kwargs)
        calls = self.calls.get(name, ())
        if self.is_leaf(m) or self.called[name] >= len(calls):
            return result
        shown = calls[self.called[name]].result
        if isinstance(shown, Tensor):
            return result
        (like,) = given_arguments({"": shown}, lambda part: isinstance(part, (Tensor, int, float, complex)))
        return self.structure_of(result, like.like)

    @property
    def paths(self) -> Mapping[nn.Module, str]:
        return self.submodule_paths or {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        self.answers = ExampleAnswers(self.root, self.graph, self.arguments, lambda: self.module_stack.copy())
        return bound_to(root_fn, parameters_of(type(self.root)), self.arguments_for(self.given)), [self.root]


def _is_wrapped(target: Any) -> bool:
    """Whether a called function is somebody's own, rather than PyTorch's or this library's."""
    if not isinstance(target, FunctionType):
        return False
    return not target.__module__.startswith(("torch.", __name__.partition(".")[0] + "."))


def _does_not_trace(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return f"its code does not trace ({reason[0] if reason else type(error).__name__})"


def _buffers_for_constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Constants made while tracing become buffers of the module whose code made them: they move with it, and stay out
    of its state dict. Returns them by name."""
    made = {name: vars(model).pop(name) for name in list(vars(model)) if name.startswith(CONSTANT)}
    constants = {}
    for node in graph.nodes:
        if not is_constant(node) or str(node.target) not in made:
            continue
        owner = owner_of(node)
        container = model.get_submodule(owner)
        last = unused_name(container, f"{CONSTANT}0")
        value = made[str(node.target)]
        container.register_buffer(last, value, persistent=False)
        node.target = f"{owner}.{last}".removeprefix(".")
        constants[node.target] = value
    return constants


def _reshapes_for_views(graph: fx.Graph) -> None:
    """An integer convolution may lay its output out in another order than a float one; a reshape takes any."""
    for node in graph.nodes:
        reads_bits = any(isinstance(argument, torch.dtype) for argument in node.args)
        if node.op == "call_method" and node.target == "view" and not reads_bits and not node.kwargs:
            node.target = "reshape"
