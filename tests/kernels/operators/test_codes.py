"""Compiled operations on codes against the formulas, bit for bit, however the tensors lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from example_codes import DTYPES, SIGNED, UNSIGNED, every_code, layouts, random_codes
from example_operators import assert_same, on_reference
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.kernels.operators.codes import lookup_gradient

SHAPES = [(), (0,), (1,), (7,), (64,), (3, 0, 5), (5, 17), (2, 3, 5), (2, 16, 3, 5), (1, 33, 4, 4), (2, 3, 2, 3, 2)]
SHAPE_LISTS = st.lists(st.integers(0, 9), max_size=5).map(tuple)
LARGE = (3, 70, 40, 40)  # enough for several threads


def scheme_of(dtype: torch.dtype, bits: int = 8) -> QuantizationScheme:
    return QuantizationScheme(bits=bits, signed=dtype is SIGNED, symmetric=False)


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([value], dtype=dtype)


# Quantize and dequantize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    scheme = scheme_of(dtype, bits)
    scale, zero_point = number(0.037), number(scheme.quant_min + 1, torch.int32)
    for values in layouts(torch.randn(shape) * 0.037 * 2**bits).values():
        expected = arithmetic.quantize_values(values, scale, zero_point, scheme)
        assert_same(kernels.quantize(values, scale, zero_point, scheme), expected)
        assert_same(on_reference(kernels.quantize, values, scale, zero_point, scheme), expected)


def test_quantize_divides() -> None:
    # Close to ties, some round differently when multiplied by the reciprocal.
    scale, zero_point = number(0.1), number(0, torch.int32)
    ties = (torch.arange(-120, 120) + 0.5) * scale
    values = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    codes = kernels.quantize(values, scale, zero_point, scheme_of(SIGNED))
    assert_same(codes, (values / scale).round().to(SIGNED))
    assert not torch.equal(codes, (values * (1 / scale)).round().to(SIGNED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_of_ties_and_of_what_saturates(dtype: torch.dtype) -> None:
    scheme = scheme_of(dtype)
    values = torch.cat(
        [torch.arange(-300, 300) + 0.5, torch.tensor([-torch.inf, torch.inf, 3e38, -3e38, 2.0**31, -(2.0**31), -0.0])]
    )
    for zero_point in (scheme.quant_min, 0, 1, scheme.quant_max):
        expected = arithmetic.quantize_values(values, number(1.0), number(zero_point), scheme)
        assert_same(kernels.quantize(values, number(1.0), number(zero_point), scheme), expected)


def test_quantize_of_other_dtypes_and_of_channels() -> None:
    values = torch.randn(4, 3)
    scheme = scheme_of(SIGNED)
    per_channel = QuantizationScheme(channel_axis=1)
    scales, zero_points = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int32)
    assert_same(
        kernels.quantize(values, scales, zero_points, per_channel),
        arithmetic.quantize_values(values, scales, zero_points, per_channel),
    )
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cast = values.to(dtype)
        assert_same(
            kernels.quantize(cast, number(0.1), number(0, torch.int64), scheme),
            arithmetic.quantize_values(cast, number(0.1), number(0, torch.int64), scheme),
        )


def test_quantize_takes_values_that_require_grad() -> None:
    values = torch.randn(5, requires_grad=True)
    codes = kernels.quantize(values, number(0.1), number(0, torch.int32), scheme_of(SIGNED))
    assert not codes.requires_grad
    assert_same(codes, kernels.quantize(values.detach(), number(0.1), number(0, torch.int32), scheme_of(SIGNED)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale, zero_point = number(0.037), number(5, torch.int32)
    for codes in layouts(random_codes(shape, dtype)).values():
        expected = arithmetic.dequantize_codes(codes, scale, zero_point, None)
        assert_same(kernels.dequantize(codes, scale, zero_point, None), expected)
        assert_same(on_reference(kernels.dequantize, codes, scale, zero_point, None), expected)


def test_a_scale_that_learns_keeps_its_gradient() -> None:
    scale = number(0.5).requires_grad_()
    kernels.dequantize(every_code(SIGNED), scale, number(0), None).sum().backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert scale.grad.item() == every_code(SIGNED).sum()


# Tables


@pytest.mark.parametrize("entries", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (257,), LARGE])
def test_lookup(shape: tuple[int, ...], dtype: torch.dtype, entries: torch.dtype) -> None:
    table = random_codes((256,), entries)
    for codes in layouts(random_codes(shape, dtype)).values():
        expected = arithmetic.look_up(codes, table)
        assert_same(kernels.lookup(codes, table), expected)
        assert_same(on_reference(kernels.lookup, codes, table), expected)
    assert_same(kernels.lookup(every_code(dtype), table), table)


def test_lookup_in_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="table must be contiguous and hold 256 codes"):
        kernels.lookup(every_code(SIGNED), torch.zeros(255, dtype=SIGNED))


# Sums


def add_arguments(left: Tensor, right: Tensor, ratios: tuple[float, float], constant: float) -> tuple[Any, ...]:
    return left, number(ratios[0]), right, number(ratios[1]), number(constant)


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("right_dtype", DTYPES)
@pytest.mark.parametrize("left_dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[1:], (300,)])
def test_add(shape: tuple[int, ...], left_dtype: torch.dtype, right_dtype: torch.dtype, result: torch.dtype) -> None:
    ends = torch.iinfo(result)
    lefts, rights = layouts(random_codes(shape, left_dtype)), layouts(random_codes(shape, right_dtype))
    for (name, left), right in zip(lefts.items(), [*list(rights.values())[1:], rights["contiguous"]], strict=True):
        for other in (right, rights[name]):
            arguments = (*add_arguments(left, other, (0.53, 1.21), 3.7), ends.min + 3, ends.max, result)
            expected = arithmetic.add_codes(*arguments)
            assert_same(kernels.add(*arguments), expected)
            assert_same(on_reference(kernels.add, *arguments), expected)


@given(SHAPE_LISTS, st.data())
def test_add_broadcasts(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Any axis of either operand may be of size 1, and the first ones may be absent."""
    # (The formulas' constants are of shape (1,), and so is what they make of no dimensions.)
    shape = (*shape, 5)
    left, right = (
        tuple(1 if data.draw(st.booleans()) else size for size in shape)[data.draw(st.integers(0, len(shape) - 1)) :]
        for _ in range(2)
    )
    arguments = (*add_arguments(random_codes(left, SIGNED), random_codes(right, UNSIGNED), (0.5, 0.25), -9.0),)
    assert_same(kernels.add(*arguments, 0, 255, UNSIGNED), arithmetic.add_codes(*arguments, 0, 255, UNSIGNED))


