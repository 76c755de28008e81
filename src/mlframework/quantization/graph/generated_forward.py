"""Gives a module the forward that graphs describe.

The module keeps its class as a base, and with it its methods, attributes, submodules, names, hooks and signature; only
``forward`` is generated: a straight line of calls, as source that pickling carries along.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import linecache
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..kernels.constants import constant_in_graphs
from .attributes_read import warn_of_change
from .graph_nodes import GraphNodes, graph_from, modules_called, placeholders_of, plain
from .hooks import is_traced, is_watched
from .sequences import METHODS
from .signatures import FLAT, VARIANT, Given, dispatcher, is_example_call, parameters_of
from .values import Path, with_parts

# One class for each forward: copies and what is unpickled share it.
_numbers = itertools.count()
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


class _ModuleName(str):
    """Stands for an imported module among the names that a generated forward uses."""


class Edge(NamedTuple):
    """Where in a value codes are, and the module that makes them of floats, or floats of them."""

    path: Path
    module: str


class Variant(NamedTuple):
    """A graph for some calls of a module.

    Attributes:
        graph: its targets are the module's own attributes.
        given: the arguments that it is for.
        with_floats: the number of the variant that takes and returns floats where this one takes and returns codes.
        entries, exits: those codes, in the pair of positional and keyword arguments and in the result.
    """

    graph: fx.Graph
    given: tuple[Given, ...]
    with_floats: int | None = None
    entries: tuple[Edge, ...] = ()
    exits: tuple[Edge, ...] = ()

    def alike(self, other: Variant) -> bool:
        """Whether the other makes the same calls for the same arguments."""
        return self[1:] == other[1:] and _statements(self.graph) == _statements(other.graph)


class FlatForm(NamedTuple):
    """A graph for the calls that the first variant is for, in which the code of containers runs without their being
    called.

    Attributes:
        graph: its first arguments are what ``given_first`` returns.
        form: returns what that needs to know of the graph, to be kept with the class and compared with that of another;
            called once the containers in the module have their forwards.
        given_first: of the module; returns None where containers are to be called.
    """

    graph: fx.Graph
    form: Callable[[], Hashable]
    given_first: Callable[[nn.Module], tuple[Any, ...] | None]


def _statements(graph: fx.Graph) -> list[Any]:
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}

    def stated(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, dict(node.kwargs)), number.__getitem__))

    return [(node.op, node.target, stated(node)) for node in graph.nodes]


class Source(NamedTuple):
    """A forward as text, the names that it uses, and for each variant what a call must be given for it.

    Attributes:
        text, names: None and empty where they are to be made of ``nodes``, when the forward is first called.
        on_codes: of the variants that take or return codes, by number: what stands at their edges.
        calls: the modules that are called, by name.
        reads: plain attributes whose values are in the forward.
        form: see :class:`FlatForm`.
        nodes: what the text was made of, or is to be.
    """

    text: str | None
    names: dict[str, Any]
    given: tuple[tuple[Given, ...], ...]
    on_codes: dict[int, tuple[int, tuple[Edge, ...], tuple[Edge, ...]]]
    calls: tuple[str, ...]
    runs_own_code: bool
    is_part: bool
    reads: frozenset[str]
    form: Any = None
    nodes: GraphNodes | None = None

    @property
    def code(self) -> Any:
        """What tells this code from another's: the text, or what it is to be made of."""
        return self.nodes if self.text is None else self.text


def set_forward(
    module: nn.Module,
    variants: fx.Graph | Sequence[Variant],
    *,
    runs_own_code: bool = True,
    is_part: bool = False,
    reads: Iterable[str] = (),
    flat: FlatForm | None = None,
) -> None:
    """Makes graphs the forward of ``module``, in place.

    Args:
        module: its class becomes a subclass of the one it has (had, where its forward is generated already).
        variants: one graph, whose placeholders are the whole signature; or several behind the signature of the class,
            of which a call's keyword ``graph_variant`` says which.
        runs_own_code: whether a call with other arguments runs the forward of the module's class, or is refused.
        is_part: whether the module was traced by itself, and is not a container inside of another.
        reads: plain attributes whose values are in the graphs; those known already stay so.
        flat: another form of the first variant.
    """
    graphs = [variants] if isinstance(variants, fx.Graph) else [variant.graph for variant in variants]
    variants = [] if isinstance(variants, fx.Graph) else list(variants)
    base = base_of_generated(type(module))
    given = tuple(variant.given for variant in variants)
    text, names = _written(base, graphs, given, flat and flat.graph, flat and flat.given_first)
    on_codes = {
        number: (variant.with_floats, variant.entries, variant.exits)
        for number, variant in enumerate(variants)
        if variant.with_floats is not None
    }
    nodes = GraphNodes(tuple(map(plain, graphs)), flat and plain(flat.graph), flat and flat.given_first)
    source = Source(
        text,
        names,
        given,
        on_codes,
        calls_of(nodes),
        runs_own_code,
        is_part,
        frozenset(reads) | (source_of(module).reads if has_generated_forward(module) else frozenset()),
        flat and flat.form(),
        nodes,
    )
    module.__class__ = generated_class(base, source)


