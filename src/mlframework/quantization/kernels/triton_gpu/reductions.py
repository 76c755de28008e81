"""How sums and extremes of tensors are shared out to programs, each of which leaves a partial result."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import BLOCK, EXACT, MOST_PROGRAMS, channel_rows


class Reduction(NamedTuple):
    """How a row-major matrix is reduced along one of its axes, by programs that each leave one partial result.

    Attributes:
        rows, columns: of the matrix.
        axis: the one that is reduced: 0, or 1.
        splits: the number of partial results for every row (axis 1), or every column (axis 0).
        each: the number of tiles that a program works through.
        tile: rows and columns of a tile, powers of two.
    """

    rows: int
    columns: int
    axis: int
    splits: int
    each: int
    tile: tuple[int, int]

    @property
    def kept(self) -> int:
        """The number of programs to a split."""
        return -(-(self.rows, self.columns)[1 - self.axis] // self.tile[1 - self.axis])

    @property
    def programs(self) -> int:
        return self.kept * self.splits

    @property
    def partials(self) -> tuple[int, int]:
        """The shape that the partial results of one kind have."""
        return (self.rows, self.splits) if self.axis == 1 else (self.splits, self.columns)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """As kernels take it: rows, columns, splits, and the size of the partial results of one kind."""
        return self.rows, self.columns, self.splits, math.prod(self.partials)

    @property
    def constants(self) -> tuple[int, int, int, int]:
        """As kernels are compiled for it: AXIS, EACH, ROWS, COLUMNS."""
        return (self.axis, self.each, *self.tile)


def reduction(rows: int, columns: int, axis: int) -> Reduction:
    """Shares a matrix out: along its rows in tiles of one row, or along its columns in tiles of a few of them."""
    width = min(triton.next_power_of_2(columns), BLOCK if axis == 1 else 64)
    tile = (1, width) if axis == 1 else (BLOCK // width, width)
    tiles = triton.cdiv((rows, columns)[axis], tile[axis])
    kept = triton.cdiv((rows, columns)[1 - axis], tile[1 - axis])
    each = triton.next_power_of_2(min(triton.cdiv(tiles * kept, MOST_PROGRAMS), tiles))
    return Reduction(rows, columns, axis, triton.cdiv(tiles, each), each, tile)


def channels_as_matrix(tensor: Tensor, axis: int) -> Reduction:
    """The reduction of a dense tensor to one number a channel along ``axis``, or to one for all where that is -1.

    A partial result of row r belongs to channel r modulo the number of channels.
    """
    rows, columns, _, are_innermost = channel_rows(tensor, axis)
    return reduction(rows, columns, 0 if are_innermost else 1)


@triton.jit
def reduced_tile(kept, split, step, AXIS: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (ROWS,) and the columns (COLUMNS,) of a program's tile of that step in a :class:`Reduction`."""
    tile = split * EACH + step
    row = (kept if AXIS == 1 else tile) * ROWS + tl.arange(0, ROWS)
    column = (tile if AXIS == 1 else kept) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column


@triton.jit
def partial_places(kept, split, rows, columns, splits, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program leaves its partial results in :attr:`Reduction.partials`, and which of them there are."""
    if AXIS == 1:
        own = kept * ROWS + tl.arange(0, ROWS)
        place = own * splits + split
        is_kept = own < rows
    else:
        own = kept * COLUMNS + tl.arange(0, COLUMNS)
        place = split * columns + own
        is_kept = own < columns
    return place, is_kept


@triton.jit
def _total(
    partials,
    first,
    second,
    kept,
    splits,
    size,
    kept_stride,
    split_stride,
    KEPT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    own = (tl.program_id(0).to(tl.int64) * KEPT + tl.arange(0, KEPT))[:, None]
    split = tl.arange(0, SPLITS)[None, :]
    inside = (own < kept) & (split < splits)
    place = partials + (own * kept_stride + split.to(tl.int64) * split_stride)
    one = tl.sum(tl.load(place, inside, other=0.0).to(tl.float64), 1)
    other = tl.sum(tl.load(place + size, inside, other=0.0).to(tl.float64), 1)
    own = tl.program_id(0).to(tl.int64) * KEPT + tl.arange(0, KEPT)
    tl.store(first + own, one.to(tl.float32), own < kept)
    tl.store(second + own, other.to(tl.float32), own < kept)


def total(partials: Tensor, matrix: Reduction, first: Tensor, second: Tensor) -> None:
    """Adds up two kinds of partial sums, float32 (2, ...), in float64: one float32 number a row, or column, of each."""
    kept = (matrix.rows, matrix.columns)[1 - matrix.axis]
    strides = (matrix.splits, 1) if matrix.axis == 1 else (1, matrix.columns)
    splits = triton.next_power_of_2(matrix.splits)
    width = max(min(triton.next_power_of_2(kept), BLOCK // splits), 1)
    numbers = kept, matrix.splits, math.prod(matrix.partials)
    _total[(triton.cdiv(kept, width),)](partials, first, second, *numbers, *strides, width, splits, **EXACT)
