"""Quantization state stays float32 whatever dtype a model is cast to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``Module._apply``, moving float32 tensors without casting them.

    A scale in float16 would underflow, and one in bfloat16 has too few digits to name the grid that was validated.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if tensor.dtype is torch.float32 and result.dtype is not torch.float32:
            return tensor.to(result.device)
        return result

    return apply
