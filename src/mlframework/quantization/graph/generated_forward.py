"""Gives a module the forward that graphs describe.

The module keeps its class as a base, and with it its methods, attributes, submodules, names, hooks and signature; only
``forward`` is generated: a straight line of calls, as source that pickling carries along.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import fx, nn

from .signatures import Given, dispatcher

# One class for each forward: copies and what is unpickled share it.
_numbers = itertools.count()
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


class _ModuleName(str):
    """Stands for an imported module among the names that a generated forward uses."""


class Source(NamedTuple):
    """A forward as text, the names that it uses, and what a call must be given for it."""

    text: str
    names: dict[str, Any]
    given: tuple[tuple[Given, ...], ...]
    calls: tuple[str, ...]
    runs_own_code: bool
    is_part: bool


def set_forward(
    module: nn.Module,
    graphs: fx.Graph | Sequence[fx.Graph],
    given: Sequence[Sequence[Given]] = (),
    *,
    runs_own_code: bool = True,
    is_part: bool = False,
) -> None:
    """Makes graphs the forward of ``module``, in place. Their targets are the module's own attributes.

    Args:
        module: its class becomes a subclass of the one it has (had, where its forward is generated already).
        graphs: one, or several, of which a call's keyword ``graph_variant`` says which.
        given: for each graph, the arguments that it is for; none where the placeholders are the whole signature.
        runs_own_code: whether a call with other arguments runs the forward of the module's class, or is refused.
        is_part: whether the module was traced by itself, and is not a container inside of another.
    """
    graphs = [graphs] if isinstance(graphs, fx.Graph) else list(graphs)
    base = base_of_generated(type(module))
    texts, names = [], {}
    for index, graph in enumerate(graphs):
        graph.lint()
        code = graph.python_code("self")
        texts.append(_with_direct_access(code.src, graph).replace("def forward(", f"def _graph_{index}(", 1))
        for name, value in code.globals.items():
            names[name] = _ModuleName(value.__name__) if isinstance(value, ModuleType) else value
    text, more = dispatcher(base, graphs, given)
    calls = dict.fromkeys(str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module")
    source = Source(
        "".join([*texts, text]), {**names, **more}, tuple(map(tuple, given)), tuple(calls), runs_own_code, is_part
    )
    module.__class__ = _generated_class(base, source)


def base_of_generated(kind: type[nn.Module]) -> type[nn.Module]:
    """The user's class under one with a generated forward; any other class itself."""
    return getattr(kind, "_base_of_generated", kind)


def has_generated_forward(module: nn.Module) -> bool:
    """Whether :func:`set_forward` made the module's forward."""
    return hasattr(type(module), "_base_of_generated")


def source_of(module: nn.Module) -> Source:
    """What a module's generated forward was made from."""
    source: Source = type(module)._generated_from  # type: ignore[attr-defined]
    return source


def _with_direct_access(source: str, graph: fx.Graph) -> str:
    """Reads submodules from where they are kept: looking each up by attribute costs a small model much of its time."""
    for target in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
        direct = "self" + "".join(f"._modules[{name!r}]" for name in target.split("."))
        source = source.replace(f" {fx.graph._format_target('self', target)}(", f" {direct}(")
    return source


def _generated_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    names = ((name, value if isinstance(value, str) else id(value)) for name, value in source.names.items())
    key = (base, source.text, source.calls, source.runs_own_code, source.is_part, tuple(names))
    made = _classes.get(key)
    if made is None:
        _classes[key] = made = _make_class(base, source)
    return made


def _make_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    namespace = {
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

    made = type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "forward": namespace["forward"],
            "_base_of_generated": base,
            "_generated_from": source,
        },
    )
    weakref.finalize(made, linecache.cache.pop, filename, None)
    return made


def _rebuild(base: type[nn.Module], source: Source) -> nn.Module:
    generated = _generated_class(base, source)
    return generated.__new__(generated)
