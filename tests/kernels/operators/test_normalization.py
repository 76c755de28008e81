"""Batch normalization with clip and fake quantization, against float64 and against fake quantization alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlframework.quantization import QuantizationScheme, kernels
from mlframework.quantization.kernels.operators.layout import with_channels_last
from mlframework.quantization.kernels.operators.masks import pack_mask, unpack_mask
from mlframework.quantization.kernels.operators.normalization import (
    batch_statistics,
    frozen_statistics,
    lies_in_rows,
    normalize,
    normalize_backward,
)

pytestmark = pytest.mark.usefixtures("_path")

UNSIGNED = QuantizationScheme(signed=False, symmetric=False)
SCHEMES = [UNSIGNED, QuantizationScheme(), QuantizationScheme(bits=4, signed=False, symmetric=False)]
UNBOUNDED = (-math.inf, math.inf)
CLIPS = [UNBOUNDED, (0.0, math.inf), (0.0, 6.0), (-0.7, 0.4)]
# One row, rows that end within a tile of 2048 elements, within a byte of the mask and in the second chunk of 32 tiles,
# and more channels than a tile has elements.
SHAPES = [(2, 3), (17, 5), (3, 7, 4, 5), (4, 33, 9, 9), (2, 16, 60, 61), (9000, 9), (5, 2100), (3, 6, 11)]


def channels_last(*shape: int) -> Tensor:
    return with_channels_last(torch.randn(shape) * 2 + 0.5)


def of_channels(values: Tensor) -> Tensor:
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def along(vector: Tensor, values: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (values.dim() - 2))


EPSILON = 1e-5


def statistics_of(values: Tensor) -> tuple[Tensor, Tensor]:
    return batch_statistics(values, None, None, 0.1, EPSILON)


def normalized(values: Tensor, clip: tuple[float, float] = UNBOUNDED, scheme: QuantizationScheme = UNSIGNED) -> Any:
    channels = values.shape[1]
    zero_point = torch.tensor([float(scheme.symmetric_zero_point if scheme.symmetric else 5)])
    return normalize(
        values, torch.zeros(channels), torch.ones(channels), None, None, clip, torch.tensor([0.043]), zero_point, scheme
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_float64(shape: tuple[int, ...]) -> None:
    values = channels_last(*shape)
    mean, inverse = statistics_of(values)
    rows = of_channels(values).double()
    # A sum over a chunk is in float32, of at most 32 terms at a place: some roundings of the largest term.
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse.double(), torch.rsqrt(rows.var(0, correction=0) + EPSILON), rtol=3e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_statistics_move_towards_the_unbiased_ones(shape: tuple[int, ...], momentum: float) -> None:
    values = channels_last(*shape)
    mean, variance = torch.randn(shape[1]), torch.rand(shape[1])
    rows = of_channels(values).double()
    expected_mean = (1 - momentum) * mean.double() + momentum * rows.mean(0)
    expected_variance = (1 - momentum) * variance.double() + momentum * rows.var(0)
    versions = mean._version, variance._version
    batch_statistics(values, mean, variance, momentum, EPSILON)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=3e-6, atol=1e-6)
    assert (mean._version, variance._version) > versions, "a change that others see"


def test_statistics_of_values_far_from_zero_keep_their_digits() -> None:
    values = channels_last(64, 4, 8, 8) * 0.01 + 1000
    mean, inverse = statistics_of(values)
    rows = of_channels(values).double()
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(inverse.double(), torch.rsqrt(rows.var(0, correction=0) + EPSILON), rtol=1e-5, atol=0)


def test_statistics_of_constant_channels_have_no_variance() -> None:
    mean, inverse = statistics_of(torch.full((100, 3), 0.1))
    assert torch.equal(mean, torch.full((3,), 0.1))
    torch.testing.assert_close(inverse, torch.full((3,), EPSILON**-0.5), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_normalization_it_is_fake_quantization(
    shape: tuple[int, ...], clip: tuple[float, float], scheme: QuantizationScheme
) -> None:
    """Bit for bit, and so what the formulas of arithmetic give."""
    values = channels_last(*shape) * 2
    result = normalized(values, clip, scheme)
    zero_point = torch.tensor([float(scheme.symmetric_zero_point if scheme.symmetric else 5)])
    arguments: Any = (values, torch.tensor([0.043]), zero_point, scheme.quant_min, scheme.quant_max, None)
    with kernels.reference_kernels():
        expected = kernels.fake_quantize(*arguments, clip=clip, codes=scheme.dtype, mask=True, extremes=True)
    assert torch.equal(result.values, expected.values)
    assert torch.equal(result.codes, expected.codes)
    assert result.codes.dtype is scheme.dtype
    assert torch.equal(result.mask, expected.mask)
    assert torch.equal(result.extremes, expected.extremes)
    assert result.values.stride() == result.codes.stride() == values.stride()


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalizing_is_within_one_rounding_of_float64(shape: tuple[int, ...], clip: tuple[float, float]) -> None:
    values = channels_last(*shape)
    mean, inverse, gamma, beta = (
        torch.randn(shape[1]),
        torch.rand(shape[1]),
        torch.randn(shape[1]),
        torch.randn(shape[1]),
    )
    scale, zero_point = torch.tensor([0.031]), torch.tensor([77.0])
    result = normalize(values, mean, inverse, gamma, beta, clip, scale, zero_point, UNSIGNED)
    difference = values.double() - along(mean.double(), values)
    unclipped = difference * along(inverse.double() * gamma, values) + along(beta.double(), values)
    clipped = unclipped.clamp(*clip)
    exact = clipped / scale.double() + zero_point
    # Half a code, and two float32 roundings of a product of up to about 10.
    assert (result.codes.double() - exact.clamp(0, 255)).abs().max() <= 0.5 + 1e-4
    assert torch.equal(result.values, (result.codes.float() - zero_point) * scale)
    inside = unpack_mask(result.mask, values.shape, values.stride())
    expected = (unclipped > clip[0]) & (unclipped < clip[1]) & (exact > -0.5) & (exact < 255.5)
    ends = [end for end in clip if math.isfinite(end)]
    edge = torch.stack([(unclipped - end).abs() for end in ends] or [torch.ones_like(exact)]).amin(0)
    is_clear = (edge > 1e-5) & ((exact + 0.5).abs() > 1e-4) & ((exact - 255.5).abs() > 1e-4)
    assert torch.equal(inside[is_clear], expected[is_clear])
    assert is_clear.double().mean() > 0.8
    torch.testing.assert_close(
        result.extremes.double().flatten(), torch.stack([-clipped.min(), clipped.max()]), rtol=1e-6, atol=1e-6
    )


def test_the_grid_is_that_of_the_codes() -> None:
    values = channels_last(4, 5, 6, 6)
    zeros, scale, zero_point = torch.zeros(5), torch.tensor([0.043]), torch.tensor([300.4])
    arguments: Any = (values, zeros, torch.ones(5), None, None, UNBOUNDED, scale, zero_point, UNSIGNED)
    assert torch.equal(normalize(*arguments).grid, torch.tensor([[0.043], [255.0]]))
    assert normalize(*arguments, codes=False).grid is None


def test_nan_has_no_code_and_stays() -> None:
    values = channels_last(4, 5, 6, 6)
    values[2, 3, 1, 1] = torch.nan
    result = normalized(values, (0.0, 6.0))
    assert result.codes[2, 3, 1, 1] == 0, "the lowest code"
    assert torch.equal(result.grid.isnan(), torch.tensor([[True], [False]]))
    assert torch.equal(result.values.isnan(), values.isnan())
    assert torch.equal(result.extremes, torch.full((2, 1), -torch.inf))
    assert not unpack_mask(result.mask, values.shape, values.stride())[2, 3, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_saturates_and_is_no_extreme(sign: int) -> None:
    values = channels_last(4, 5, 6, 6)
    values[0, 0, 0, 0] = sign * torch.inf
    result = normalized(values)
    assert result.codes[0, 0, 0, 0] == (255 if sign > 0 else 0)
    assert torch.equal(torch.isfinite(result.extremes.flatten()), torch.tensor([sign > 0, sign < 0]))
    clipped = normalized(values, (-0.5, 0.5))
    assert torch.equal(clipped.extremes, torch.full((2, 1), 0.5))


@pytest.mark.parametrize("gradient_clip", [None, 0.8])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64(shape: tuple[int, ...], affine: bool, gradient_clip: float | None) -> None:
    values = channels_last(*shape)
    weight = torch.randn(shape[1]) if affine else None
    result = normalized(values, (0.0, 3.0))
    gradient = torch.randn(shape)  # contiguous: of another layout than the values
    mean, inverse = statistics_of(values)
    actual = normalize_backward(gradient, result.mask, values, mean, inverse, weight, gradient_clip, is_frozen=False)

    exact = values.double().requires_grad_()
    gamma = (torch.ones(shape[1]) if weight is None else weight).double().requires_grad_()
    beta = torch.zeros(shape[1], dtype=torch.float64).requires_grad_()
    passed = gradient.double() if gradient_clip is None else gradient.double().clamp(-gradient_clip, gradient_clip)
    passed = passed * unpack_mask(result.mask, values.shape, values.stride())
    F.batch_norm(exact, None, None, gamma, beta, training=True, eps=EPSILON).backward(passed)
    for one, other in zip(actual, (exact.grad, gamma.grad, beta.grad), strict=True):
        assert other is not None
        # Differences of sums: digits are relative to the largest. Two rows cancel to nearly nothing at all.
        bound = 3e-5 if shape[0] > 2 or len(shape) > 2 else 1e-3
        assert (one.double() - other).abs().max() <= bound * other.abs().max() + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_statistics_are_constants(shape: tuple[int, ...]) -> None:
    values = channels_last(*shape)
    mean, variance = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    known = frozen_statistics(mean, variance, EPSILON)
    gradient, weight = torch.randn(shape), torch.randn(shape[1])
    mask = pack_mask(values > 0)
    actual = normalize_backward(gradient, mask, values, *known, weight, None, is_frozen=True)

    exact = values.double().requires_grad_()
    gamma, beta = weight.double().requires_grad_(), torch.zeros(shape[1], dtype=torch.float64).requires_grad_()
    passed = gradient.double() * (values > 0)
    F.batch_norm(exact, mean.double(), variance.double(), gamma, beta, eps=EPSILON).backward(passed)
    for one, other in zip(actual, (exact.grad, gamma.grad, beta.grad), strict=True):
        assert other is not None
        assert (one.double() - other).abs().max() <= 3e-5 * other.abs().max() + 1e-6  # sums, relative to the largest


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same_sums() -> None:
    values = channels_last(4, 33, 60, 61)
    gradient = channels_last(4, 33, 60, 61)

    def everything() -> list[Tensor]:
        mean, inverse = statistics_of(values)
        result = normalized(values, (0.0, 6.0))
        backward = normalize_backward(gradient, result.mask, values, mean, inverse, None, None, is_frozen=False)
        return [mean, inverse, result.values, result.codes, result.mask, result.extremes, *backward]

    several = everything()
    torch.set_num_threads(1)
    assert all(map(torch.equal, several, everything()))


@pytest.mark.parametrize(
    ("values", "lies"),
    [
        (torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3, 1, 1), True),
        (torch.zeros(2, 1, 4, 4), True),
        (torch.zeros(2, 3, 4, 4), False),
        (torch.zeros(2, 3, 4), False),
        (torch.zeros(2, 3).t(), False),
        (torch.zeros(3), False),
    ],
    ids=lambda value: f"{tuple(value.shape)} {value.stride()}" if isinstance(value, Tensor) else "",
)
def test_which_tensors_lie_in_rows(values: Tensor, lies: bool) -> None:
    assert lies_in_rows(values) is lies


def test_what_compiled_kernels_refuse() -> None:
    if kernels.active_path() != "native":
        pytest.skip("needs compiled kernels")
    with pytest.raises(RuntimeError, match="channels innermost"):
        statistics_of(torch.zeros(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="values must not be empty"):
        statistics_of(torch.zeros(0, 3))
    with pytest.raises(RuntimeError, match="mean must hold 3 numbers side by side, got 2"):
        normalize(
            torch.zeros(2, 3),
            torch.zeros(2),
            torch.ones(3),
            None,
            None,
            UNBOUNDED,
            torch.ones(1),
            torch.zeros(1),
            UNSIGNED,
        )
    arguments: Any = (torch.zeros(2, 3), torch.zeros(3), torch.ones(3), None, None)
    with pytest.raises(RuntimeError, match="mask must hold one bit to an element"):
        normalize_backward(torch.zeros(2, 3), torch.zeros(2, dtype=torch.uint8), *arguments, is_frozen=False)
    with pytest.raises(RuntimeError, match="gradient must have the shape of values"):
        normalize_backward(torch.zeros(3, 2), torch.zeros(1, dtype=torch.uint8), *arguments, is_frozen=False)
