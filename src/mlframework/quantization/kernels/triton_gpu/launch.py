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
