"""Plans how a converted model runs where no hook, mode or tracer observes its modules: as programs of compiled kernels.

The flat graph of a part is cut into stages. What has an instruction runs in the program of its stage, everything else
by itself before it, and both in the order of the graph as far as one can tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from ..graph.containers import begins, is_mark, readers
from ..graph.generated_forward import FlatForm
from ..graph.in_place import is_in_place
from ..int8.integer_module import IntegerModule
from ..int8.program import Recipe, Step
from ..int8.views import View, view_of_module
from .planned_calls import Planned, code_of, programs_of
from .views import view_of_call

_Targets = dict[fx.Node, str | View]


def plan(part: nn.Module, graph: fx.Graph) -> FlatForm | None:
    """The flat graph of a lowered part with programs in it; None where there is nothing to put into one.

    Args:
        graph: with marks; it is not changed.
    """
    modules = dict(part.named_modules(remove_duplicate=False))
    targets = _with_readers(graph, {node: target for node in graph.nodes if (target := _target(node, modules))})
    if not targets:
        return None
    stages = _stages(part, graph, targets)
    programs: dict[int, _Program] = {}
    for node in targets:
        programs.setdefault(stages[node], _Program()).add(node, targets)
    programs = dict(sorted(programs.items()))
    recipes = tuple(program.recipe() for program in programs.values())
    called = tuple(dict.fromkeys(str(node.target) for node in targets if node.op == "call_module"))
    containers = tuple(_containers(graph))
    run = [str(node.args[0]) for node in graph.nodes if node.target is begins]

    def form() -> Planned:
        return Planned(recipes, containers, called, tuple((name, code_of(part.get_submodule(name))) for name in run))

    return FlatForm(_flat(graph, targets, stages, programs), form, programs_of)


def _target(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | View | None:
    """What a step of a program calls for a node."""
    if node.op in ("call_function", "call_method"):
        return view_of_call(node) if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op != "call_module" or node.kwargs or not all(isinstance(operand, fx.Node) for operand in node.args):
        return None
    module = modules[str(node.target)]
    if isinstance(module, IntegerModule):
        return str(node.target) if module.has_instruction() and module.instruction_name is not None else None
    return view_of_module(module)


def _with_readers(graph: fx.Graph, targets: _Targets) -> _Targets:
    """Those nodes that compute on codes or make them, and whose values are read."""
    found: _Targets = {}
    for node in graph.nodes:  # a view is one of codes only where it reads them in a program
        target = targets.get(node)
        if isinstance(target, str) or (target is not None and node.args[0] in found):
            found[node] = target
    computed = set(found)
    for node in reversed(list(found)):
        if not any(reader in found or reader not in computed for reader in readers(node)):
            del found[node]
    return found


def _stages(part: nn.Module, graph: fx.Graph, targets: _Targets) -> dict[fx.Node, int]:
    """When each node runs. In every stage those that are in no program run first, then the program.

    The former stay in the order of the graph, which draws of random numbers depend on, and none changes in place what a
    program has yet to read.
    """
    stages: dict[fx.Node, int] = {}
    now = last = 0  # the stage of the last node in no program, and of any
    for node in graph.nodes:
        if is_mark(node):
            continue
        if node in targets:
            stages[node] = max([0, *(stages[read] for read in node.all_input_nodes)])
        else:
            earliest = [stages[read] + (read in targets) for read in node.all_input_nodes]
            now = stages[node] = max([now, *earliest, last + 1 if _may_change_operands(part, node) else 0])
        last = max(last, stages[node])
    return stages


def _may_change_operands(part: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return is_in_place(part, node)
    module = part.get_submodule(str(node.target))
    is_known = isinstance(module, IntegerModule) or type(module).__module__.startswith("torch.nn.")
    return is_in_place(part, node) or not is_known


class _Program:
    """Collects the nodes that one program computes. It numbers values: its inputs first, then one for each node."""

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, None] = {}
        self.nodes: _Targets = {}

    def add(self, node: fx.Node, targets: _Targets) -> None:
        self.inputs.update(dict.fromkeys(read for read in node.all_input_nodes if read not in self.nodes))
        self.nodes[node] = targets[node]

    @property
    def outputs(self) -> list[fx.Node]:
        return [node for node in self.nodes if any(reader not in self.nodes for reader in readers(node))]

    def recipe(self) -> Recipe:
        numbers = {node: number for number, node in enumerate((*self.inputs, *self.nodes))}
        steps = []
        for node, target in self.nodes.items():
            called = str(node.target) if node.op == "call_module" else target
            steps.append(Step(called, tuple(numbers[read] for read in _operands(node))))
        return Recipe(len(self.inputs), tuple(steps), tuple(numbers[node] for node in self.outputs))

    def call(self, graph: fx.Graph, program: fx.Node, env: dict[fx.Node, fx.Node]) -> None:
        result = graph.call_method("run", (program, *(env[node] for node in self.inputs)))
        for place, node in enumerate(self.outputs):
            env[node] = result if len(self.outputs) == 1 else graph.call_method("__getitem__", (result, place))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.args if isinstance(operand, fx.Node)]


def _flat(
    graph: fx.Graph, targets: _Targets, stages: Mapping[fx.Node, int], programs: Mapping[int, _Program]
) -> fx.Graph:
    """The graph that calls the programs, by their stages, which are its first arguments."""
    flat = fx.Graph()
    flat._graph_namespace.create_name("self", None)  # which a submodule may be called
    arguments = {stage: flat.placeholder(f"program_{stage}") for stage in programs}
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if is_mark(node) or node in targets:
            continue
        for stage in [stage for stage in arguments if stage < stages[node]]:
            programs[stage].call(flat, arguments.pop(stage), env)
        env[node] = flat.node_copy(node, env.__getitem__)
    return flat


def _containers(graph: fx.Graph) -> Iterable[str]:
    """The containers of which a flat graph runs the code, and those that the modules it calls are in."""
    found: dict[str, None] = {"": None}
    for node in graph.nodes:
        name: Any = node.args[0] if node.target is begins else node.target if node.op == "call_module" else ""
        names = name.split(".")
        found.update((".".join(names[:length]), None) for length in range(1, len(names)))
        if node.target is begins:
            found[name] = None
    return found
