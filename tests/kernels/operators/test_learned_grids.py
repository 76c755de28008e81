"""Sums for a learned scale and zero point over many elements: those of the reference in float64, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from example_codes import SIGNED, UNSIGNED
from example_operators import RELU6, UNBOUNDED, assert_same, on_reference, rows_of
from mlframework.quantization import QuantizationScheme, kernels
from mlframework.quantization.kernels.operators.fake_quantization import fake_quantize
from mlframework.quantization.kernels.operators.learned_grids import (
    Summand,
    learned_clip_backward,
    learned_normalize_backward,
)
from mlframework.quantization.kernels.operators.normalization import normalize, normalize_backward

pytestmark = pytest.mark.skipif(kernels.active_path() == "reference", reason="needs compiled kernels")

# Several chunks of normalization, with whole tiles side by side and a part of one, and blocks of a sum; 5 channels end
# within a register of every width.
SHAPE = (5, 5, 61, 83)
SCHEME = QuantizationScheme(signed=False, symmetric=False)
# The second is beyond what a kernel divides by with a reciprocal.
GRIDS = pytest.mark.parametrize("scale", [0.011, 2.0**-61], ids=["ordinary", "tiny"])
CLIPS = pytest.mark.parametrize("clip", [UNBOUNDED, (0.0, math.inf), RELU6], ids=str)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_any_threads(operation: Any, *arguments: Any, **options: Any) -> Any:
    """What an operator gives, the same to the bit with one thread and with three."""
    torch.set_num_threads(1)
    result = operation(*arguments, **options)
    torch.set_num_threads(3)
    for one, other in zip(result, operation(*arguments, **options), strict=True):
        assert torch.equal(one, other)
    return result


def assert_sums(result: tuple[Tensor, Tensor], values: Tensor, gradient: Tensor, scale: Tensor, zero: float) -> None:
    """LSQ, equations 3 and 4, and LSQ+, section 3.2, in float64."""
    numbers = values.double() / scale.double()
    codes = numbers.round() + zero
    inside = (codes >= 0) & (codes <= 255)
    slopes = codes.clamp(0, 255) - zero - torch.where(inside, numbers, 0.0)
    pace = 1 / math.sqrt(values.numel() * 255)
    terms = gradient.double() * slopes
    # Quotients are rounded to float32 and sums of 32 terms are of floats: beside the terms' magnitude that is little.
    noise = 1e-5 * float(terms.square().sum().sqrt())
    assert result[0].item() == pytest.approx(pace * float(terms.sum()), abs=pace * noise)
    saturated = float((gradient.double() * ~inside).sum())
    assert result[1].item() == pytest.approx(-pace * float(scale) * saturated, rel=1e-5)


@GRIDS
@CLIPS
def test_sums_beside_those_of_a_normalization(clip: tuple[float, float], scale: float) -> None:
    values, gradient = rows_of(torch.randn(SHAPE) * 2), rows_of(torch.randn(SHAPE))
    mean, inverse, weight, bias = torch.randn(5), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)
    factor = inverse * weight  # in float32, as the forward computes it
    normalized = values * factor.reshape(1, -1, 1, 1) + (bias - mean * factor).reshape(1, -1, 1, 1)
    grid = torch.tensor([scale]), torch.tensor([99.0]), SCHEME
    statistics = mean, inverse, weight
    mask = normalize(values, *statistics, bias, clip, *grid).mask
    result = with_any_threads(
        learned_normalize_backward, gradient, mask, values, *statistics, bias, clip, *grid, None, is_frozen=False
    )
    assert_sums(result[3:], normalized.clamp(*clip), gradient, grid[0], 99.0)
    others = normalize_backward(gradient, mask, values, *statistics, None, is_frozen=False)
    for own, known in zip(result[:3], others, strict=True):
        assert_same(own, known)


@GRIDS
@CLIPS
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, rows_of], ids=["contiguous", "channels innermost"])
def test_sums_beside_the_gradient_of_a_clip(layout: Any, clip: tuple[float, float], scale: float) -> None:
    """Of floats, of codes, and of one and the other: the same to the bit."""
    codes, others = torch.randint(0, 256, SHAPE, dtype=UNSIGNED), torch.randint(-128, 128, SHAPE, dtype=SIGNED)
    codes, others = layout(codes), layout(others)
    grids = torch.tensor([[0.013], [77.0]]), torch.tensor([[0.017], [-3.0]])
    left, right = ((each.float() - grid[1]) * grid[0] for each, grid in zip((codes, others), grids, strict=True))
    gradient = torch.randn(SHAPE)
    grid = torch.tensor([scale]), torch.tensor([99.0]), SCHEME
    mask = fake_quantize(left, *grid[:2], 0, 255, None, addend=right, clip=clip, mask=True).mask
    results = [
        with_any_threads(learned_clip_backward, gradient, mask, one, other, clip, *grid, None)
        for one in (Summand(left), Summand(codes, grids[0]))
        for other in (Summand(right), Summand(others, grids[1]))
    ]
    assert_sums(results[0][1:], (left + right).clamp(*clip), gradient, grid[0], 99.0)
    known = on_reference(learned_clip_backward, gradient, mask, Summand(left), Summand(right), clip, *grid, None)
    for result in results:
        assert_same(result[0], known[0])
        assert torch.equal(result[1], results[0][1])
        assert torch.equal(result[2], results[0][2])


def test_codes_of_nan_make_the_sums_nan() -> None:
    codes, gradient = torch.randint(0, 256, SHAPE, dtype=UNSIGNED), torch.randn(SHAPE)
    own = torch.tensor([[torch.nan], [77.0]])
    mask = torch.zeros((gradient.numel() + 7) // 8, dtype=torch.uint8)
    grid = torch.tensor([0.011]), torch.tensor([99.0]), SCHEME
    for compute in (learned_clip_backward, lambda *each: on_reference(learned_clip_backward, *each)):
        passed, to_scale, _ = compute(gradient, mask, Summand(codes, own), None, UNBOUNDED, *grid, None)
        assert not passed.any()
        assert to_scale.isnan()