def test_add_of_all_pairs_of_codes_at_any_ratio() -> None:
    """Ratios down to where float64 does not hold the sums exactly, which takes a path of its own."""
    left, right = every_code(UNSIGNED).repeat_interleave(256), every_code(SIGNED).repeat(256)
    for exponent in range(-40, 12, 3):
        for constant in (0.0, 0.5, -1e-12, 127.25, 3e7):
            arguments = (*add_arguments(left, right, (2.0**exponent * 1.1, 0.5), constant), 0, 255, UNSIGNED)
            assert_same(kernels.add(*arguments), arithmetic.add_codes(*arguments))


def test_add_rounds_half_to_even_and_multiplies_and_adds_at_once() -> None:
    left = every_code(UNSIGNED)
    arguments = (*add_arguments(left, left, (0.25, 0.25), 0.0), 0, 255, UNSIGNED)
    assert_same(kernels.add(*arguments), (left / 2).round().to(UNSIGNED))


def test_add_that_does_not_broadcast_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must broadcast, got sizes 3 and 4 in dimension -1"):
        kernels.add(
            *add_arguments(random_codes((2, 3), SIGNED), random_codes((2, 4), SIGNED), (1, 1), 0), 0, 255, UNSIGNED
        )


# Requantize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5, 17), (2, 0, 3), (4, 1, 3), (2, 16, 3, 5), (1, 33, 4, 4), (2, 3, 2, 3, 2)])
def test_requantize(shape: tuple[int, ...], floats: bool, dtype: torch.dtype) -> None:
    scheme = scheme_of(dtype)
    sums = torch.randint(-50_000, 50_000, shape, dtype=torch.int32)
    for axis in range(-1, len(shape)):
        channels = shape[axis]
        bias = torch.randint(-5000, 5000, (channels,), dtype=torch.int32)
        biases = [None, bias, bias[:1], bias.float()] if floats else [None, bias, bias[:1]]
        for multiplier in (torch.rand(channels) * 1e-2, number(0.003)):
            for layout in layouts(sums.float() if floats else sums).values():
                for b in biases:
                    arguments = (layout, b, multiplier, scheme.quant_min + 9, scheme.quant_min + 2, 100, dtype, axis)
                    expected = on_reference(kernels.requantize, *arguments)
                    assert_same(kernels.requantize(*arguments), expected)


def test_requantize_keeps_how_channels_last_sums_lie() -> None:
    sums = torch.zeros(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    codes = kernels.requantize(sums, None, torch.ones(6), 0, 0, 255, UNSIGNED, 1)
    assert codes.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3, 16, 70])
