"""Batch normalization with an activation inside, taken apart in the graph: each part then goes where it belongs."""

from __future__ import annotations

from torch import fx, nn

from ..graph.hooks import is_watched
from ..graph.nodes import add_module
from ..qat.batch_norms import Normalization, evaluation_form, plain_batch_norm


def take_batch_norms_apart(root: nn.Module, graph: fx.Graph) -> None:
    """Calls the normalization and the activation one by one, of every module that is no more than these two, in
    training as well; in ``root`` and in ``graph``, both in place."""
    modules = dict(root.named_modules())
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        name, module = str(node.target), modules[str(node.target)]
        form = None if plain_batch_norm(module) is not None or is_watched(module) else evaluation_form(module)
        if form is None or not form.trains_plainly:
            continue
        parts = [_part(module, "normalization", Normalization(module))]
        if form.activation is not None:
            parts.append(form.name or _part(module, "activation", form.activation))
        value = node.args[0]
        with graph.inserting_before(node):
            for part in parts:
                value = graph.call_module(f"{name}.{part}", (value,))
                value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _part(module: nn.Module, wanted: str, part: nn.Module) -> str:
    """The name of the submodule of that type, which is added at the first call."""
    for name, child in module.named_children():
        if type(child) is type(part) and name.startswith(wanted):
            return name
    return add_module(module, "", wanted, part.train(module.training))
