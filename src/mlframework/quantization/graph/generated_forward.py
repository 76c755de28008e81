"""Gives a module the forward that a graph describes, and takes that graph down again.

The module keeps its class as a base, and with it its methods, attributes, submodules, names and hooks; only ``forward``
is generated: a straight line of calls, as source that pickling carries along.
"""

from __future__ import annotations

import importlib
import itertools
import linecache
from types import ModuleType
from typing import Any

from torch import fx, nn

from .nodes import create_argument

_numbers = itertools.count()


class _ModuleName(str):
    """Stands for an imported module among the names that a generated forward uses."""


def set_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Makes ``graph`` the forward of ``module``, in place. The graph's targets are the module's own attributes."""
    graph.lint()
    code = graph.python_code("self")
    source = _with_direct_access(code.src, graph)
    names = {
        name: _ModuleName(value.__name__) if isinstance(value, ModuleType) else value
        for name, value in code.globals.items()
    }
    base = getattr(type(module), "_base_of_generated", type(module))
    module.__class__ = _generated_class(base, source, names)


def _with_direct_access(source: str, graph: fx.Graph) -> str:
    """Reads submodules from where they are kept: looking each up by attribute costs a small model much of its time."""
    for target in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
        direct = "self" + "".join(f"._modules[{name!r}]" for name in target.split("."))
        source = source.replace(f" {fx.graph._format_target('self', target)}(", f" {direct}(")
    return source


def graph_of(module: nn.Module) -> fx.Graph:
    """The graph of a module with a generated forward; every module that it calls is a node."""
    if not has_generated_forward(module):
        raise TypeError(f"module must have a generated forward, got {type(module).__name__}")
    return _CallTracer().trace(module)


def has_generated_forward(module: nn.Module) -> bool:
    """Whether :func:`set_forward` made the module's forward."""
    return hasattr(type(module), "_base_of_generated")


class _CallTracer(fx.Tracer):
    proxy_buffer_attributes = True
    create_arg = create_argument

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _generated_class(base: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    namespace = {
        name: importlib.import_module(value) if isinstance(value, _ModuleName) else value
        for name, value in names.items()
    }
    filename = f"<generated forward {next(_numbers)} of {base.__name__}>"
    # With the source on file, tracebacks and debuggers show the lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)  # what torch.fx does with a graph, too

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        parts: Any = base.__reduce_ex__(self, protocol)
        return _rebuild, (base, source, names), *parts[2:]

    return type(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce,
            "forward": namespace["forward"],
            "_base_of_generated": base,
        },
    )


def _rebuild(base: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    generated = _generated_class(base, source, names)
    return generated.__new__(generated)