def test_requantize_adds_an_int32_bias_as_an_integer(channels: int) -> None:
    sums = torch.full((2, channels, 2, 2), 2**24 - 1, dtype=torch.int32)
    bias = torch.full((channels,), 2**24, dtype=torch.int32)
    # 2**25 - 1 is no float32: rounded to even it is 2**25, and only then multiplied.
    arguments = (sums, bias, torch.full((channels,), 127 / 2**25), 0, -128, 127, SIGNED, 1)
    assert (kernels.requantize(*arguments) == 127).all()
    assert_same(kernels.requantize(sums.float(), *arguments[1:]), kernels.requantize(*arguments))


def test_requantize_saturates_at_both_ends_and_rounds_half_to_even() -> None:
    sums = torch.tensor([[-(2**31), 2**31 - 1, 1, 3, 5, -1, -3]], dtype=torch.int32)
    codes = kernels.requantize(sums, None, number(0.5), 7, 0, 255, UNSIGNED, 1)
    assert codes.tolist() == [[0, 255, 7, 9, 9, 7, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(2, 3, dtype=torch.int64)}, "sums must be float32 or int32"),
        ({"multiplier": torch.ones(4)}, "multiplier must hold 1 or 3 numbers, got 4"),
        ({"bias": torch.ones(4)}, "bias must be on the CPU and hold 1 or 3 numbers, got 4"),
        ({"sums": torch.zeros(2, 3, dtype=torch.int32), "bias": torch.ones(3)}, "bias must be int32, or float32 as"),
        ({"dtype": torch.int32}, "dtype must be uint8 or int8"),
        ({"channel_axis": 2}, "channel_axis must lie within 2 dimensions, got 2"),
    ],
)
def test_requantize_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "sums": torch.zeros(2, 3),
        "bias": None,
        "multiplier": torch.ones(3),
        "zero_point": 0,
        "lowest": 0,
        "highest": 255,
        "dtype": UNSIGNED,
        "channel_axis": 1,
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.requantize.overload(**arguments | change)


# Pooling


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_max_pool2d(dtype: torch.dtype, data: st.DataObject) -> None:
    kernel, stride, dilation = (tuple(data.draw(st.integers(1, most)) for _ in range(2)) for most in (4, 3, 2))
    padding = tuple(data.draw(st.integers(0, size // 2)) for size in kernel)
    ceil_mode = data.draw(st.booleans())
    sizes = tuple(data.draw(st.integers(1 + d * (k - 1), 12)) for d, k in zip(dilation, kernel, strict=True))
    shape = (data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 3, 16, 35])), *sizes)
    for codes in layouts(random_codes(shape, dtype)).values():
        arguments: tuple[Any, ...] = (kernel, stride, padding, dilation, ceil_mode)
        expected = F.max_pool2d(codes.to(torch.float32), *arguments).to(dtype)
        assert_same(kernels.max_pool2d(codes, *arguments), expected)
        assert_same(on_reference(kernels.max_pool2d, codes, *arguments), expected)


def test_max_pool2d_keeps_how_codes_lie_and_takes_short_arguments() -> None:
    codes = random_codes((2, 5, 8, 8), UNSIGNED).contiguous(memory_format=torch.channels_last)
    pooled = kernels.max_pool2d(codes, 3)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert_same(pooled, F.max_pool2d(codes.float(), 3).to(UNSIGNED))
    assert_same(kernels.max_pool2d(codes[0], 2, 1), F.max_pool2d(codes[0].float(), 2, 1).to(UNSIGNED))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_never_wins(dtype: torch.dtype) -> None:
    lowest = torch.iinfo(dtype).min
    codes = torch.full((1, 2, 3, 3), lowest, dtype=dtype)
    assert (kernels.max_pool2d(codes, 3, 1, 1) == lowest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 7, 1), (2, 33, 5, 7), (2, 3, 1, 1), (1, 2, 3, 2, 3)]
)
def test_sum_positions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for codes in layouts(random_codes(shape, dtype)).values():
        expected = codes.long().flatten(2).sum(2).to(torch.int32)
        assert_same(kernels.sum_positions(codes), expected)
        assert_same(on_reference(kernels.sum_positions, codes), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 7, 1), (2, 33, 5, 7), (2, 3, 1, 1), (1, 2, 3, 2, 3)])
