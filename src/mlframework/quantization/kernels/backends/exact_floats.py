r"""Exact sums :math:`\sum (q_x - z_x)\, q_w` from floating-point products: on any device, for any compiler to trace.

A float32 product of codes is exact while every sum lies below :math:`2^{24}`, which the weights tell. Longer sums are
cut into blocks of input channels that stay below it, and the blocks are added in int32; what cannot be cut, and GPUs,
compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..products import Description, Product, TransposedProduct, largest_code
from .backend import EXACT_IN_FLOAT32, SumsBackend

WHOLE = [slice(None)]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def exact_blocks(weight: Tensor, zero_point: int, dtype: torch.dtype, bound: int) -> list[slice]:
    """The fewest blocks of input channels (axis 1 of the weight) whose sums are exact in float32; empty where a single
    channel's might not be.

    Args:
        weight: codes (O, I, *kernel), int8; with groups, only one block is of use.
        zero_point, dtype: of the input's codes.
        bound: :func:`.largest_sum` of the whole weight.
    """
    if bound < EXACT_IN_FLOAT32:
        return WHOLE
    magnitudes = weight.reshape(*weight.shape[:2], -1).to(torch.int32).abs().sum(dim=2)
    sums = magnitudes.cumsum(dim=1) * largest_code(zero_point, dtype)
    blocks: list[slice] = []
    start, before = 0, torch.zeros_like(sums[:, 0])
    while start < sums.shape[1]:
        end = int(((sums - before[:, None]).amax(dim=0) < EXACT_IN_FLOAT32).sum())
        if end == start:
            return []
        blocks.append(slice(start, end))
        start, before = end, sums[:, end - 1]
    return blocks


def sums_in_floating_point(
    operation: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor,
    zero_point: int,
    weight: Tensor,
    blocks: Sequence[slice],
) -> Tensor:
    """Sums of an operation on ``codes - zero_point`` and ``weight``, also under autocast.

    Args:
        operation: of values (N, I, *) and weight; four dimensions and more come out channels-last.
        blocks: of axis 1 of the codes and of the weight, from :func:`exact_blocks`; none: compute in float64.

    Returns:
        float32 on a CPU where one block is enough, else int32.
    """
    # A GPU may convolve by transforms whose float32 results are a hair off, and float64 results less than one half.
    exact = codes.device.type == "cpu" and bool(blocks)
    dtype = torch.float32 if exact else torch.float64
    layout = _CHANNELS_LAST.get(codes.dim(), torch.preserve_format)
    with torch.autocast(codes.device.type, enabled=False):
        values, weight = codes.to(dtype, memory_format=layout) - zero_point, weight.to(dtype)
        if len(blocks) > 1 and exact:
            sums = torch.stack([operation(values[:, block], weight[:, block]).to(torch.int32) for block in blocks]).sum(
                dim=0, dtype=torch.int32
            )
        else:
            sums = operation(values, weight)
            sums = sums if exact else sums.round().to(torch.int32)
    return sums.contiguous(memory_format=layout) if layout is not torch.preserve_format else sums


class _ExactFloats(SumsBackend):
    def takes(self, description: Description) -> bool:
        return True

    def sums(self, product: Product) -> Callable[[Tensor], Tensor]:
        weight, zero_point = product.weight, product.zero_point
        if isinstance(product, TransposedProduct):
            blocks = WHOLE if product.bound < EXACT_IN_FLOAT32 else []
        else:
            blocks = exact_blocks(weight, zero_point, product.dtype, product.bound)
            grouped = product.description.geometry is not None and product.description.geometry.groups > 1
            blocks = [] if grouped and len(blocks) > 1 else blocks

        def run(codes: Tensor) -> Tensor:
            flat = codes if product.channel_axis == 1 else codes.reshape(-1, codes.shape[-1])
            sums = sums_in_floating_point(product.on_floats, flat, zero_point, weight, blocks)
            return sums if flat is codes else sums.reshape(*codes.shape[:-1], sums.shape[-1])

        return run


EXACT_FLOATS = _ExactFloats()
