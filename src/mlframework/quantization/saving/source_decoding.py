"""Generated forwards from a file: as graphs, of which this library makes the text when one is first called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..conversion.planned_calls import Planned, programs_of
from ..graph.generated_forward import Edge, Source, calls_of
from ..graph.graph_nodes import GraphNodes, PlainNode, placeholders_of
from ..graph.signatures import Given, parameters_of
from ..int8.program import Recipe
from ..int8.views import View
from .graph_data import decode_nodes
from .guards import guarded
from .values import ValueDecoder
from .vocabulary import NotAllowedError, shortened

_LONGEST_PATHS = 1_000_000  # steps of all names together: each module with a graph has every name of it followed
_MOST_INPUTS = 1 << 12  # of a program

_PROGRAM = re.compile(r"program_\d+")
_INPUT = re.compile(r"input_\d+")

# How many numbers each view takes, at the least and at the most.
_NUMBERS = {
    "identity": (0, 0),
    "contiguous": (0, 0),
    "flatten": (2, 2),
    "transpose": (2, 2),
    "permute": (1, 16),
    "reshape": (1, 16),
    "unflatten": (2, 16),
    "select": (2, 2),
    "part": (3, 3),
}

LeadsTo = Callable[[str, bool], bool]


class SourceDecoder:
    """Makes the sources of generated forwards.

    Args:
        entries: of the sources.
        values: decodes all but graphs.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], values: ValueDecoder) -> None:
        self._entries, self._values = entries, values
        self._steps = 0  # that were followed
        self._fields = values.fields_of_records() if entries else frozenset()
        self._nodes = [self._nodes_of(entry) for entry in entries]
        self._given = [_checked_given(values.decode(entry["given"]), len(entry["graphs"])) for entry in entries]
        self._on_codes = [_checked_edges(values.decode(entry["on_codes"]), len(entry["graphs"])) for entry in entries]
        self._forms = [_checked_form(values.decode(entry["form"])) if "form" in entry else None for entry in entries]
        for entry, nodes, form in zip(entries, self._nodes, self._forms, strict=True):
            if (nodes.flat is None) is not (form is None):
                raise NotAllowedError("a flat graph must come with its programs")
            if not all(type(each) is bool for each in entry["flags"]):
                raise NotAllowedError("flags must be true or false")
            if not all(isinstance(each, str) for each in entry["reads"]):
                raise NotAllowedError("names must be text")
        self._targets = [
            _targets_in(nodes, on_codes, form)
            for nodes, on_codes, form in zip(self._nodes, self._on_codes, self._forms, strict=True)
        ]
        self._lengths = [sum(path.count(".") + 1 for path, _ in targets) for targets in self._targets]

    def has_form(self, index: int) -> bool:
        """Whether the class of the source depends on the module that it is of."""
        return self._forms[index] is not None

    def code(self, index: int) -> GraphNodes:
        """What tells the code of a source from another's."""
        return self._nodes[index]

    def source(self, index: int, base: type[nn.Module], code_at: Callable[[str], Any]) -> Source:
        """The source of a forward for modules of ``base``.

        Args:
            code_at: returns the code of a module inside of it.

        Raises:
            NotAllowedError: its arguments are none of the class's forward.
        """
        entry, nodes, given, form = self._entries[index], self._nodes[index], self._given[index], self._forms[index]
        _check_arguments(nodes, given, base, 0 if form is None else len(form[0]))
        planned = None
        if form is not None:
            programs, containers, modules, code = form
            planned = Planned(programs, containers, modules, tuple((name, code_at(name)) for name in code))
            nodes = GraphNodes(nodes.graphs, nodes.flat, nodes.given_first, nodes.guard)  # a class of its own
        runs_own_code, is_part = entry["flags"]
        return Source(
            None,
            {},
            given,
            self._on_codes[index],
            calls_of(nodes),
            runs_own_code,
            is_part,
            frozenset(entry["reads"]),
            planned,
            nodes,
        )

    def check_targets(self, index: int, leads_to: LeadsTo) -> None:
        """Refuses names that lead from a module of that source to nothing that may stand there.

        Args:
            leads_to: says whether a path leads to a module, or else to a tensor.

        Raises:
            NotAllowedError: one does.
        """
        self._steps += self._lengths[index]
        if self._steps > _LONGEST_PATHS:
            raise NotAllowedError(f"graphs may not name modules by more than {_LONGEST_PATHS} steps")
        for path, is_module in self._targets[index]:
            if not leads_to(path, is_module):
                raise NotAllowedError(f"{path} leads to nothing that a forward uses")

    def _nodes_of(self, entry: dict[str, Any]) -> GraphNodes:
        graphs = tuple(self._decoded(graph) for graph in entry["graphs"])
        if not graphs:
            raise NotAllowedError("a forward must have a graph")
        if "flat" not in entry:
            return GraphNodes(graphs, guard=guarded)
        return GraphNodes(graphs, self._decoded(entry["flat"]), programs_of, guarded)

    def _decoded(self, graph: Any) -> tuple[PlainNode, ...]:
        return decode_nodes(graph, self._fields, self._values.record_named)


