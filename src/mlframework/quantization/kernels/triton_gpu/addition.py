"""Sums of two tensors of codes: the kernel of ``add`` of :mod:`..operators.codes`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from ..operators.layout import lie_alike, memory_order
from .arithmetic import clamped, fused_multiply_add, rounded, to_codes
from .launch import BLOCK_OF_CODES, EXACT, WARPS_OF_CODES, tile, tiles_of


@triton.jit(do_not_specialize=["lowest", "highest"])
def _add(
    left,
    left_ratio,
    right,
    right_ratio,
    constant,
    codes,
    rows,
    middle,
    inner,
    left_outer_step,
    left_middle_step,
    left_inner_step,
    right_outer_step,
    right_middle_step,
    right_inner_step,
    lowest,
    highest,
    beside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile(beside, ROWS, COLUMNS)
    inside = (row < rows) & (column < inner)
    far = row // middle
    near = row % middle
    left_offset = far * left_outer_step + near * left_middle_step + column * left_inner_step
    right_offset = far * right_outer_step + near * right_middle_step + column * right_inner_step
    left_code = tl.load(left + left_offset, inside, other=0)
    right_code = tl.load(right + right_offset, inside, other=0)
    total = fused_multiply_add(right_code, tl.load(right_ratio), tl.load(constant))
    total = fused_multiply_add(left_code, tl.load(left_ratio), total)
    code = to_codes(clamped(rounded(total), lowest, highest), codes.dtype.element_ty)
    tl.store(codes + row * inner + column, code, inside)


class _Axis(NamedTuple):
    """Of two tensors that are read side by side: a size, and how far apart in each of them neighbours are."""

    size: int
    left_step: int
    right_step: int


def _axes_of(left: Tensor, right: Tensor) -> list[_Axis]:
    """Of two tensors of one shape, the axes in their order, as few as possible: what follows seamlessly is one axis."""
    axes: list[_Axis] = []
    for axis in map(_Axis, left.shape, left.stride(), right.stride()):
        if axis.size == 1:
            continue
        if axes and axes[-1][1:] == (axis.left_step * axis.size, axis.right_step * axis.size):
            axis = axis._replace(size=axes.pop().size * axis.size)
        axes.append(axis)
    return axes


def add(
    left: Tensor,
    left_ratio: Tensor,
    right: Tensor,
    right_ratio: Tensor,
    constant: Tensor,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
) -> Tensor:
    codes: Tensor = DECLARED["add"].empty_outputs(
        left, left_ratio, right, right_ratio, constant, lowest, highest, dtype
    )
    if codes.numel() == 0:
        return codes
    if lie_alike(left, right):
        left, right = memory_order(left), memory_order(right)
    else:
        left, right = torch.broadcast_tensors(left, right)
    axes = _axes_of(left, right)
    if len(axes) > 3:
        left, right = left.contiguous(), right.contiguous()
        axes = _axes_of(left, right)
    outer, middle, inner = [_Axis(1, 0, 0)] * (3 - len(axes)) + axes
    rows = outer.size * middle.size
    programs, *tiles = tiles_of(rows, inner.size, BLOCK_OF_CODES)
    _add[(programs,)](
        left,
        left_ratio,
        right,
        right_ratio,
        constant,
        codes,
        rows,
        middle.size,
        inner.size,
        outer.left_step,
        middle.left_step,
        inner.left_step,
        outer.right_step,
        middle.right_step,
        inner.right_step,
        lowest,
        highest,
        *tiles,
        num_warps=WARPS_OF_CODES,
        **EXACT,
    )
    return codes