def calls_of(nodes: GraphNodes) -> tuple[str, ...]:
    """The modules that the graphs of the variants call, by name."""
    return tuple(dict.fromkeys(name for graph in nodes.graphs for name in modules_called(graph)))


def _written(
    base: type[nn.Module],
    graphs: Sequence[fx.Graph],
    given: Sequence[Sequence[Given]],
    flat: fx.Graph | None,
    given_first: Callable[[nn.Module], tuple[Any, ...] | None] | None,
) -> tuple[str, dict[str, Any]]:
    """The text of a forward, and the names that it uses."""
    texts: list[str] = []
    names: dict[str, Any] = {}
    for index, graph in enumerate(graphs):
        _add_function(f"_graph_{index}", graph, texts, names)
    if flat is not None:
        _add_function(FLAT, flat, texts, names)
    text, more = dispatcher(base, graphs, given, given_first)
    return "".join([*texts, text]), {**names, **more}


def _add_function(function: str, graph: fx.Graph, texts: list[str], names: dict[str, Any]) -> None:
    """Adds the text of a graph, and the names that it uses."""
    graph.lint()
    code = graph.python_code("self")
    texts.append(_with_direct_access(code.src, graph).replace("def forward(", f"def {function}(", 1))
    for name, value in code.globals.items():
        names[name] = _ModuleName(value.__name__) if isinstance(value, ModuleType) else value


def base_of_generated(kind: type[nn.Module]) -> type[nn.Module]:
    """The user's class under one with a generated forward; any other class itself."""
    return getattr(kind, "_base_of_generated", kind)


def has_generated_forward(module: nn.Module) -> bool:
    """Whether :func:`set_forward` made the module's forward."""
    return hasattr(type(module), "_base_of_generated")


def runs_generated_forward(module: nn.Module) -> bool:
    """Whether its class is the one that was made for that forward, none derived from it, and still has it."""
    attributes = vars(type(module))
    return "_generated_forward" in attributes and attributes["forward"] is attributes["_generated_forward"]


def source_of(module: nn.Module) -> Source:
    """What a module's generated forward was made from."""
    source: Source = type(module)._generated_from  # type: ignore[attr-defined]
    return source


