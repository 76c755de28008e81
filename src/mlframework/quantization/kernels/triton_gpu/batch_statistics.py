"""Mean and variance of the channels of a batch: the kernels of ``batch_statistics`` (:mod:`..operators.normalization`).

Tensors lie in rows, their channels innermost: a matrix with a column to a channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from .arithmetic import interpolated
from .launch import BLOCK, EXACT
from .reductions import reduction


@triton.jit
def _moments_of_columns(
    values,
    partials,
    rows,
    columns,
    splits,
    size,
    AXIS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of the rows that belong to a split, the mean of each column and the sum of the squared differences from it, by
    Welford's recurrence (Technometrics 4, 1962), which loses no digits where values are far from zero."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    column = program // splits * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    seen = tl.zeros((ROWS, 1), tl.float32)
    for step in range(EACH):
        row = ((split * EACH + step) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < columns)[None, :]
        value = tl.load(values + row * columns + column[None, :], inside, other=0.0).to(tl.float32)
        seen += (row < rows).to(tl.float32)
        share = tl.where(row < rows, 1.0 / tl.maximum(seen, 1.0), 0.0)
        difference = value - mean
        moved = tl.where(inside, difference * share, 0.0)
        mean += moved
        squares += tl.where(inside, difference * (difference - moved), 0.0)
    # The rows of the tile, each of which has seen some, by Chan's formula.
    count = tl.sum(seen, 0)
    own_mean = tl.sum(mean * seen, 0) / count
    apart = mean - own_mean[None, :]
    place = split * columns + column
    tl.store(partials + place, own_mean, column < columns)
    tl.store(partials + size + place, tl.sum(squares + apart * apart * seen, 0), column < columns)


@triton.jit
def _statistics_of_columns(
    partials,
    mean,
    inverse_deviation,
    running_mean,
    running_variance,
    rows,
    columns,
    splits,
    size,
    rows_of_split,
    momentum,
    epsilon,
    HAS_RUNNING: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The moments of all splits together, by Chan's formula in float64."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < columns
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & is_column[None, :]
    place = split[:, None] * columns + column[None, :]
    before = split.to(tl.int64) * rows_of_split
    seen = tl.where(split < splits, tl.minimum(rows - before, rows_of_split), 0).to(tl.float64)[:, None]
    means = tl.load(partials + place, inside, other=0.0).to(tl.float64)
    squares = tl.load(partials + size + place, inside, other=0.0).to(tl.float64)
    count = tl.full((COLUMNS,), rows, tl.float64)
    exact = tl.sum(means * seen, 0) / count
    apart = means - exact[None, :]
    variance = tl.sum(squares + apart * apart * seen, 0) / count
    own_mean = exact.to(tl.float32)
    tl.store(mean + column, own_mean, is_column)
    tl.store(inverse_deviation + column, (1.0 / tl.sqrt(variance + epsilon)).to(tl.float32), is_column)
    if HAS_RUNNING:
        unbiased = (variance * (count / (count - 1))).to(tl.float32)
        earlier = tl.load(running_mean + column, is_column, other=0.0)
        tl.store(running_mean + column, interpolated(earlier, own_mean, momentum), is_column)
        earlier = tl.load(running_variance + column, is_column, other=0.0)
        tl.store(running_variance + column, interpolated(earlier, unbiased, momentum), is_column)


def batch_statistics(
    values: Tensor, running_mean: Tensor | None, running_variance: Tensor | None, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    mean, inverse_deviation = DECLARED["batch_statistics"].empty_outputs(
        values, running_mean, running_variance, momentum, epsilon
    )
    columns = values.shape[1]
    matrix = reduction(values.numel() // columns, columns, 0)
    partials = values.new_empty((2, *matrix.partials), dtype=torch.float32)
    _moments_of_columns[(matrix.programs,)](values, partials, *matrix.numbers, *matrix.constants, **EXACT)
    splits = triton.next_power_of_2(matrix.splits)
    width = max(min(triton.next_power_of_2(columns), 2 * BLOCK // splits), 1)
    _statistics_of_columns[(triton.cdiv(columns, width),)](
        partials,
        mean,
        inverse_deviation,
        mean if running_mean is None else running_mean,
        mean if running_variance is None else running_variance,
        *matrix.numbers,
        matrix.each * matrix.tile[0],
        momentum,
        epsilon,
        running_mean is not None,
        splits,
        width,
        **EXACT,
    )
    return mean, inverse_deviation
