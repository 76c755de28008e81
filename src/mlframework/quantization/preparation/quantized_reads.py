"""Where the node of a float value goes: who computes on integers reads the node, and others read the value."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

from ..graph.containers import Call, Calls, begins, is_mark, nodes_of, readers
from ..graph.nodes import add_module, label_of, owner_of
from ..qat.fake_quantize_layer import FakeQuantizeLayer


def quantize_reads(
    root: nn.Module,
    graph: fx.Graph,
    node: fx.Node,
    layer: FakeQuantizeLayer,
    reads_integers: Callable[[fx.Node], bool],
) -> None:
    """Adds ``layer`` to the model and to its graph, between ``node`` and those who read integers of it.

    Where others read the value as well, the layer stands in the innermost container whose code leads to all who read
    integers, so that no container has to hand over both. Where one of them would still have to, all read the layer.

    Args:
        root: the model.
        graph: its graph, with marks.
        node: whose value is quantized.
        layer: its fake-quantize node.
        reads_integers: of a reader of ``node``.
    """
    read = readers(node)
    integer = [reader for reader in read if reads_integers(reader)]
    place = None if len(integer) == len(read) else _place(graph, node, integer)
    if place is None:
        name = add_module(root, owner_of(node), f"{label_of(node)}_fake_quantize", layer)
        position = node
        while position.next.op == "placeholder":
            position = position.next
        with graph.inserting_after(position):
            call = graph.call_module(name, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        return
    owner, users = place
    name = add_module(root, owner, f"{label_of(node)}_fake_quantize", layer)
    with graph.inserting_before(users[0]):
        call = graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, call)


def _place(graph: fx.Graph, node: fx.Node, integer: Iterable[fx.Node]) -> tuple[str, list[fx.Node]] | None:
    """The container for the layer, and the users, in order, that are to read it; None where there is no such place."""
    calls = Calls(graph)
    paths = [calls.around(reader) for reader in integer]
    common = [steps[0] for steps in zip(*paths, strict=False) if len(set(steps)) == 1]
    depth, chosen = len(common), set(integer)
    inner: dict[Call, None] = dict.fromkeys(path[depth] for path in paths if len(path) > depth)
    for call in inner:
        users = [user for user in nodes_of(call) if node in user.all_input_nodes]
        if any(user not in chosen and not (is_mark(user) and user.target is begins) for user in users):
            return None
        chosen.update(users)
    order = [user for user in graph.nodes if user in chosen]
    return common[-1].name, order
