"""How kernels are launched, and how the elements of a tensor are handed out to their programs."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
from torch import Tensor

# Of every launch: products and sums stay two operations, each rounded.
EXACT = {"enable_fp_fusion": False}

# Elements to a program of a kernel that reads and writes each once.
BLOCK = 2048

# A program works through several blocks where there are more than this: what programs leave behind for each other to
# sum up stays small. (An H200 runs some 2,000 programs of 128 threads at a time.)
MOST_PROGRAMS = 4096


class Blocks(NamedTuple):
    """Of a vector of elements: the number of programs, and the number of blocks that each works through."""

    programs: int
    each: int


def blocks_of(count: int, block: int = BLOCK) -> Blocks:
    """Shares ``count`` elements out; ``each`` is a power of two, since a kernel is compiled for every value of it."""
    blocks = triton.cdiv(count, block)
    each = triton.next_power_of_2(triton.cdiv(blocks, MOST_PROGRAMS)) if blocks > 0 else 1
    return Blocks(triton.cdiv(blocks, each), each)


class Channels(NamedTuple):
    """A dense tensor in the order of its memory as (outer, channels, inner)."""

    outer: int
    channels: int
    inner: int


def channels_of(tensor: Tensor, axis: int) -> Channels:
    """Where the channels along ``axis`` of a dense tensor lie; of one channel where ``axis`` is -1."""
    if axis < 0 or tensor.numel() == 0:
        return Channels(1, 1, tensor.numel())
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    place = order.index(axis)
    sizes = [tensor.shape[dimension] for dimension in order]
    return Channels(math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]))


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
    outer, channels, inner = channels_of(tensor, axis)
    if inner == 1 and channels > 1:
        return reduction(outer, channels, 0)
    return reduction(outer * channels, inner, 1)
