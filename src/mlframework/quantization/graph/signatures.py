"""The user's signature in front of generated forwards: which calls these are for, and what becomes of the others."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from .values import Path, children_of, with_parts

# The keyword by which a generated forward says which of another module's graphs it calls; 0 where it is left out.
VARIANT = "graph_variant"

# The function of a generated forward in which no containers are called.
FLAT = "_flat_graph"


class Anything:
    """In :attr:`Given.like`, in the place of a value that may differ from call to call."""


class Given(NamedTuple):
    """An argument as the graph knows it: a structure of constants and, where values are read, :class:`Anything`."""

    name: str
    like: Any


def given_arguments(arguments: Mapping[str, Any], is_read: Any) -> tuple[Given, ...]:
    """The arguments of an example by name, of which the parts may differ for which ``is_read`` holds."""

    def replace(path: Path, part: Any) -> Any:
        return Anything if is_read(part) else part

    return tuple(Given(name, with_parts(value, replace)) for name, value in arguments.items())


def fits(value: Any, like: Any) -> bool:
    """Whether a graph that was made for arguments like these takes this value."""
    if like is Anything:
        return value is not None
    expected, children = children_of(like), children_of(value)
    if expected is None or children is None:
        return value is like or (type(value) is type(like) and bool(value == like))
    if [step for step, _ in expected] != [step for step, _ in children]:
        return False
    return all(fits(part, other) for (_, part), (_, other) in zip(children, expected, strict=True))


def is_example_call(
    base: type[nn.Module], given: Sequence[Given], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call gives what a graph is for that was made for these arguments of the forward of that class."""
    like_given = {each.name: each.like for each in given}
    try:
        bound = inspect.signature(base.forward).bind(None, *args, **kwargs).arguments
    except TypeError:
        return False
    for parameter in parameters_of(base):
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name not in like_given:
            if bound.get(name):
                return False
        elif not fits(bound.get(name, parameter.default), like_given.get(name, parameter.default)):
            return False
    return True


def parameters_of(base: type[nn.Module]) -> list[inspect.Parameter]:
    """Those of a class's forward, without ``self``."""
    forward = base.forward
    known = _parameters.get(base)
    if known is None or known[0] is not forward:
        known = _parameters[base] = (forward, list(inspect.signature(forward).parameters.values())[1:])
    return list(known[1])


# Of classes, with the forward that they are of, which somebody may replace.
_parameters: weakref.WeakKeyDictionary[type, tuple[Any, list[inspect.Parameter]]] = weakref.WeakKeyDictionary()


def dispatcher(
    base: type[nn.Module],
    graphs: Sequence[fx.Graph],
    given: Sequence[Sequence[Given]],
    given_to_flat: Callable[[nn.Module], tuple[Any, ...] | None] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The text of a ``forward`` with the signature of the user's, and the names that it uses.

    It calls ``_graph_0``, ``_graph_1``, ... with what their placeholders name, and for arguments that a graph is not
    for, the forward of the class. Where ``given_to_flat`` returns something, :data:`FLAT` runs with that first, in the
    place of the first graph.
    """
    if not given:
        return "\nforward = _graph_0\n", {}
    parameters = parameters_of(base)
    names: dict[str, Any] = {"_fits": fits, "_run_own_code": run_own_code}
    own_call = ", ".join(["self", *map(_passed_on, parameters)])
    lines = [f"\ndef forward({_declaration(parameters, names, len(graphs) > 1)}):"]
    for index, graph in enumerate(graphs):
        conditions = _conditions(parameters, {each.name: each.like for each in given[index]}, index, names)
        indent = "    "
        if len(graphs) > 1:
            lines.append(f"{indent}if {VARIANT} == {index}:")
            indent *= 2
        if conditions:
            lines.append(f"{indent}if {' or '.join(conditions)}:")
            lines.append(f"{indent}    return _run_own_code({own_call})")
        placeholders = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        if index == 0 and given_to_flat is not None:
            names["_given_to_flat"] = given_to_flat
            lines.append(f"{indent}_given = _given_to_flat(self)")
            lines.append(f"{indent}if _given is not None:")
            lines.append(f"{indent}    return {FLAT}({', '.join(['self', '*_given', *placeholders])})")
        lines.append(f"{indent}return _graph_{index}({', '.join(['self', *placeholders])})")
    if len(graphs) > 1:
        lines.append(f"    raise ValueError(f'{VARIANT} must be below {len(graphs)}, got {{{VARIANT}}}')")
    return "\n".join(lines) + "\n", names


def _declaration(parameters: list[inspect.Parameter], names: dict[str, Any], has_variants: bool) -> str:
    parts = ["self"]
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        part = f"*{parameter.name}" if parameter.kind is parameter.VAR_POSITIONAL else parameter.name
        if parameter.default is not parameter.empty:
            names[f"_default_{parameter.name}"] = parameter.default
            part += f"=_default_{parameter.name}"
        parts.append(part)
    if has_variants:
        parts += [*([] if starred else ["*"]), f"{VARIANT}=0"]
    parts += [f"**{parameter.name}" for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    return ", ".join(parts)


def _passed_on(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name


def _conditions(
    parameters: list[inspect.Parameter], given: Mapping[str, Any], index: int, names: dict[str, Any]
) -> list[str]:
    """Expressions that hold where the arguments are not what the graph is for."""
    conditions = []
    for parameter in parameters:
        name = parameter.name
        is_variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name not in given and is_variable:
            conditions.append(name)
            continue
        like = given.get(name, parameter.default)
        if like is Anything:
            if parameter.default is None:
                conditions.append(f"{name} is None")
        elif like is None or isinstance(like, bool):
            conditions.append(f"{name} is not {like}")
        else:
            names[f"_given_{index}_{name}"] = like
            conditions.append(f"not _fits({name}, _given_{index}_{name})")
    return conditions


def run_own_code(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class under a generated one, for arguments that no graph is for.

    Raises:
        TypeError: the module computes on integers, which its own code cannot.
    """
    kind: Any = type(module)
    source = kind._generated_from
    if not source.runs_own_code:
        expected = ", ".join(f"{each.name}={each.like!r}" for each in source.given[0])
        raise TypeError(
            f"{kind.__name__} must be called as in the example that it was prepared with ({expected}): after "
            "conversion, its own code for other arguments does not run. Prepare it with an example like this call"
        )
    contexts = [part.stands_alone() for part in _called_alone(module, source.calls)]
    for context in contexts:
        context.__enter__()
    try:
        return kind._base_of_generated.forward(module, *args, **kwargs)
    finally:
        for context in reversed(contexts):
            context.__exit__(None, None, None)


def _called_alone(module: nn.Module, calls: Sequence[str]) -> list[Any]:
    """The layers whose followers a module's own code calls by itself: those of its own graph, and those inside of
    containers that run something from outside of these with their layer."""
    found: list[Any] = []
    for name, part in module.named_modules():
        if not hasattr(part, "stands_alone"):
            continue
        outer = next((call for call in calls if name.startswith(f"{call}.")), None)
        inside = set() if outer is None else set(module.get_submodule(outer).modules())
        if outer is None or any(follower not in inside for follower in part.following):
            found.append(part)
    return found
