"""``torch._int_mm``: sums of linear layers, int8 by int8 into int32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..devices import is_traced
from ..products import Description, LinearProduct, Product
from .backend import SumsBackend
from .capability import int_mm_is_best
from .exact_floats import EXACT_FLOATS


class _IntMm(SumsBackend):
    def takes(self, description: Description) -> bool:
        return description.kind == LinearProduct.__name__ and int_mm_is_best(description.device)

    def sums(self, product: Product) -> Callable[[Tensor], Tensor]:
        weight = product.weight
        # Both operands are int8: uint8 codes are lowered by 128, and the rows of the weight make up for that together
        # with the zero point.
        unsigned = product.dtype is torch.uint8
        offset = (128 if unsigned else 0) - product.zero_point
        correction = weight.sum(dim=1, dtype=torch.int32) * offset if offset else None
        in_floats = EXACT_FLOATS.sums(product)

        def run(codes: Tensor) -> Tensor:
            # Of rows that share their memory, as those of an expanded tensor do, it reads what lies behind.
            rows = codes.reshape(-1, codes.shape[-1]).contiguous()
            if is_traced() or not _takes(rows, weight):
                return in_floats(codes)
            sums = torch._int_mm((rows ^ 128).view(torch.int8) if unsigned else rows, weight.t())
            if correction is not None:
                sums += correction
            return sums.reshape(*codes.shape[:-1], sums.shape[-1])

        return run


def _takes(rows: Tensor, weight: Tensor) -> bool:
    # CUDA's wants more than 16 rows, and both sides of the weight in multiples of 8.
    if rows.is_cuda:
        return rows.shape[0] > 16 and all(size % 8 == 0 for size in weight.shape)
    return rows.shape[0] > 0


INT_MM = _IntMm()
