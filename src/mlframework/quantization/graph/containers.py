"""The modules between a model and its layers, in a flat graph and as modules with a forward of their own.

A trace is flat: one graph of all calls, which is what placing nodes and lowering work on. Where the code of a container
begins and ends, the graph has marks, which say what the container was given and what it returned. From these,
:func:`.unflattening.set_forwards` makes for every container a graph of its own part, in which other containers are
called as modules.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .factories import recording_factories
from .generated_forward import base_of_generated, has_generated_forward, source_of
from .signatures import VARIANT, Anything, Given, parameters_of
from .values import Path, create_argument, parts_of, with_parts

_STRUCTURE = "structure"  # in the meta of a mark: that of the value whose parts it reads


def begins(name: str, parts: Any) -> None:
    """Marks where the code of the module of that name begins, with what is read in the arguments, which are a pair of
    positional and keyword arguments."""


def ends(name: str, parts: Any) -> None:
    """Marks where the code of a module ends, with what is read in its result."""


def is_mark(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (begins, ends)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's value: its users without the marks."""
    return [user for user in node.users if not is_mark(user)]


@dataclass(eq=False)
class Call:
    """A call of a container: what runs in it, in order.

    Attributes:
        name: of the module; empty for the model itself, which has no marks.
        first, last: the marks.
    """

    name: str
    first: fx.Node | None = None
    last: fx.Node | None = None
    items: list[fx.Node | Call] = field(default_factory=list)

    def arguments(self, module: nn.Module) -> dict[str, Any]:
        """What the signature of the module makes of what it is called with: values of the graph, by name."""
        args, kwargs = self.given
        signature = inspect.Signature(parameters_of(base_of_generated(type(module))))
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name != VARIANT})
        return dict(bound.arguments)

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments: values of the graph, in the structures that the code builds."""
        assert self.first is not None
        args, kwargs = _value_of(self.first)
        return tuple(args), dict(kwargs)

    @property
    def returned(self) -> Any:
        """What the container returns: values of the graph, in the structure that its code builds."""
        assert self.last is not None
        return _value_of(self.last)

    @property
    def parts_returned(self) -> list[tuple[Path, fx.Node]]:
        return [(path, part) for path, part in parts_of(self.returned) if isinstance(part, fx.Node)]


def _value_of(mark: fx.Node) -> Any:
    parts: Iterator[Any] = iter(mark.args[1])  # type: ignore[arg-type]
    return with_parts(mark.meta[_STRUCTURE], lambda path, like: next(parts) if like is Anything else like)


def calls_in(graph: fx.Graph) -> Call:
    """The calls of containers in a graph, as a tree."""
    stack = [Call("")]
    for node in graph.nodes:
        if not is_mark(node):
            stack[-1].items.append(node)
        elif node.target is begins:
            call = Call(str(node.args[0]), node)
            stack[-1].items.append(call)
            stack.append(call)
        else:
            stack.pop().last = node
    return stack[0]


class Calls:
    """Which call every node of a graph runs in."""

    def __init__(self, graph: fx.Graph) -> None:
        self.outer: dict[Call, Call] = {}
        self.of_node: dict[fx.Node, Call] = {}
        self._note(calls_in(graph))

    def _note(self, call: Call) -> None:
        for item in call.items:
            if isinstance(item, Call):
                self.outer[item] = call
                self._note(item)
            else:
                self.of_node[item] = call

    def around(self, node: fx.Node) -> list[Call]:
        """The calls in which a node runs, the outermost first."""
        return self._with_outer(self.of_node[node])[::-1]

    def _with_outer(self, call: Call) -> list[Call]:
        calls = [call]
        while calls[-1] in self.outer:
            calls.append(self.outer[calls[-1]])
        return calls

    def inside(self, nodes: Iterable[fx.Node], call: Call) -> list[Call]:
        """The calls in which nodes run, other than ``call`` and those around it."""
        around = self._with_outer(call)
        found: dict[Call, None] = {}
        for node in nodes:
            inner = self.of_node[node]
            while inner not in around and inner not in found:
                found[inner] = None
                inner = self.outer[inner]
        return list(found)

    def are_whole(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether nodes run in the call in which the last of them does, and in calls inside of it of which they are
        all that runs there."""
        call = self.of_node[nodes[-1]]
        inside, known = self.inside(nodes, call), set(nodes)
        around = {call, *inside}
        return all(self.of_node[node] in around for node in nodes) and all(
            node in known or is_mark(node) for each in inside for node in nodes_of(each)
        )


