"""Arguments of operators on another device, as they lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device) -> Any:
    """A copy of tensors, and of lists of them, on the device: with the same strides and offset; others as they are."""
    if isinstance(value, Tensor):
        return _moved_tensor(value, device)
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    return value


def _moved_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    first = tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.as_strided(tensor, (last + 1,), (1,), 0).clone().to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), first)


def on_cpu(value: Any) -> Any:
    """A result where it can be compared; its strides stay, as far as it fills its memory."""
    return value.cpu() if isinstance(value, Tensor) else value
