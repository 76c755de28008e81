"""Hashes of tensors, for which the host waits once however many there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.fingerprints import FACTOR, KEY
from ..operators.layout import dense
from .launch import BLOCK, EXACT, blocks_of


@triton.jit
def _fingerprint(
    values,
    result,
    count,
    BITS: tl.constexpr,
    KEY: tl.constexpr,
    FACTOR: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * EACH
    hashes = tl.zeros((BLOCK,), tl.int64)
    for step in range(EACH):
        offset = (first + step) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < count
        value = tl.load(values + offset, inside, other=0.0)
        if BITS == 16:
            bits = value.to(tl.int16, bitcast=True).to(tl.int64)
        elif BITS == 32:
            bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        else:
            bits = value.to(tl.int64, bitcast=True)
        key = (offset + 1) * tl.full((BLOCK,), KEY, tl.int64)
        mixed = bits * tl.full((BLOCK,), FACTOR, tl.int64)
        mixed = (mixed ^ (mixed >> 32)) * (key | 1)
        hashes += tl.where(inside, mixed ^ (mixed >> 29), 0)
    # Of integers, whose sum has no order.
    tl.atomic_add(result, tl.sum(hashes, 0))


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    hashes = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for place, tensor in enumerate(tensors):
        values = dense(tensor.detach())
        programs, each = blocks_of(values.numel())
        if programs > 0:
            _fingerprint[(programs,)](
                values, hashes[place:], values.numel(), values.element_size() * 8, KEY, FACTOR, each, BLOCK, **EXACT
            )
    shapes = [hash((tensor.shape, tensor.stride())) for tensor in tensors]
    return [shape ^ content for shape, content in zip(shapes, hashes.tolist(), strict=True)]
