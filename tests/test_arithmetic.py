"""The arithmetic against references of its own: Python's fractions, and NumPy's float32 one operation at a time."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mlframework.quantization import QuantizationScheme, arithmetic

BOTH = (False, True)
ALL_GRIDS = [
    QuantizationScheme(bits, signed, symmetric, narrow)
    for bits, signed, symmetric, narrow in itertools.product(range(2, 9), BOTH, BOTH, BOTH)
]
GRIDS = st.sampled_from(ALL_GRIDS)
# Any float32 between the smallest and the largest scale, all magnitudes alike.
SCALES = st.builds(lambda mantissa, power: mantissa * 2.0**power, st.floats(1, 1.9375, width=32), st.integers(-40, 39))
STEPS = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ENDS = st.floats(-(2.0**20), 2.0**20, width=32)
ACCUMULATORS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20)
RATIOS = st.floats(2.0**-7, 8.0, width=32)
INT8 = st.lists(st.integers(-128, 127), min_size=4, max_size=4)


def float32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def zero_points(scheme: QuantizationScheme) -> st.SearchStrategy[int]:
    return st.integers(scheme.quant_min, scheme.quant_max)


def round_half_even_and_saturate(quotient: Fraction, zero_point: int, scheme: QuantizationScheme) -> int:
    return min(max(round(quotient) + zero_point, scheme.quant_min), scheme.quant_max)


# quantize and dequantize


@given(st.data(), GRIDS, st.lists(FINITE, min_size=1, max_size=20), st.integers(-40, 40))
def test_quantize_is_exact_where_the_division_is(
    data: st.DataObject, scheme: QuantizationScheme, values: list[float], power: int
) -> None:
    zero_point = data.draw(zero_points(scheme))
    codes = arithmetic.quantize_values(float32(*values), float32(2.0**power), torch.tensor([zero_point]), scheme)
    step = Fraction(2) ** power
    assert codes.tolist() == [round_half_even_and_saturate(Fraction(x) / step, zero_point, scheme) for x in values]
    assert codes.dtype is scheme.dtype


@given(st.data(), GRIDS, STEPS, SCALES)
def test_quantize_divides_in_float32(
    data: st.DataObject, scheme: QuantizationScheme, steps: list[float], scale: float
) -> None:
    zero_point = data.draw(zero_points(scheme))
    values = np.array(steps, np.float32) * np.float32(scale)
    codes = arithmetic.quantize_values(
        torch.from_numpy(values), float32(scale), torch.tensor([float(zero_point)]), scheme
    )
    expected = np.clip(np.rint(values / np.float32(scale)) + zero_point, scheme.quant_min, scheme.quant_max)
    assert codes.tolist() == expected.tolist()


@pytest.mark.parametrize("zero_point", [0, 1, 7])
def test_ties_round_to_the_even_multiple(zero_point: int) -> None:
    halves = torch.arange(-5, 6) + 0.5
    codes = arithmetic.quantize_values(halves * 0.25, float32(0.25), torch.tensor([zero_point]), QuantizationScheme())
    assert (codes - zero_point).tolist() == [-4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6]


def test_float64_keeps_its_digits() -> None:
    just_above_a_tie = torch.tensor([0.5 + 1e-12], dtype=torch.float64)
    scheme = QuantizationScheme()
    assert arithmetic.quantize_values(just_above_a_tie, float32(1.0), torch.tensor([0]), scheme).item() == 1
    assert arithmetic.quantize_values(just_above_a_tie.float(), float32(1.0), torch.tensor([0]), scheme).item() == 0


@pytest.mark.parametrize("scheme", ALL_GRIDS, ids=str)
def test_huge_values_saturate(scheme: QuantizationScheme) -> None:
    largest = torch.finfo(torch.float32).max
    values = float32(-torch.inf, -largest, largest, torch.inf)
    for scale in (arithmetic.SMALLEST_SCALE, 1.0, arithmetic.LARGEST_SCALE):
        codes = arithmetic.quantize_values(values, float32(scale), torch.tensor([scheme.quant_max]), scheme)
        assert codes.tolist() == [scheme.quant_min] * 2 + [scheme.quant_max] * 2


@given(st.data(), GRIDS, SCALES)
def test_codes_come_back_from_their_float32_values(
    data: st.DataObject, scheme: QuantizationScheme, scale: float
) -> None:
    zero_point = torch.tensor([data.draw(zero_points(scheme))])
    codes = torch.arange(scheme.quant_min, scheme.quant_max + 1).to(scheme.dtype)
    values = arithmetic.dequantize_codes(codes, float32(scale), zero_point, None)
    assert values.dtype is torch.float32
    assert torch.equal(arithmetic.quantize_values(values, float32(scale), zero_point, scheme), codes)


@given(GRIDS, SCALES)
def test_dequantize_rounds_once(scheme: QuantizationScheme, scale: float) -> None:
    codes = torch.arange(scheme.quant_min, scheme.quant_max + 1).to(scheme.dtype)
    values = arithmetic.dequantize_codes(codes, float32(scale), torch.tensor([scheme.quant_max]), None)
    # The product of an 8-bit integer and a float32 is exact in float64.
    exact = (np.arange(scheme.quant_min, scheme.quant_max + 1) - scheme.quant_max) * np.float64(np.float32(scale))
    assert values.tolist() == exact.astype(np.float32).tolist()


@pytest.mark.parametrize(("learned", "code"), [(2.5, 2), (3.5, 4), (-0.4, 0), (300.0, 15), (-7.0, 0)])
def test_a_learned_zero_point_stands_for_a_code(learned: float, code: int) -> None:
    assert arithmetic.grid_zero_point(float32(learned), QuantizationScheme(4, signed=False)).item() == code


@given(GRIDS, SCALES, st.one_of(FINITE, st.sampled_from([-np.inf, np.inf])))
def test_code_of_one_value(scheme: QuantizationScheme, scale: float, value: float) -> None:
    zero_point = torch.tensor([scheme.quant_min + 1])
    code = arithmetic.code_of_value(value, float32(scale), zero_point, scheme)
    assert code.item() == arithmetic.quantize_values(float32(value), float32(scale), zero_point, scheme).item()


# From ranges to grids


@given(GRIDS, ENDS, ENDS)
def test_grid_covers_its_range(scheme: QuantizationScheme, first: float, second: float) -> None:
    minimum, maximum = min(first, second, 0.0), max(first, second, 0.0)
    if scheme.symmetric and not scheme.signed:
        minimum = 0.0  # such a grid has no negative values: they saturate by definition
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(float32(minimum), float32(maximum), scheme)
    s, z = scale.item(), zero_point.item()
    # An affine zero point is rounded to a code, which moves the grid by up to half a step. The roundings of the
    # scale and of min / scale are 2**-22 of up to 2**8 steps together.
    slack = s * ((0.0 if scheme.symmetric else 0.5) + 2.0**-14)
    assert (scheme.quant_min - z) * s - slack <= minimum
    assert maximum <= (scheme.quant_max - z) * s + slack


@given(GRIDS, ENDS, ENDS)
def test_grid_is_no_coarser_than_it_must_be(scheme: QuantizationScheme, first: float, second: float) -> None:
    minimum, maximum = min(first, second, 0.0), max(first, second, 0.0)
    scale, _ = arithmetic.range_to_scale_and_zero_point(float32(minimum), float32(maximum), scheme)
    zero = scheme.symmetric_zero_point
    if not scheme.symmetric:
        exact = (maximum - minimum) / (scheme.quant_max - scheme.quant_min)
    elif scheme.signed:
        exact = max(maximum / scheme.quant_max, minimum / scheme.quant_min)
    else:
        exact = maximum / (scheme.quant_max - zero)
    # Two float32 roundings; ranges too small for a normal scale get the smallest one, those of no width get 1.
    assert scale.item() <= max(exact * (1 + 2.0**-22), arithmetic.SMALLEST_SCALE) or scale.item() == 1.0
    assert scale.item() == 1.0 or scale.item() >= exact * (1 - 2.0**-22)


@given(GRIDS, FINITE, FINITE)
def test_any_range_gives_a_valid_grid_with_an_exact_zero(
    scheme: QuantizationScheme, first: float, second: float
) -> None:
    minimum, maximum = float32(min(first, second)), float32(max(first, second))
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(minimum, maximum, scheme)
    assert arithmetic.SMALLEST_SCALE <= scale.item() <= arithmetic.LARGEST_SCALE
    assert scheme.quant_min <= zero_point.item() <= scheme.quant_max
    assert zero_point.item() == round(zero_point.item())
    if scheme.symmetric:
        assert zero_point.item() == scheme.symmetric_zero_point
    code = arithmetic.quantize_values(float32(0.0), scale, zero_point, scheme)
    assert code.item() == zero_point.item()
    assert arithmetic.dequantize_codes(code, scale, zero_point, None).item() == 0.0


@pytest.mark.parametrize("scheme", ALL_GRIDS, ids=str)
def test_ranges_without_width(scheme: QuantizationScheme) -> None:
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(torch.zeros(2), torch.zeros(2), scheme)
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [scheme.symmetric_zero_point if scheme.symmetric else scheme.quant_min] * 2


@pytest.mark.parametrize("scheme", ALL_GRIDS, ids=str)
@pytest.mark.parametrize("constant", [-3.7, 0.1, 5.0])
def test_a_constant_is_a_code(scheme: QuantizationScheme, constant: float) -> None:
    if constant < 0 and scheme.symmetric and not scheme.signed:
        constant = -constant  # such a grid holds no negative values
    value = float32(constant)
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(value, value, scheme)
    code = arithmetic.quantize_values(value, scale, zero_point, scheme)
    restored = arithmetic.dequantize_codes(code, scale, zero_point, None)
    # The ends of a grid differ from the range's by the rounding of the scale and of the product.
    torch.testing.assert_close(restored, value, rtol=2.0**-22, atol=0.0)


def test_range_ends_beyond_float32() -> None:
    huge = torch.tensor([1e300], dtype=torch.float64)
    scale, zero_point = arithmetic.range_to_scale_and_zero_point(-huge, huge, QuantizationScheme(symmetric=False))
    assert scale.item() == arithmetic.LARGEST_SCALE
    assert -128 <= zero_point.item() <= 127


# The epilogue of integer layers


@given(st.data(), ACCUMULATORS, GRIDS, st.floats(2.0**-20, 1.0, width=32), SCALES)
def test_requantize_is_the_formula_of_onnx_runtime(
    data: st.DataObject, sums: list[int], scheme: QuantizationScheme, accumulator_scale: float, output_scale: float
) -> None:
    zero_point = data.draw(zero_points(scheme))
    lowest = data.draw(st.sampled_from([scheme.quant_min, zero_point]))
    multiplier = np.float32(accumulator_scale) / np.float32(output_scale)
    codes = arithmetic.requantize_accumulator(
        torch.tensor(sums, dtype=torch.int32),
        float32(accumulator_scale) / float32(output_scale),
        zero_point,
        lowest,
        scheme.quant_max,
        scheme.dtype,
    )
    scaled = np.array(sums, np.int32).astype(np.float32) * multiplier
    expected = np.rint(np.clip(scaled, lowest - zero_point, scheme.quant_max - zero_point)) + zero_point
    assert codes.tolist() == expected.tolist()
    assert codes.dtype is scheme.dtype


@given(st.lists(st.integers(-600, 600), min_size=1), st.integers(0, 255))
def test_requantize_rounds_ties_before_the_zero_point(sums: list[int], zero_point: int) -> None:
    scheme = QuantizationScheme(signed=False, symmetric=False)
    codes = arithmetic.requantize_accumulator(
        torch.tensor(sums, dtype=torch.int32), float32(0.5), zero_point, 0, 255, torch.uint8
    )
    assert codes.tolist() == [round_half_even_and_saturate(Fraction(x, 2), zero_point, scheme) for x in sums]


def test_requantize_leaves_a_float_accumulator_alone() -> None:
    sums = float32(1.0, 2.0)
    arithmetic.requantize_accumulator(sums, float32(100.0), 0, -128, 127, torch.int8)
    assert sums.tolist() == [1.0, 2.0]


@given(ACCUMULATORS, SCALES)
def test_float_result(sums: list[int], scale: float) -> None:
    values = arithmetic.rescale_accumulator(torch.tensor(sums, dtype=torch.int32), float32(scale))
    assert values.tolist() == (np.array(sums, np.int32).astype(np.float32) * np.float32(scale)).tolist()


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1), st.floats(2.0**-20, 1.0, width=32))
def test_bias_codes(bias: list[float], accumulator_scale: float) -> None:
    codes = arithmetic.quantize_bias(float32(*bias), float32(accumulator_scale))
    quotients = np.array(bias, np.float32) / np.float32(accumulator_scale)
    assert codes.tolist() == [round(Fraction(float(quotient))) for quotient in quotients]
    assert codes.dtype is torch.int32


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 1), (1, 2), (3, 4), (1, 128), (1, 2**30)])
def test_rescaled_codes(numerator: int, denominator: int) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    rescaled = arithmetic.rescale_codes(codes, torch.tensor(numerator / denominator, dtype=torch.float64))
    assert rescaled.tolist() == [round(Fraction(code * numerator, denominator)) for code in codes.tolist()]
    assert rescaled.dtype is torch.int8


# Operations on codes


def to_float32(exact: Fraction) -> Fraction:
    """The nearest float32, ties to even, of a number of ordinary size."""
    if exact == 0:
        return exact
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return round(exact / unit) * unit


def exact(value: float) -> Fraction:
    """The float32 nearest to a Python number."""
    return to_float32(Fraction(value))


@given(st.integers(-255, 255), RATIOS, st.floats(-(2.0**20), 2.0**20, width=32))
def test_a_fused_multiply_add_rounds_once(code: int, factor: float, addend: float) -> None:
    result = arithmetic.fused_multiply_add(torch.tensor([code]), float32(factor), float32(addend))
    assert result.dtype is torch.float32
    assert result.item() == to_float32(code * Fraction(factor) + Fraction(addend))


def test_a_fused_multiply_add_is_not_two_roundings() -> None:
    fused = arithmetic.fused_multiply_add(torch.tensor([255]), float32(1 + 2.0**-23), float32(-255.0))
    assert fused.item() == 255 * 2.0**-23
    assert (float32(255.0) * float32(1 + 2.0**-23) - 255).item() == 256 * 2.0**-23


@given(INT8, INT8, st.tuples(*[st.integers(-128, 127)] * 3), st.tuples(*[RATIOS] * 3))
def test_add_is_the_formula_of_onnx_runtime(
    left: list[int], right: list[int], offsets: tuple[int, int, int], scales: tuple[float, float, float]
) -> None:
    tensors = [torch.tensor([offset], dtype=torch.int32) for offset in offsets]
    constants = arithmetic.add_constants(
        float32(scales[0]), tensors[0], float32(scales[1]), tensors[1], float32(scales[2]), tensors[2]
    )
    sa, sb, sy = map(Fraction, scales)
    ra, rb = to_float32(sa / sy), to_float32(sb / sy)
    c = to_float32(offsets[2] - to_float32(offsets[0] * ra + to_float32(rb * offsets[1])))
    assert [constant.item() for constant in constants] == [ra, rb, c]
    codes = arithmetic.add_codes(
        torch.tensor(left, dtype=torch.int8),
        constants[0],
        torch.tensor(right, dtype=torch.int8),
        constants[1],
        constants[2],
        torch.tensor([-100]),
        torch.tensor([90]),
        torch.int8,
    )
    totals = [to_float32(a * ra + to_float32(b * rb + c)) for a, b in zip(left, right, strict=True)]
    assert codes.tolist() == [min(max(round(total), -100), 90) for total in totals]
    assert codes.dtype is torch.int8


@given(INT8, INT8)
def test_add_of_equal_grids_adds_integers(left: list[int], right: list[int]) -> None:
    one, zero = float32(0.3), torch.tensor([0])
    ratios = arithmetic.add_constants(one, zero, one, zero, one, zero)
    assert [ratio.item() for ratio in ratios] == [1.0, 1.0, 0.0]
    codes = arithmetic.add_codes(
        torch.tensor(left, dtype=torch.int8),
        ratios[0],
        torch.tensor(right, dtype=torch.int8),
        ratios[1],
        ratios[2],
        torch.tensor([-128]),
        torch.tensor([127]),
        torch.int8,
    )
    assert codes.tolist() == [min(max(a + b, -128), 127) for a, b in zip(left, right, strict=True)]


@given(INT8, INT8, st.tuples(*[st.integers(-128, 127)] * 3), st.tuples(*[RATIOS] * 3))
def test_multiply_is_the_formula_of_onnx_runtime(
    left: list[int], right: list[int], offsets: tuple[int, int, int], scales: tuple[float, float, float]
) -> None:
    za, zb, zy = offsets
    ratio = arithmetic.multiply_ratio(*(float32(scale) for scale in scales))
    m = to_float32(to_float32(Fraction(scales[0]) * Fraction(scales[1])) / Fraction(scales[2]))
    assert ratio.item() == m
    codes = arithmetic.multiply_codes(
        torch.tensor(left, dtype=torch.int8),
        float32(za),
        torch.tensor(right, dtype=torch.int8),
        float32(zb),
        ratio,
        torch.tensor([zy], dtype=torch.int32),
        -100,
        90,
        torch.int8,
    )
    # The zero point is added before rounding: a tie goes to the even code, not to the even multiple.
    totals = [to_float32(to_float32((a - za) * (b - zb) * m) + zy) for a, b in zip(left, right, strict=True)]
    assert codes.tolist() == [min(max(round(total), -100), 90) for total in totals]
    assert codes.dtype is torch.int8


@given(RATIOS, RATIOS, st.integers(1, 2**20))
def test_the_multiplier_of_an_average_divides_once(input_scale: float, output_scale: float, count: int) -> None:
    multiplier = arithmetic.average_multiplier(float32(input_scale), float32(output_scale), torch.tensor([count]))
    assert multiplier.item() == to_float32(Fraction(input_scale) / to_float32(Fraction(output_scale) * count))


# Tables


@given(st.data(), GRIDS, GRIDS, SCALES, st.floats(2.0**-10, 2.0**10, width=32))
def test_the_table_of_the_identity_brings_codes_to_another_grid(
    data: st.DataObject, source: QuantizationScheme, target: QuantizationScheme, scale: float, ratio: float
) -> None:
    points = [torch.tensor([data.draw(zero_points(scheme))], dtype=torch.int32) for scheme in (source, target)]
    scales = float32(scale), float32(scale * ratio).clamp(arithmetic.SMALLEST_SCALE, arithmetic.LARGEST_SCALE)
    table = arithmetic.lookup_table(None, scales[0], points[0], source, scales[1], points[1], target)
    codes = torch.arange(-128, 128) if source.signed else torch.arange(256)
    values = arithmetic.dequantize_codes(codes, scales[0], points[0], None)
    assert table.tolist() == arithmetic.quantize_values(values, scales[1], points[1], target).tolist()
    assert table.dtype is target.dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_the_function_of_a_table_sees_float64_values(autocast: bool) -> None:
    seen: list[Tensor] = []

    def function(values: Tensor) -> Tensor:
        seen.append(values)
        return values @ torch.eye(256, dtype=torch.float64)

    scheme, scale = QuantizationScheme(signed=False), float32(0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        table = arithmetic.lookup_table(function, scale, float32(3.0), scheme, scale, float32(3.0), scheme)
    assert seen[0].dtype is torch.float64
    assert seen[0].tolist() == [to_float32(exact(0.1) * (code - 3)) for code in range(256)]
    assert table.tolist() == list(range(256))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(256,), (4, 8, 8), (0, 3), ()], ids=str)
def test_entries_are_found_by_code(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ends = torch.iinfo(dtype)
    table = torch.randperm(256).to(torch.uint8)
    codes = torch.randint(ends.min, ends.max + 1, shape, dtype=dtype)
    if shape == (256,):
        codes = torch.arange(ends.min, ends.max + 1).to(dtype)
    entries = arithmetic.look_up(codes, table)
    assert entries.shape == shape
    assert entries.flatten().tolist() == [table[code - ends.min].item() for code in codes.flatten().tolist()]


@given(st.data(), GRIDS, SCALES, FINITE, FINITE)
def test_a_clip_saturates_at_the_codes_of_its_ends(
    data: st.DataObject, scheme: QuantizationScheme, scale: float, first: float, second: float
) -> None:
    zero_point = torch.tensor([data.draw(zero_points(scheme))])
    ends = min(first, second), max(first, second)
    lowest, highest = arithmetic.codes_of_clip(ends, float32(scale), zero_point, scheme)
    expected = arithmetic.quantize_values(float32(*ends), float32(scale), zero_point, scheme)
    assert [lowest.item(), highest.item()] == expected.tolist()


@pytest.mark.parametrize("scheme", ALL_GRIDS, ids=str)
def test_a_clip_without_ends_is_the_grid(scheme: QuantizationScheme) -> None:
    zero_point = torch.tensor([scheme.quant_max], dtype=torch.int32)
    lowest, highest = arithmetic.codes_of_clip((-np.inf, np.inf), float32(0.1), zero_point, scheme)
    assert (lowest.item(), highest.item()) == (scheme.quant_min, scheme.quant_max)
    relu = arithmetic.codes_of_clip((0.0, np.inf), float32(0.1), zero_point, scheme)
    assert [end.item() for end in relu] == [scheme.quant_max, scheme.quant_max]


# Shapes


@pytest.mark.parametrize(("axis", "shape"), [(None, (1, 1, 1)), (0, (4, 1, 1)), (2, (1, 1, 4))])
def test_values_along_an_axis(axis: int | None, shape: tuple[int, ...]) -> None:
    values = torch.arange(1 if axis is None else 4)
    assert arithmetic.along_axis(values, 3, axis).shape == shape