def graph_of(part: nn.Module) -> fx.Graph:
    """The flat graph, with marks, of a module that :func:`set_forwards` gave a forward: its containers' calls are in
    it, and every other module that is called is a node."""
    if not is_part(part):
        raise TypeError(f"module must be what set_forwards() was given, got {type(part).__name__}")
    return _CallTracer(source_of(part).given[0]).trace(part)


def is_part(module: nn.Module) -> bool:
    """Whether :func:`set_forwards` was given the module, rather than that it is a container inside of another."""
    return has_generated_forward(module) and source_of(module).is_part


class MarkingTracer(fx.Tracer):
    """Leaves marks around the code of every module that is no leaf, and runs no hooks."""

    proxy_buffer_attributes = True
    create_arg = create_argument

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            # A class that defines __call__ passes on to nn.Module's, whose part in a trace is this method.
            result = m.forward(*args, **kwargs)
            self._mark(ends, m, result)
            return result

        if not self.is_leaf_module(m, self.path_of_module(m)):
            self._mark(begins, m, (args, kwargs))
        return super().call_module(m, marked, args, kwargs)

    def _mark(self, kind: Any, module: nn.Module, value: Any) -> None:
        parts: list[fx.Node] = []

        def replace(path: Path, part: Any) -> Any:
            argument = self.create_arg(part)
            if isinstance(argument, fx.Node):
                parts.append(argument)
                return Anything
            return argument

        structure = with_parts(value, replace)
        mark = self.create_node("call_function", kind, (self.path_of_module(module), parts), {})
        mark.meta[_STRUCTURE] = structure

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with recording_factories(self):
            return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Every reader reads for itself, where its code is."""
        return super().getattr(attr, attr_val, {})

    def arguments_for(self, given: Sequence[Given]) -> dict[str, Any]:
        """Proxies where a graph reads values, and constants, by the names of the arguments."""
        return {name: self.structure_of(self.create_proxy("placeholder", name, (), {}), like) for name, like in given}

    def structure_of(self, whole: fx.Proxy, like: Any) -> Any:
        """A structure like a value that stands for a node: of constants, and of proxies of its parts."""

        def replace(path: Path, part: Any) -> Any:
            if part is not Anything:
                return part
            value = whole
            for kind, name in path:
                function = operator.getitem if kind == "item" else getattr
                label = name if isinstance(name, str) and name.isidentifier() else None
                value = self.create_proxy("call_function", function, (value, name), {}, name=label)
            return value

        return with_parts(like, replace)


class _CallTracer(MarkingTracer):
    def __init__(self, given: Sequence[Given]) -> None:
        super().__init__()
        self.given = given

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not has_generated_forward(m) or is_part(m)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        parameters = parameters_of(base_of_generated(type(self.root)))
        return bound_to(root_fn, parameters, self.arguments_for(self.given)), [self.root]


def bound_to(function: Any, parameters: Sequence[inspect.Parameter], values: Mapping[str, Any]) -> Any:
    """A function of a module alone, which calls ``function`` with these values for its parameters."""
    bound = inspect.BoundArguments(inspect.Signature(parameters), OrderedDict(values))

    def call(root: nn.Module) -> Any:
        return function(root, *bound.args, **bound.kwargs)

    return call


def nodes_of(call: Call) -> Iterator[fx.Node]:
    """All nodes that run in a call, those of calls inside of it too, and what they are called with."""
    for item in call.items:
        if isinstance(item, Call):
            assert item.first is not None
            yield item.first
            yield from nodes_of(item)
        else:
            yield item
    if call.last is not None:
        yield call.last