def test_average_positions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The nearest code to the average, which is on a grid so fine that most of them differ."""
    zero_point, output_zero_point = number(9, torch.int32), number(3, torch.int32)
    for codes in layouts(random_codes(shape, dtype)).values():
        arguments = codes, zero_point, number(0.5), number(0.3), output_zero_point, 0, 255, UNSIGNED
        averages = (codes.double().flatten(2).mean(2) - 9) * 0.5 / 0.3 + 3
        assert ((kernels.average_positions(*arguments) - averages.clamp(0, 255)).abs() <= 0.5001).all()
        assert_same(kernels.average_positions(*arguments), on_reference(kernels.average_positions, *arguments))


# All of them


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads() -> None:
    codes, other = random_codes(LARGE, UNSIGNED), random_codes(LARGE, SIGNED)
    scheme = scheme_of(UNSIGNED)
    last = other.contiguous(memory_format=torch.channels_last)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.quantize, (torch.randn(LARGE), number(0.02), number(100, torch.int32), scheme)),
        (kernels.dequantize, (codes, number(0.02), number(100, torch.int32), None)),
        (kernels.lookup, (last, random_codes((256,), UNSIGNED))),
        (kernels.add, (*add_arguments(codes, other, (0.3, 0.7), 60.0), 0, 255, UNSIGNED)),
        (kernels.add, (*add_arguments(last, last, (0.3, 0.7), 60.0), 0, 255, UNSIGNED)),
        (kernels.requantize, (last.to(torch.int32), None, torch.rand(70), 3, 0, 255, UNSIGNED, 1)),
        (kernels.requantize, (other.float(), torch.rand(70), torch.rand(70), 3, 0, 255, UNSIGNED, 1)),
        (kernels.max_pool2d, (last, 3, 2, 1)),
        (kernels.sum_positions, (last,)),
        (kernels.sum_positions, (codes,)),
    ]
    for operation, arguments in calls:
        assert_same(operation(*arguments), on_reference(operation, *arguments))


# Tables in training


@pytest.mark.parametrize("gradient_clip", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lookup_gradient(shape: tuple[int, ...], dtype: torch.dtype, gradient_clip: float | None) -> None:
    slopes = torch.randn(256)
    lowest = torch.iinfo(dtype).min
    for codes in layouts(random_codes(shape, dtype)).values():
        for gradient in layouts(torch.randn(shape)).values():
            passed = gradient if gradient_clip is None else gradient.clamp(-gradient_clip, gradient_clip)
            expected = passed * slopes[codes.long() - lowest]
            assert_same(lookup_gradient(gradient, codes, slopes, gradient_clip), expected)
            assert_same(on_reference(lookup_gradient, gradient, codes, slopes, gradient_clip), expected)


def test_lookup_gradient_of_nan_is_nan() -> None:
    gradient = torch.tensor([torch.nan, torch.inf, 1.0])
    codes = torch.tensor([0, 255, 7], dtype=UNSIGNED)
    slopes = torch.ones(256)
    for clip in (None, 2.0):
        passed = lookup_gradient(gradient, codes, slopes, clip)
        assert torch.equal(passed.isnan(), gradient.isnan())
        assert passed[1] == (torch.inf if clip is None else clip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_occurring(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lowest = torch.iinfo(dtype).min
    for codes in layouts(random_codes(shape, dtype)).values():
        present = set((codes.long() - lowest).flatten().tolist())
        expected = torch.tensor([place in present for place in range(256)]).to(UNSIGNED)
        assert_same(kernels.occurring(codes), expected)
        assert_same(on_reference(kernels.occurring, codes), expected)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_occurring_on_any_number_of_threads(dtype: torch.dtype) -> None:
    codes = random_codes(LARGE, dtype).clamp_max(90)
    codes.view(-1)[-1] = 91  # in one thread's share alone
    expected = (every_code(dtype) <= 91).to(UNSIGNED)
    assert_same(kernels.occurring(codes), expected)
    gradient, slopes = torch.randn(LARGE), torch.randn(256)
    arguments = (gradient, codes, slopes, None)
    assert_same(lookup_gradient(*arguments), on_reference(lookup_gradient, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.zeros(3)}, "gradient must have the shape of codes"),
        ({"codes": torch.zeros(2, 3)}, "codes must be uint8 or int8"),
        ({"slopes": torch.zeros(255)}, "slopes must be contiguous and hold 256 numbers"),
    ],
)
def test_lookup_gradient_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "gradient": torch.zeros(2, 3),
        "codes": torch.zeros(2, 3, dtype=UNSIGNED),
        "slopes": torch.zeros(256),
        "gradient_clip": None,
    }
    with pytest.raises(RuntimeError, match=message):
        lookup_gradient.overload(**arguments | change)
