"""What of a float network decides how to train it quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..int8.folding import BATCH_NORMS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# LayerNorm, RMSNorm and their kin, of whatever library: normalizations without running statistics.
_NORMALIZATION = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)


@dataclass(frozen=True)
class NetworkTraits:
    """Found in a network's modules, not in its name.

    Attributes:
        has_batch_norm: it normalizes by running statistics.
        is_depthwise: it has convolutions with a group for every channel, whose few weights each have little to average
            rounding errors over.
        is_transformer: LayerNorm or RMSNorm around linear layers that hold most of its weights.
        blocks: the names of the repeated parts that it is a chain of; empty where it has none.
    """

    has_batch_norm: bool
    is_depthwise: bool
    is_transformer: bool
    blocks: tuple[str, ...]


def network_traits(network: nn.Module) -> NetworkTraits:
    """The traits of a float network; nothing is run."""
    modules = list(network.modules())
    linear = sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))
    total = sum(parameter.numel() for name, parameter in network.named_parameters() if name.endswith("weight"))
    total -= sum(module.weight.numel() for module in modules if isinstance(module, nn.Embedding))
    return NetworkTraits(
        has_batch_norm=any(isinstance(module, BATCH_NORMS) for module in modules),
        is_depthwise=any(
            isinstance(module, _CONVOLUTIONS) and module.groups == module.in_channels > 1 for module in modules
        ),
        is_transformer=any(_NORMALIZATION.search(type(module).__name__) for module in modules) and 2 * linear > total,
        blocks=tuple(_blocks(network, "")),
    )


def _blocks(module: nn.Module, prefix: str) -> list[str]:
    """Elements of lists and sequences that are containers themselves; the outermost of each branch."""
    names = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_element = isinstance(module, (nn.ModuleList, nn.Sequential))
        if is_element and not isinstance(child, (nn.ModuleList, nn.Sequential)) and _is_container(child):
            names.append(path)
        else:
            names += _blocks(child, f"{path}.")
    return names


def _is_container(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
