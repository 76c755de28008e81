"""Gives a module the forward that graphs describe.

The module keeps its class as a base, and with it its methods, attributes, submodules, names, hooks and signature; only
``forward`` is generated: a straight line of calls, as source that pickling carries along.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .attributes_read import warn_of_change
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
        on_codes: of the variants that take or return codes, by number: what stands at their edges.
        calls: the modules that are called, by name.
        reads: plain attributes whose values are in the forward.
        form: see :class:`FlatForm`.
    """

    text: str
    names: dict[str, Any]
    given: tuple[tuple[Given, ...], ...]
    on_codes: dict[int, tuple[int, tuple[Edge, ...], tuple[Edge, ...]]]
    calls: tuple[str, ...]
    runs_own_code: bool
    is_part: bool
    reads: frozenset[str]
    form: Any = None


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
    texts: list[str] = []
    names: dict[str, Any] = {}
    for index, graph in enumerate(graphs):
        _add_function(f"_graph_{index}", graph, texts, names)
    if flat is not None:
        _add_function(FLAT, flat.graph, texts, names)
    text, more = dispatcher(base, graphs, [variant.given for variant in variants], flat and flat.given_first)
    calls = dict.fromkeys(str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module")
    on_codes = {
        number: (variant.with_floats, variant.entries, variant.exits)
        for number, variant in enumerate(variants)
        if variant.with_floats is not None
    }
    source = Source(
        "".join([*texts, text]),
        {**names, **more},
        tuple(variant.given for variant in variants),
        on_codes,
        tuple(calls),
        runs_own_code,
        is_part,
        frozenset(reads) | (source_of(module).reads if has_generated_forward(module) else frozenset()),
        flat and flat.form(),
    )
    module.__class__ = _generated_class(base, source)


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
        source = source.replace(f" {fx.graph._format_target('self', target)}(", f" {direct}(")
    return source


def _generated_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
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


def _make_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        name: importlib.import_module(value) if isinstance(value, _ModuleName) else value
        for name, value in source.names.items()
    }
    filename = f"<generated forward {next(_numbers)} of {base.__name__}>"
    # With the source on file, tracebacks and debuggers show the lines.
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    exec(compile(source.text, filename, "exec"), namespace)  # what torch.fx does with a graph, too

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        parts: Any = base.__reduce_ex__(self, protocol)
        return _rebuild, (base, source), *parts[2:]

    names = [parameter.name for parameter in parameters_of(base)] if source.on_codes else []
    # The variants of which the placeholders are the arguments, as many as there are.
    whole = {
        variant: len(names)
        for variant in source.on_codes
        if list(inspect.signature(namespace[f"_graph_{variant}"]).parameters)[1:] == names
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
            return namespace[f"_graph_{variant}"](self, *args)
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
            "forward": namespace["forward"],
            "_base_of_generated": base,
            "_generated_from": source,
            "_generated_forward": namespace["forward"],
        },
    )
    weakref.finalize(made, linecache.cache.pop, filename, None)
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
    generated = _generated_class(base, source)
    return generated.__new__(generated)
