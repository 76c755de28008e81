"""How kernels are launched, and how the elements of a tensor are handed out to their programs."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Of every launch: products and sums stay two operations, each rounded.
EXACT = {"enable_fp_fusion": False}

# Elements to a program of a kernel that reads and writes each once.
BLOCK = 2048

# Of codes to codes: 16 to each of 256 threads, which is one access of 16 bytes.
BLOCK_OF_CODES = 4096
WARPS_OF_CODES = 8

# Columns of a tile, of which a row is then some sectors of a cache.
_NARROWEST = 64

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


class Tiles(NamedTuple):
    """How rows of elements are handed out: each program takes ``rows`` by ``columns`` of them, powers of two.

    Attributes:
        beside: how many tiles lie side by side in a row.
    """

    programs: int
    beside: int
    rows: int
    columns: int


def tiles_of(rows: int, columns: int, block: int = BLOCK) -> Tiles:
    """Shares rows of elements out in tiles of ``block`` elements, with as little as possible beyond the last column."""
    width = columns & -columns  # the largest power of two that divides them
    if width < _NARROWEST or width * rows < block:
        width = triton.next_power_of_2(columns)
    width = min(width, block)
    height = block // width
    beside = triton.cdiv(columns, width)
    return Tiles(triton.cdiv(rows, height) * beside, beside, height, width)


@triton.jit
def tile(beside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (ROWS, 1) and the columns (1, COLUMNS) of this program in :class:`Tiles`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // beside * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % beside * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column


class ChannelRows(NamedTuple):
    """A dense tensor in the order of its memory as rows: of its channels, or of what lies in one channel."""

    rows: int
    columns: int
    channels: int
    are_innermost: bool


def channel_rows(tensor: Tensor, axis: int) -> ChannelRows:
    """Of the channels along ``axis``; a single row of one channel where it is -1."""
    outer, channels, inner = channels_of(tensor, axis)
    if inner == 1 and channels > 1:
        return ChannelRows(outer, channels, channels, True)
    return ChannelRows(outer * channels, inner, channels, False)


@triton.jit
def of_channels(numbers, row, column, channels, PER_CHANNEL: tl.constexpr, ARE_INNERMOST: tl.constexpr):
    """Of a tile of :class:`ChannelRows`, the number of each element's channel, in a shape that broadcasts; without
    ``PER_CHANNEL`` the only number. Beyond the last channel it is 1."""
    if not PER_CHANNEL:
        number = tl.load(numbers)
    elif ARE_INNERMOST:
        number = tl.load(numbers + column, column < channels, other=1)
    else:
        number = tl.load(numbers + row % channels)
    return number
