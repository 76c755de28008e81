"""Rounding with error feedback, against a brute-force search and the recursion that it is a form of."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mlframework.quantization.calibration.error_feedback import Moments, round_with_feedback


def moments_of(inputs: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mixed
    return values.mT @ values / rows


def error(matrix: Tensor, codes: Tensor, scale: Tensor, moments: Tensor) -> Tensor:
    difference = matrix - codes * scale
    return ((difference @ moments) * difference).sum(-1)


def errors_of_rounding(seed: int) -> list[float]:
    """Of the best codes, of those found and of the nearest ones, over a few rows."""
    torch.manual_seed(seed)
    matrix = torch.randn(1, 6, 5, dtype=torch.float64)
    scale = matrix.abs().amax(2, keepdim=True) / 3
    moments = moments_of(5, 40, seed)[None]
    codes = round_with_feedback(matrix, Moments(moments, 1e-6), scale, -3, 3)
    assert bool((codes == codes.round()).all())
    assert float(codes.abs().max()) <= 3
    nearest = (matrix / scale).round().clamp(-3, 3)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=5)), dtype=torch.float64)
    best = torch.stack([error(row, every, one, moments[0]).min() for row, one in zip(matrix[0], scale[0], strict=True)])
    found, simple = error(matrix, codes, scale, moments)[0], error(matrix, nearest, scale, moments)[0]
    assert bool((found >= best - 1e-9).all())
    return [float(each.sum()) for each in (best, found, simple)]


def test_it_is_between_the_nearest_codes_and_the_best() -> None:
    best, found, nearest = (sum(each) for each in zip(*map(errors_of_rounding, range(8)), strict=True))
    assert found - best < 0.6 * (nearest - best)


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    matrix = torch.randn(3, 4, 9)
    moments = torch.diag_embed(torch.rand(3, 9) + 0.1)
    scale = torch.full((3, 4, 1), 0.3)
    codes = round_with_feedback(matrix, Moments(moments, 0.01), scale, -127, 127)
    assert torch.equal(codes, (matrix / scale).round())


def test_it_is_gptqs_recursion() -> None:
    """In its own words: with the inverse of the moments of what is still free."""
    matrix = torch.randn(1, 3, 7, dtype=torch.float64)
    moments = moments_of(7, 50, 0)
    scale = torch.full((1, 3, 1), 0.2, dtype=torch.float64)
    codes = round_with_feedback(matrix, Moments(moments[None], 0.0), scale, -7, 7)
    order = moments.diagonal().argsort(descending=True)
    weights, expected = (matrix[0] / 0.2)[:, order].clone(), torch.empty(3, 7, dtype=torch.float64)
    for index in range(7):
        inverse = torch.linalg.inv(moments[order][:, order][index:, index:])
        expected[:, index] = weights[:, index].round().clamp(-7, 7)
        change = (weights[:, index] - expected[:, index]) / inverse[0, 0]
        weights[:, index:] -= change[:, None] * inverse[0]
    assert torch.equal(codes[0][:, order], expected)


@pytest.mark.parametrize("inputs", [5, 300])
def test_singular_moments_are_damped(inputs: int) -> None:
    matrix = torch.randn(2, 3, inputs)
    rows = torch.randn(2, 4, inputs)
    rows[:, :, 1] = 0
    codes = round_with_feedback(matrix, Moments(rows.mT @ rows, 1e-9), torch.full((2, 3, 1), 0.5), -7, 7)
    assert bool(torch.isfinite(codes).all())


def test_solving() -> None:
    moments = torch.stack([moments_of(6, 30, seed) for seed in range(2)])
    values = torch.randn(2, 3, 6, dtype=torch.float64)
    solved = Moments(moments, 0.0).solved(values)
    torch.testing.assert_close(solved @ moments, values, rtol=1e-8, atol=1e-8)
