"""An exported program that ``torch.onnx`` decomposes only where there is something to decompose.

It decomposes every program, for which PyTorch runs the program twice more: half of the time that an export takes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

# Operators that decomposing takes apart, because what they return may be their input, and that torch.onnx translates to
# the same nodes whole.
_TRANSLATED_WHOLE = {
    torch.ops.aten.contiguous.default,
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.reshape.default,
}

# One that is made up of others, and that torch.onnx knows by these alone.
_TAKEN_APART = {torch.ops.aten.batch_norm.default}

# Besides operators, what there is for the parts of a result, and for sizes.
_PYTHON_FUNCTIONS = {
    operator.getitem,
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
    operator.neg,
}


def decompose_if_needed(program: torch.export.ExportedProgram) -> None:
    """Lets a program's ``run_decompositions`` return the program itself where that would change nothing."""
    decompose = program.run_decompositions

    def run_decompositions(decomp_table: Mapping[Any, Any] | None = None, **options: Any) -> Any:
        if decomp_table is None or not all(_stays(node, decomp_table) for node in program.graph.nodes):
            return decompose(decomp_table, **options)
        _drop_idle_flattening(program.graph)
        return program

    program.run_decompositions = run_decompositions


def _stays(node: fx.Node, table: Mapping[Any, Any]) -> bool:
    """Whether decomposing leaves the node as it is: an operator that changes nothing in place, is not in the table, and
    is not made up of others. Of anything else (a nested graph, say) one cannot tell."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target in _PYTHON_FUNCTIONS
    if target in table or target in _TAKEN_APART or target._schema.is_mutable:
        return False
    # Those that are made up of others, PyTorch keeps if asked to; but not where they return views.
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    views = any(result.alias_info is not None for result in target._schema.returns)
    return not (composite and views) or target in _TRANSLATED_WHOLE


def _drop_idle_flattening(graph: fx.Graph) -> None:
    """Takes out what flattens one axis, as decomposing does."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.flatten.using_ints or any(user.op == "output" for user in node.users):
            continue
        (source,) = node.all_input_nodes
        if source.meta["val"].dim() == node.meta["val"].dim():
            node.replace_all_uses_with(source)
            graph.erase_node(node)
