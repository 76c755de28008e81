"""What a file is run on, and what it gives."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class ExportedOutputs(NamedTuple):
    """What the layers give, by name (of one called several times, the last), and what the model returns (None where
    there is no file)."""

    layers: dict[str, Tensor]
    results: list[Tensor] | None


def tensors_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in the order of the model's signature."""
    return [leaf for leaf in leaves_of(model, args, kwargs) if isinstance(leaf, Tensor)]


def leaves_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The same with whatever is no tensor."""
    return tree_leaves(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