def runs_graph(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments runs what the module was prepared for, rather than its own code because of
    the arguments."""
    if not has_generated_forward(module) or not source_of(module).given:
        return True
    return is_example_call(base_of_generated(type(module)), source_of(module).given[0], args, kwargs)


def _with_direct_access(source: str, graph: fx.Graph) -> str:
    """Reads submodules from where they are kept: looking each up by attribute costs a small model much of its time."""
    for target in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
        direct = "self" + "".join(f"._modules[{name!r}]" for name in target.split("."))
        # At the beginning of a statement alone, and not in text that one holds.
        written = re.escape(fx.graph._format_target("self", target))
        source = re.sub(rf"^( *\w+ = ){written}\(", lambda found: f"{found[1]}{direct}(", source, flags=re.MULTILINE)  # noqa: B023
    return source


def generated_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    """The class of modules of ``base`` with that forward; where its text is still to be made, it is when the forward is
    first called."""
    if source.text is None:
        key: Any = (base, id(source.nodes))  # which the class keeps alive
    else:
        names = ((name, _identity(value)) for name, value in source.names.items())
        flags = source.runs_own_code, source.is_part, source.reads, source.form
        key = (base, source.text, tuple(names), tuple(source.on_codes.items()), source.calls, flags)
    made = _classes.get(key)
    if made is None:
        _classes[key] = made = _make_class(base, source)
    return made


def _identity(value: Any) -> Any:
    """What tells a value that a source uses from another, also of what was unpickled."""
    return repr(value) if isinstance(value, (str, int, float, torch.dtype, torch.device)) else id(value)


class _Code:
    """The functions of a generated forward, by their names in its text."""

    def __init__(self, base: type[nn.Module], source: Source) -> None:
        self._base, self._source = base, source
        self.namespace: dict[str, Any] = {"__builtins__": builtins}
        self.filename = f"<generated forward {next(_numbers)} of {base.__name__}>"
        self.forward: Any = None
        if source.text is not None:
            self._run(source.text, source.names)
            self.forward = self.namespace["forward"]
        else:
            self.forward = self._stand_in()

    def __getitem__(self, name: str) -> Any:
        if name not in self.namespace:
            self.write()
        return self.namespace[name]

    def write(self) -> None:
        """Makes the text, where that is still to be done, and has the forward run it."""
        with _writing:
            if "forward" in self.namespace:
                return
            nodes = self._source.nodes
            assert nodes is not None
            flat = None if nodes.flat is None else graph_from(nodes.flat, nodes.guard)
            graphs = [graph_from(graph, nodes.guard) for graph in nodes.graphs]
            text, names = _written(self._base, graphs, self._source.given, flat, nodes.given_first)
            self._run(text, names)
            written = self.namespace["forward"]
            # The function stays the one that the class has, which callers may have noted.
            self.forward.__defaults__, self.forward.__kwdefaults__ = written.__defaults__, written.__kwdefaults__
            del self.forward.__wrapped__
            self.forward.__code__ = written.__code__

    def _run(self, text: str, names: Mapping[str, Any]) -> None:
        found = {
            name: importlib.import_module(value) if isinstance(value, _ModuleName) else value
            for name, value in names.items()
        }
        # With the source on file, tracebacks and debuggers show the lines.
        linecache.cache[self.filename] = (len(text), None, text.splitlines(keepends=True), self.filename)
        self.namespace.update(found)
        exec(compile(text, self.filename, "exec"), self.namespace)  # what torch.fx does with a graph, too

    def _stand_in(self) -> Any:
        """A forward that is written when it is called. It has the signature of the class's."""

        @constant_in_graphs
        def write() -> None:
            self.write()

        self.namespace["_write"] = write
        forward = FunctionType(_forward_to_be_written.__code__, self.namespace, "forward")
        vars(forward)["__wrapped__"] = self._base.forward
        return forward


_writing = threading.RLock()


def _forward_to_be_written(self: Any, *args: Any, **kwargs: Any) -> Any:
    _write()  # type: ignore[name-defined]  # noqa: F821
    return forward(self, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def write_code(module: nn.Module) -> None:
    """Makes the text of a module's forward, where that is still to be done."""
    if has_generated_forward(module):
        type(module)._code.write()  # type: ignore[attr-defined]


def _make_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    code = _Code(base, source)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        parts: Any = base.__reduce_ex__(self, protocol)
        return _rebuild, (base, source), *parts[2:]

    names = [parameter.name for parameter in parameters_of(base)] if source.on_codes else []
    # The variants of which the placeholders are the arguments, as many as there are.
    whole = {
        variant: len(names)
        for variant in source.on_codes
        if source.nodes is not None and placeholders_of(source.nodes.graphs[variant]) == names
    }

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        variant = kwargs.get(VARIANT, 0)
        if variant not in source.on_codes:
            return base.__call__(self, *args, **kwargs)
        if is_traced():  # by somebody who is to know of the call
            return base.__call__(self, *args, **kwargs)
        if is_watched(self):
            return _through_floats(self, source, args, kwargs)
        # All that nn.Module does where there are no hooks; small models would feel the rest.
        if len(args) == whole.get(variant) and len(kwargs) == 1:
            return code[f"_graph_{variant}"](self, *args)
        return self.forward(*args, **kwargs)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name in source.reads:
            warn_of_change(self, name, value)
        base.__setattr__(self, name, value)

    made = type(
        base.__name__,
        (base,),
        {
            **({"__call__": call} if source.on_codes else {}),
            **(METHODS if issubclass(base, nn.Sequential) else {}),
            **({"__setattr__": set_attribute} if source.reads else {}),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "forward": code.forward,
            "_base_of_generated": base,
            "_code": code,
            "_generated_from": source,
            "_generated_forward": code.forward,
        },
    )
    weakref.finalize(made, linecache.cache.pop, code.filename, None)
    return made


def _through_floats(module: nn.Module, source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with codes as the hooks of the module know it: with floats."""
    number, entries, exits = source.on_codes[kwargs.pop(VARIANT)]

    def converter(edges: Sequence[Edge]) -> Any:
        modules: dict[Path, Any] = {edge.path: module.get_submodule(edge.module) for edge in edges}
        return lambda path, part: modules[path].inverse(part) if path in modules else part

    args, kwargs = with_parts((args, kwargs), converter(entries))
    if number:
        kwargs[VARIANT] = number
    base: Any = base_of_generated(type(module))
    return with_parts(base.__call__(module, *args, **kwargs), converter(exits))


def _rebuild(base: type[nn.Module], source: Source) -> nn.Module:
    generated = generated_class(base, source)
    return generated.__new__(generated)
