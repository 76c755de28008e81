"""Which modules of a model are the network's own, and what they are called there."""

from __future__ import annotations

from torch import nn

from ..graph.float_structure import FLOAT_NAME, FLOAT_STRUCTURE, Record, is_ours, record_of
from ..graph.generated_forward import has_generated_forward
from .unsavable import NotSavableError


class NamesInNetwork:
    """Finds them, of a model with as many prepared ones in it as there are.

    Args:
        model: prepared, or converted, or around such models.

    Attributes:
        names: of all modules in the model, by their ids.
        structure: of the float network.

    Raises:
        NotSavableError: a part of a prepared model stands without the whole of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, str] = {}
        self.structure: dict[str, Record] = {}
        self._own: dict[int, str] = {}
        self._prefixes: list[str] = []
        for name, module in model.named_modules():
            self.names[id(module)] = name
            layer = vars(module).get("layer")
            if isinstance(layer, nn.Module) and layer._parameters is module._parameters:
                self.names[id(layer)] = name
            structure = vars(module).get(FLOAT_STRUCTURE)
            if structure is not None and not self._is_inside(name):
                self._prefixes.append(name)
                self.structure.update({joined(name, inner): record for inner, record in structure.items()})
        for name, module in model.named_modules():
            if not self._is_inside(name):
                if is_ours(type(module)) or has_generated_forward(module):
                    raise NotSavableError(
                        f"{name or 'the model'} is a {type(module).__name__} that belongs to no model which prepare() "
                        "returned: save the whole of what it returned, or of what was converted from that"
                    )
                self._own[id(module)] = name
                self.structure[name] = record_of(module)

    def name_of(self, module: nn.Module) -> str | None:
        """Where the network has a module of the model; None for what quantization has added."""
        if id(module) in self._own:
            return self._own[id(module)]
        noted = vars(module).get(FLOAT_NAME)
        if noted is None:
            return None
        name = self.names[id(module)]
        prefix = next((outer for outer in self._prefixes if _is_in(name, outer)), "")
        return joined(prefix, str(noted))

    def _is_inside(self, name: str) -> bool:
        """Whether a module is one of a prepared model, or in it."""
        return any(_is_in(name, outer) for outer in self._prefixes)


def joined(prefix: str, name: str) -> str:
    """Two names as one, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _is_in(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")
