"""What a model's code does in training and not in evaluation: where two traces part, and what can be made of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .containers import is_mark
from .dropouts import arguments_besides_dropout
from .nodes import add_module, is_constant, owner_of
from .subgraph import module_of_nodes
from .watching import is_inside

_DEPENDS = "its code depends on the training mode"


class TrainingOnly(nn.Module):
    """What is done to a value in training alone (stochastic depth, added noise): a dropout in all but name.

    Args:
        function: of the value, and of whatever else it reads.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Tensor, *others: Any) -> Tensor:
        return self.function(value, *others) if self.training else value


def differing_modules(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> dict[str, str]:
    """The innermost modules whose code makes other calls in training than in evaluation, with the reason."""
    if _are_alike(model, training, evaluation):
        return {}
    own, other = _by_owner(model, training), _by_owner(model, evaluation)
    differing = [owner for owner in own if owner in other and own[owner] != other[owner]]
    innermost = [
        owner for owner in differing if not any(name != owner and is_inside(name, owner) for name in differing)
    ]
    if not innermost:  # the calls are the same, on other values
        nodes = zip(training.nodes, evaluation.nodes, strict=False)
        innermost = [next((owner_of(a) for a, b in nodes if (a.op, a.target) != (b.op, b.target)), "")]
    return dict.fromkeys(innermost, _DEPENDS)


def modules_for_training_alone(model: nn.Module, evaluation: fx.Graph, training: fx.Graph) -> list[str]:
    """Puts a :class:`TrainingOnly` into both graphs for what one does to a value on its way from node to node and the
    other does not, if that is all in which they differ. Returns the names of the modules."""
    alignment = _align(model, training, evaluation)
    if alignment is None or not alignment.extras:
        return []
    groups = _groups(alignment)
    if groups is None:
        return []
    names = []
    back = {node: other for other, node in alignment.value_of.items()}
    for after, (before, nodes) in groups.items():
        reads = dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in nodes)
        inputs = [before, *(read for read in reads if read is not before)]
        module = TrainingOnly(module_of_nodes(nodes, inputs, {}))
        name = add_module(model, owner_of(after), "training_only", module)
        names.append(name)
        follower = alignment.extras[after]
        with evaluation.inserting_before(follower):
            call = evaluation.call_module(name, tuple(back[read] for read in inputs))
        call.meta = dict(after.meta)
        for user, operand in alignment.rerouted[after]:
            user.replace_input_with(operand, call)
        with training.inserting_after(after):
            call = training.call_module(name, tuple(inputs))
        call.meta = dict(after.meta)
        after.replace_all_uses_with(call)
        for node in reversed(nodes):
            training.erase_node(node)
    return names


class _Alignment(NamedTuple):
    """Attributes:
    value_of: the training graph's node of each node of the evaluation graph.
    extras: nodes of the training graph alone, with the node of the evaluation graph that comes next.
    rerouted: for each extra whose value is read in the place of another: who reads it, and what evaluation reads.
    """

    value_of: dict[fx.Node, fx.Node]
    extras: dict[fx.Node, fx.Node]
    rerouted: dict[fx.Node, list[tuple[fx.Node, fx.Node]]]


def _align(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> _Alignment | None:
    found = _Alignment({}, {}, {})
    pending = iter(evaluation.nodes)
    wanted = next(pending, None)
    for node in training.nodes:
        pairs = None if wanted is None else _operands(model, wanted, node)
        if wanted is not None and pairs is not None and all(_corresponds(found, *pair) for pair in pairs):
            for operand, other in pairs:
                if found.value_of[operand] is not other:
                    found.rerouted.setdefault(other, []).append((wanted, operand))
            found.value_of[wanted] = node
            wanted = next(pending, None)
        elif wanted is not None:
            found.extras[node] = wanted
        else:
            return None
    return found if wanted is None else None


def _operands(model: nn.Module, node: fx.Node, other: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The nodes that two nodes read, in pairs; None where the nodes do not make the same call."""
    if is_constant(node) and is_constant(other):
        return [] if _same_constant(model, node, other) else None
    if node.op != other.op or node.target != other.target:
        return None
    reads: tuple[list[fx.Node], list[fx.Node]] = [], []

    def stated(each: fx.Node, found: list[fx.Node]) -> str:
        return str(fx.map_arg(arguments_besides_dropout(each), lambda read: found.append(read) or "%"))  # type: ignore[func-returns-value]

    if stated(node, reads[0]) != stated(other, reads[1]):
        return None
    return list(zip(*reads, strict=True))


def _corresponds(found: _Alignment, operand: fx.Node, other: fx.Node) -> bool:
    expected = found.value_of.get(operand)
    return other is expected or (other in found.extras and expected in _behind(found, other))


def _behind(found: _Alignment, node: fx.Node) -> set[fx.Node]:
    """What the extras that lead to a node are computed from."""
    reads, pending, seen = set(), [node], {node}
    while pending:
        for read in pending.pop().all_input_nodes:
            if read in found.extras and read not in seen:
                seen.add(read)
                pending.append(read)
            elif read not in found.extras:
                reads.add(read)
    return reads


def _groups(found: _Alignment) -> dict[fx.Node, tuple[fx.Node, list[fx.Node]]] | None:
    """For each extra that is read in the place of another value: that value, and the extras that make one of the other,
    in order; None where that does not account for all extras."""
    groups = {}
    used: set[fx.Node] = set()
    for after, readers in found.rerouted.items():
        before = {found.value_of[operand] for _, operand in readers}
        inside, pending = {after}, [after]
        while pending:
            for read in pending.pop().all_input_nodes:
                if read in found.extras and read not in inside:
                    inside.add(read)
                    pending.append(read)
        nodes = [node for node in found.extras if node in inside]
        takes_calls = all(node.op in ("call_function", "call_method") and not is_mark(node) for node in nodes)
        if len(before) != 1 or inside & used or not takes_calls:
            return None
        used |= inside
        groups[after] = (before.pop(), nodes)
    known = set(found.value_of.values())
    reads_known = all(read in known or read in used for node in used for read in node.all_input_nodes)
    return groups if used == set(found.extras) and reads_known else None


def _same_constant(model: nn.Module, node: fx.Node, other: fx.Node) -> bool:
    """Constants made while tracing are alike in both traces; random ones are not."""
    return torch.equal(getattr(model, str(node.target)), getattr(model, str(other.target)))


def _are_alike(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> bool:
    alignment = _align(model, training, evaluation)
    return alignment is not None and not alignment.extras


def _by_owner(model: nn.Module, graph: fx.Graph) -> dict[str, list[Any]]:
    """What the code of each module calls, with what arguments but for other modules' values."""
    calls: dict[str, list[Any]] = {}
    number: dict[fx.Node, tuple[str, int]] = {}
    for node in graph.nodes:
        owner = owner_of(node)
        own = calls.setdefault(owner, [])

        def stated(read: fx.Node, owner: str = owner) -> str:
            return f"%{number[read][1]}" if number[read][0] == owner else "%"

        target = getattr(model, str(node.target)).tolist() if is_constant(node) else node.target
        own.append((node.op, target, str(fx.map_arg(arguments_besides_dropout(node), stated))))
        number[node] = owner, len(own)
    return calls
