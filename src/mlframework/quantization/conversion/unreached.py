"""Parts of a prepared model that no data has reached: they go back to the user's own code and float layers."""

from __future__ import annotations

from torch import nn

from ..graph.containers import is_part
from ..graph.generated_forward import base_of_generated
from ..graph.nodes import ADDED, replace_module
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper


def unreached_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts, other than the model itself, of whose activations no node has seen data, by name."""
    found = []
    for name, module in model.named_modules():
        if name and is_part(module):
            nodes = [part for part in module.modules() if isinstance(part, FakeQuantizeLayer)]
            activations = [node for node in nodes if node.reduces_over_ranks]
            if activations and not any(node.is_initialized for node in activations):
                found.append((name, module))
    return found


def restore_float(root: nn.Module) -> None:
    """Takes what preparing has put into a module out again, in place."""
    for module in list(root.modules()):
        if isinstance(module, QATModuleWrapper):
            replace_module(root, module, module.float_layer())
    for module in list(root.modules()):
        for name in vars(module).pop(ADDED, ()):
            delattr(module, name)
        module.__class__ = base_of_generated(type(module))