def _targets_in(nodes: GraphNodes, on_codes: Any, form: Any) -> list[tuple[str, bool]]:
    """The names of what a forward calls or reads, each once, and whether it has to be a module."""
    found = [
        (node.target, node.op == "call_module")
        for graph in (*nodes.graphs, nodes.flat or ())
        for node in graph
        if node.op in ("call_module", "get_attr")
    ]
    paths = (*_modules_at_edges(on_codes), *(() if form is None else _modules_in(form)))
    return list(dict.fromkeys((*found, *((path, True) for path in paths if path))))


def _check_arguments(
    nodes: GraphNodes, given: tuple[tuple[Given, ...], ...], base: type[nn.Module], programs: int
) -> None:
    names = [parameter.name for parameter in parameters_of(base)]
    for graph in nodes.graphs:
        for argument in placeholders_of(graph):
            if not (argument in names if given else _INPUT.fullmatch(argument)):
                raise NotAllowedError(f"{argument} is no argument of {base.__name__}")
    if any(each.name not in names for variant in given for each in variant):
        raise NotAllowedError(f"a forward is given what is no argument of {base.__name__}")
    if nodes.flat is not None:
        arguments = placeholders_of(nodes.flat)
        are_programs = all(map(_PROGRAM.fullmatch, arguments[:programs]))
        if not given or not are_programs or arguments[programs:] != placeholders_of(nodes.graphs[0]):
            raise NotAllowedError(f"a flat graph may not take {shortened(arguments)}")


def _checked_given(given: Any, graphs: int) -> tuple[tuple[Given, ...], ...]:
    is_right = isinstance(given, tuple) and len(given) in ((0, 1) if graphs == 1 else (graphs,))
    if not is_right or not all(isinstance(each, Given) for variant in given for each in variant):
        raise NotAllowedError("a forward must say what it is given")
    return given  # type: ignore[no-any-return]


def _checked_edges(on_codes: Any, graphs: int) -> Any:
    for number, (with_floats, entries, exits) in on_codes.items():
        if not _is_below(number, graphs) or not _is_below(with_floats, graphs):
            raise NotAllowedError(f"{shortened(number)} is no number of a graph")
        for edge in (*entries, *exits):
            if not isinstance(edge, Edge) or not isinstance(edge.module, str):
                raise NotAllowedError("codes must come in and go out at edges")
            if any(kind not in ("item", "field") for kind, _ in edge.path):
                raise NotAllowedError("an edge must be reached by items and fields")
    return on_codes


def _checked_form(form: Any) -> Any:
    programs, *names = form
    if len(names) != 3 or not all(isinstance(each, str) for part in names for each in part):
        raise NotAllowedError("programs must be of modules with names")
    for recipe in programs:
        if not isinstance(recipe, Recipe):
            raise NotAllowedError("programs must be recipes")
        values = recipe.inputs
        if not 0 <= values <= _MOST_INPUTS:
            raise NotAllowedError(f"a program may not take {values} values")
        for step in recipe.steps:
            if not all(_is_below(read, values) for read in step.reads):
                raise NotAllowedError("a program must read earlier values")
            if not isinstance(step.target, str):
                _check_view(step.target)
            values += 1
        if not all(_is_below(output, values) for output in recipe.outputs):
            raise NotAllowedError("a program must return its values")
    return form


def _check_view(view: Any) -> None:
    least, most = _NUMBERS.get(view.name, (1, 0)) if isinstance(view, View) else (1, 0)
    is_right = least <= len(view.numbers) <= most
    if not is_right or not all(type(number) is int and abs(number) < 1 << 40 for number in view.numbers):
        raise NotAllowedError(f"{shortened(view)} is no view")


def _is_below(number: Any, end: Any) -> bool:
    return type(number) is int and type(end) is int and 0 <= number < end


def _modules_at_edges(on_codes: Any) -> Iterator[str]:
    return (edge.module for _, entries, exits in on_codes.values() for edge in (*entries, *exits))


def _modules_in(form: Any) -> Iterator[str]:
    programs, containers, modules, code = form
    yield from (*containers, *modules, *code)
    yield from (step.target for recipe in programs for step in recipe.steps if isinstance(step.target, str))
