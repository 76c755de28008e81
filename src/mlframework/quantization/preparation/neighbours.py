"""Which quantized values layers alone read, and what makes these: for scales to move from one to the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from ..graph.containers import readers
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.layer_types import layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from . import operations


def note_readers(
    root: nn.Module,
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    grids: Mapping[fx.Node, FakeQuantizeLayer | None],
) -> None:
    """Sets ``feeds_layers_alone`` and ``made_by`` of every fake-quantize node.

    Args:
        root: with the nodes in it.
        graph: of it.
        modules: by name, as they were before.
        grids: what puts a value of the graph on its grid.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node, grid in grids.items():
        if grid is None:
            continue
        grid.feeds_layers_alone = _is_read_by_layers(root, node, modules)
        maker = node.args[0] if root.get_submodule(str(node.target)) is grid else None
        if isinstance(maker, fx.Node) and maker.op == "call_module" and calls[maker.target] == 1:
            grid.made_by = (root.get_submodule(str(maker.target)),) if readers(maker) == [node] else ()


def _is_read_by_layers(root: nn.Module, node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """False where something else reads the value, or where channels do not stay apart on the way."""
    pending = [(node, False)]
    while pending:
        value, is_moved = pending.pop()
        for user in readers(value):
            name = str(user.target)
            module = root.get_submodule(name) if user.op == "call_module" else None
            if isinstance(module, QATModuleWrapper):
                # What moves values along the axes after the channels' mixes those of a linear layer.
                if user.args.count(value) != 1 or user.args[0] is not value or (is_moved and has_channels_last(module)):
                    return False
                continue
            is_new = user.op == "call_module" and name not in modules
            if is_new or not operations.keeps_channels(user, modules):
                return False
            stays = operations.is_relu(user, modules) or (module is not None and operations.is_dropout(module))
            pending.append((user, is_moved or not stays))
    return True


def has_channels_last(wrapper: QATModuleWrapper) -> bool:
    """Whether the channels of the layer's input lie along its last axis."""
    kind = layer_type_of(wrapper.layer)
    return isinstance(wrapper.layer, nn.Linear) or kind is None or kind.batch_norm is None
