"""A bool tensor as one bit an element, in the order in which its elements lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import memory_order


def pack_mask(flags: Tensor) -> Tensor:
    """A bool tensor as uint8 of shape (ceil(N / 8),): element i is bit ``i % 8`` of byte ``i // 8``."""
    ordered = memory_order(flags)
    padded = torch.nn.functional.pad(ordered.to(torch.uint8), (0, -ordered.numel() % 8))
    return (padded.reshape(-1, 8) * _bits(flags.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The bool tensor that :func:`pack_mask` packed, of which those are the shape and the strides."""
    flags = (mask[:, None] & _bits(mask.device)).reshape(-1) != 0
    return flags.as_strided(shape, strides)


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
