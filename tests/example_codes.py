"""Codes for tests, in every dtype and however they may lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

UNSIGNED, SIGNED = torch.uint8, torch.int8
DTYPES = (UNSIGNED, SIGNED)


def random_codes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    ends = torch.iinfo(dtype)
    return torch.randint(ends.min, ends.max + 1, shape, dtype=dtype)


def every_code(dtype: torch.dtype) -> Tensor:
    ends = torch.iinfo(dtype)
    return torch.arange(ends.min, ends.max + 1).to(dtype)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values, spread over memory in different ways."""
    result = {"contiguous": tensor.contiguous()}
    if tensor.dim() == 0:
        return result
    axes = list(range(tensor.dim()))
    turned = tensor.permute(axes[::-1]).contiguous().permute(axes[::-1])
    spread = tensor.repeat_interleave(2, dim=-1)[..., ::2]
    # One element into its memory: at no multiple of any vector's length.
    unaligned = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)
    result.update(turned=turned, spread=spread, unaligned=unaligned)
    if tensor.dim() == 4:
        result["channels last"] = tensor.contiguous(memory_format=torch.channels_last)
        wide = torch.cat([tensor, tensor], dim=1).contiguous(memory_format=torch.channels_last)
        result["half of the channels"] = wide[:, : tensor.shape[1]]
    if tensor.numel() > 0:
        result["expanded"] = tensor[:1].expand(tensor.shape)
    return result
