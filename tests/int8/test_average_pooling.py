"""Averages of codes against PyTorch's own poolings in float64: the nearest code, for every way to place windows."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme
from mlframework.quantization.int8.average_pooling import AveragePooling, Mean
from mlframework.quantization.int8.operations import Int8Operation
from mlframework.quantization.int8.pooling_windows import ADAPTIVE_POOLS, FIXED_POOLS

POOLS = (*FIXED_POOLS, *ADAPTIVE_POOLS)
BATCHES = ((2, 3), (1, 1), (0, 2), (3,))  # what comes before the dimensions that are pooled; (3,) has no batch


def grid(scale: float, zero_point: int, signed: bool = False, bits: int = 8) -> QuantizationParameters:
    scheme = QuantizationScheme(bits, signed, symmetric=False)
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), scheme)


# The zero points are at no end, so that padding is told from the lowest code; the results are finer than the inputs.
GRIDS = [
    (grid(0.021, 131), grid(0.0107, 117)),
    (grid(0.5, 3, signed=True), grid(0.25, -20, signed=True)),
    (grid(0.05, 9, bits=4), grid(0.013, 60)),
    (grid(0.037, 200), grid(0.3, -3, signed=True, bits=4)),
]


def random_codes(parameters: QuantizationParameters, shape: tuple[int, ...]) -> Tensor:
    scheme = parameters.scheme
    return torch.randint(scheme.quant_min, scheme.quant_max + 1, shape).to(scheme.dtype)


def check(
    pooling: Any,
    codes: Tensor,
    input: QuantizationParameters = GRIDS[0][0],
    output: QuantizationParameters = GRIDS[0][1],
) -> None:
    """The result is the code nearest to the average in float64, and has the shape that the floats would have."""
    result = Int8Operation(AveragePooling(pooling), [input], output)(codes)
    offsets = codes.double() - input.zero_point.item()
    steps = pooling(offsets) * (input.scale.item() / output.scale.item())
    scheme, zero_point = output.scheme, output.zero_point.item()
    wanted = steps.clamp(scheme.quant_min - zero_point, scheme.quant_max - zero_point)
    assert result.dtype is scheme.dtype
    assert result.shape == wanted.shape
    # Half a step, and three roundings to float32 of up to 2**8 steps.
    assert not ((result.double() - zero_point - wanted).abs() > 0.5 + 2.0**-14).any()


def per_axis(data: st.DataObject, values: st.SearchStrategy[int], dimensions: int) -> int | tuple[int, ...]:
    return data.draw(st.one_of(values, st.tuples(*[values] * dimensions)))


def spread(setting: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    return (setting,) * dimensions if isinstance(setting, int) else setting


@settings(max_examples=100)
@given(st.data(), st.sampled_from(FIXED_POOLS), st.sampled_from(GRIDS), st.sampled_from(BATCHES))
def test_windows_of_every_kind(
    data: st.DataObject,
    kind: type[nn.Module],
    grids: tuple[QuantizationParameters, QuantizationParameters],
    batch: tuple[int, ...],
) -> None:
    dimensions = FIXED_POOLS.index(kind) + 1
    kernel = per_axis(data, st.integers(1, 4), dimensions)
    stride = data.draw(st.none()) or per_axis(data, st.integers(1, 5), dimensions)
    padding = per_axis(data, st.integers(0, 2), dimensions)
    sizes = data.draw(st.tuples(*[st.integers(1, 9)] * dimensions))
    kernels, paddings = spread(kernel, dimensions), spread(padding, dimensions)
    assume(all(2 * pad <= length for pad, length in zip(paddings, kernels, strict=True)))
    padded = 0 if dimensions == 3 else 2  # in three dimensions PyTorch counts no padding here
    assume(all(n + padded * pad >= k for n, pad, k in zip(sizes, paddings, kernels, strict=True)))
    options: dict[str, Any] = {"ceil_mode": data.draw(st.booleans()), "count_include_pad": data.draw(st.booleans())}
    if dimensions > 1:
        options["divisor_override"] = data.draw(st.sampled_from([None, None, 1, 3, 10]))
    check(kind(kernel, stride, padding, **options), random_codes(grids[0], (*batch, *sizes)), *grids)


@pytest.mark.parametrize("kind", FIXED_POOLS)
@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 1), (3, 2, 1), (2, 3, 1), (3, 3, 1), (3, 2, 0)])
def test_windows_that_hang_over(
    kind: type[nn.Module], count_include_pad: bool, kernel: int, stride: int, padding: int
) -> None:
    """In ``ceil_mode``; a window that would begin in the padding behind the image is none."""
    pooling = kind(kernel, stride, padding, ceil_mode=True, count_include_pad=count_include_pad)
    for size in range(kernel, kernel + 4):
        check(pooling, random_codes(GRIDS[0][0], (2, 3, *(size,) * (FIXED_POOLS.index(kind) + 1))))


@settings(max_examples=100)
@given(st.data(), st.sampled_from(ADAPTIVE_POOLS), st.sampled_from(GRIDS), st.sampled_from(BATCHES))
def test_windows_to_a_number_of_results(
    data: st.DataObject,
    kind: type[nn.Module],
    grids: tuple[QuantizationParameters, QuantizationParameters],
    batch: tuple[int, ...],
) -> None:
    """Dividing the sizes or not, up to more results than values."""
    dimensions = ADAPTIVE_POOLS.index(kind) + 1
    wanted = st.one_of(st.none(), st.integers(1, 7))
    one = st.integers(1, 7)
    targets = data.draw(st.one_of(one, st.tuples(*[wanted if dimensions > 1 else one] * dimensions)))
    sizes = data.draw(st.tuples(*[st.integers(1, 9)] * dimensions))
    check(kind(targets), random_codes(grids[0], (*batch, *sizes)), *grids)


@given(st.data(), st.sampled_from(GRIDS), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_means(
    data: st.DataObject,
    grids: tuple[QuantizationParameters, QuantizationParameters],
    shape: list[int],
    keepdim: bool,
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    dims = tuple(dim - len(shape) if data.draw(st.booleans()) else dim for dim in chosen)
    check(Mean(dims, keepdim), random_codes(grids[0], tuple(shape)), *grids)


def test_a_mean_of_everything_has_no_dimensions() -> None:
    codes = random_codes(GRIDS[0][0], (3, 4))
    result = Int8Operation(AveragePooling(Mean((0, 1), False)), GRIDS[0][:1], GRIDS[0][1])(codes)
    assert result.shape == ()


@pytest.mark.parametrize("divisor", [1, 2, 7, 1000])
@pytest.mark.parametrize("kind", FIXED_POOLS[1:])
def test_a_divisor_of_the_users(kind: type[nn.Module], divisor: int) -> None:
    dimensions = FIXED_POOLS.index(kind) + 1
    pooling = kind(2, 1, 1, divisor_override=divisor)
    check(pooling, random_codes(GRIDS[0][0], (2, 3, *(5,) * dimensions)))


@pytest.mark.parametrize("pooling", [nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d((3, 4)), Mean((1, 3), True)], ids=str)
def test_any_memory_format(pooling: nn.Module) -> None:
    codes = random_codes(GRIDS[0][0], (2, 5, 9, 7))
    average = Int8Operation(AveragePooling(pooling), GRIDS[0][:1], GRIDS[0][1])
    expected = average(codes)
    assert torch.equal(average(codes.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(average(codes.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize(
    "pooling", [nn.AvgPool2d(1024), nn.AdaptiveAvgPool2d(1), Mean((2, 3), True), nn.AvgPool1d(1024 * 1024)], ids=str
)
def test_sums_are_exact_beyond_float32(pooling: nn.Module) -> None:
    """A million codes sum to more than 2**24, where float32 has no odd numbers."""
    codes = torch.full((1, 1, 1024, 1024), 201, dtype=torch.uint8)
    codes = codes.flatten(2) if isinstance(pooling, nn.AvgPool1d) else codes
    one = grid(1.0, 0)
    assert Int8Operation(AveragePooling(pooling), [one], one)(codes).item() == 201


def test_ties_round_to_the_even_step() -> None:
    """The zero point is added after rounding, as for layers, and not before, as for products."""
    codes = torch.tensor([[[100 + n, 100] for n in range(-5, 6)]], dtype=torch.uint8).view(1, 1, 11, 2)
    result = Int8Operation(AveragePooling(nn.AvgPool2d((1, 2))), [grid(0.5, 100)], grid(0.5, 101))(codes)
    assert (result.flatten().int() - 101).tolist() == [round(n / 2) for n in range(-5, 6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "pooling", [nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(1), Mean((2, 3), False)], ids=str
)
def test_autocast_changes_no_code(pooling: nn.Module, dtype: torch.dtype) -> None:
    codes = random_codes(GRIDS[0][0], (2, 3, 31, 33))
    average = Int8Operation(AveragePooling(pooling), GRIDS[0][:1], GRIDS[0][1])
    expected = average(codes)
    with torch.autocast("cpu", dtype):
        assert torch.equal(average(codes), expected)


@pytest.mark.parametrize("kind", POOLS)
def test_on_values_it_is_the_users_module(kind: type[nn.Module]) -> None:
    pooling, calls = kind(2), []
    pooling.register_forward_hook(lambda module, args, output: calls.append(output))
    values = torch.randn(2, 3, *(6,) * (POOLS.index(kind) % 3 + 1))
    operation = AveragePooling(pooling)
    result = operation.on_values(values)
    assert operation.modules() == (pooling,)
    assert len(calls) == 1
    assert result is calls[0]


@pytest.mark.parametrize("kind", POOLS)
def test_hooks_of_the_users_module_see_no_codes(kind: type[nn.Module]) -> None:
    pooling, calls = kind(2), []
    pooling.register_forward_hook(lambda module, args, output: calls.append(output))
    check_codes = random_codes(GRIDS[0][0], (2, 3, *(6,) * (POOLS.index(kind) % 3 + 1)))
    Int8Operation(AveragePooling(pooling), GRIDS[0][:1], GRIDS[0][1])(check_codes)
    assert not calls


def test_it_is_a_mean_in_any_way_written() -> None:
    """Four ways to state the same averages give the same codes."""
    codes = random_codes(GRIDS[0][0], (4, 6, 5, 7))
    ways = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((5, 7)), Mean((2, 3), True), Mean((-1, -2), True)]
    results = [Int8Operation(AveragePooling(way), GRIDS[0][:1], GRIDS[0][1])(codes) for way in ways]
    assert all(torch.equal(result, results[0]) for result in results)
    assert math.prod(results[0].shape) == 24


def test_window_sizes_are_exact_where_float32_would_round() -> None:
    size, target = 48000, 4097
    codes = torch.zeros(1, 1, size, dtype=torch.uint8)
    _, counts = AveragePooling(nn.AdaptiveAvgPool1d(target))._sums_and_counts(codes, torch.zeros((), dtype=torch.int32))
    edges = [Fraction(index * size, target) for index in range(target + 1)]
    assert counts.tolist() == [math.ceil(end) - math.floor(start) for start, end in pairwise(edges)]
