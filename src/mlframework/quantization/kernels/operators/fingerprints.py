"""Hashes of what tensors hold, to know a change that leaves no trace in a tensor's version: a write through ``.data``,
a fused optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import PLAIN, kernels_for
from .declaration import operator

# Odd 64-bit constants of splitmix64 and MurmurHash3, as signed integers.
KEY, FACTOR = 0x9E3779B97F4A7C15 - 2**64, 0xFF51AFD7ED558CCD - 2**64


def fingerprints(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """A 64-bit hash of each tensor's shape and elements.

    Equal tensors of one dtype, device and memory layout have equal hashes; others differ, but for a chance of
    :math:`2^{-64}`. Compare hashes of one process only. Off the CPU this waits for the device.

    Args:
        tensors: floating point, of any shape.

    Example:
        >>> weight = torch.ones(3)
        >>> before = fingerprints([weight])
        >>> weight.data.neg_()
        tensor([-1., -1., -1.])
        >>> fingerprints([weight]) == before
        False
    """
    tensors = list(tensors)
    device = tensors[0].device
    is_plain = all(type(tensor) in PLAIN and tensor.device == device for tensor in tensors)
    has_kernel = is_plain and kernels_for(tensors[0]) is not None
    return tuple(_fingerprints.run(tensors) if has_kernel else _fingerprints.reference(tensors))


@operator("fingerprints(Tensor[] tensors) -> int[]", ())
def _fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    shapes = [hash(tensor.shape) for tensor in tensors]
    contents = torch.stack([_hash_of(tensor.detach()) for tensor in tensors]).tolist()
    return [shape ^ content for shape, content in zip(shapes, contents, strict=True)]


def _hash_of(tensor: Tensor) -> Tensor:
    """By PyTorch's operations, in 64-bit integers that wrap around: an int64 of no dimensions."""
    bits = tensor.reshape(-1).double().view(torch.int64) * FACTOR
    keys = torch.arange(1, bits.numel() + 1, device=bits.device) * KEY
    bits = (bits ^ (bits >> 32)) * (keys | 1)  # or an even number of signs that turn over would cancel
    return (bits ^ (bits >> 29)).sum()
