"""Compiled fake quantization against the formulas, bit for bit, however the tensors lie."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from example_codes import DTYPES, SIGNED, layouts
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.kernels import native
from mlframework.quantization.kernels.fake_quantization import gradient_scale, pack_mask, unpack_mask

FLOATS = (torch.float32, torch.bfloat16)
# One vector and its neighbours, channels of few and of many elements, rows longer than one period.
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (130,), (3, 0, 5), (5, 17), (2, 3, 4, 5), (3, 4, 33, 5), (2, 70, 9, 9)]
AXES = [(shape, axis) for shape in SHAPES for axis in (None, *range(len(shape)))]
LARGE = (3, 70, 40, 41)  # enough for several threads
RELU = (0.0, math.inf)
RELU6 = (0.0, 6.0)
UNBOUNDED = (-math.inf, math.inf)


def parameters(channels: int, dtype: torch.dtype = SIGNED) -> tuple[Tensor, Tensor, int, int]:
    """Scales, fractional zero points of which some lie off the grid, and the grid."""
    ends = torch.iinfo(dtype)
    return torch.rand(channels) * 0.05 + 0.01, torch.randn(channels) * 60, ends.min, ends.max


def channels_of(shape: tuple[int, ...], axis: int | None) -> int:
    return 1 if axis is None else shape[axis]


def with_specials(values: Tensor) -> Tensor:
    """NaN, infinities, a negative zero, and an end of RELU6 among the values."""
    flat = values.flatten()
    specials = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 6.0], dtype=values.dtype)
    flat[1 : 1 + specials.numel()] = specials[: max(flat.numel() - 1, 0)]
    return flat.view(values.shape)


def on_reference(operation: Any, *arguments: Any, **options: Any) -> Any:
    with kernels.reference_kernels():
        return operation(*arguments, **options)


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(77.0), expected.nan_to_num(77.0))


def assert_same_layout(actual: Tensor, expected: Tensor) -> None:
    if actual.numel() > 0:
        assert [s for s, n in zip(actual.stride(), actual.shape, strict=True) if n > 1] == [
            s for s, n in zip(expected.stride(), expected.shape, strict=True) if n > 1
        ]


# Forward


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), AXES)
def test_fake_quantize(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    scale, zero_point, lowest, highest = parameters(channels_of(shape, axis))
    for values in (torch.randn(shape) * 3, with_specials(torch.randn(shape) * 3)):
        for input in layouts(values.to(dtype)).values():
            arguments = (input, scale, zero_point, lowest, highest, axis)
            for options in (
                {"mask": True},
                {"mask": True, "codes": SIGNED, "extremes": True},
                {"values": False, "codes": SIGNED},
                {"values": False, "extremes": True},
                {"mask": True, "codes": SIGNED, "clip": RELU6, "addend": input.flip(0) if shape else input},
            ):
                actual: Any = kernels.fake_quantize(*arguments, **options)
                expected = on_reference(kernels.fake_quantize, *arguments, **options)
                for one, other in zip(actual, expected, strict=True):
                    assert_same(one, other)
                if actual.values is not None:
                    assert_same_layout(actual.values, expected.values)
                if actual.codes is not None:
                    assert_same_layout(actual.codes, expected.codes)


@given(
    shape=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    axis=st.integers(0, 4),
    order=st.permutations(range(5)),
    bits=st.integers(2, 8),
    code_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(FLOATS),
    clip=st.sampled_from([UNBOUNDED, RELU, RELU6]),
    adds=st.booleans(),
    exponent=st.integers(-100, 100),
)
def test_fake_quantize_of_any_permutation_and_scale(
    shape: tuple[int, ...],
    axis: int,
    order: list[int],
    bits: int,
    code_dtype: torch.dtype,
    dtype: torch.dtype,
    clip: tuple[float, float],
    adds: bool,
    exponent: int,
) -> None:
    own_axis = axis if axis < len(shape) else None
    scheme = QuantizationScheme(bits=bits, signed=code_dtype is SIGNED)
    scale = (torch.rand(channels_of(shape, own_axis)) + 0.5) * 2.0**exponent
    zero_point = torch.randn_like(scale) * 2.0 ** (bits - 1)
    values = (torch.randn(shape) * 2.0 ** (bits - 1 + exponent)).to(dtype)
    permutation = [i for i in order if i < len(shape)]
    back = [permutation.index(i) for i in range(len(shape))]
    input = values.permute(permutation).contiguous().permute(back)
    arguments = (input, scale, zero_point, scheme.quant_min, scheme.quant_max, own_axis)
    options: dict[str, Any] = {"mask": True, "codes": code_dtype, "extremes": True, "clip": clip}
    options["addend"] = values.roll(1) if adds else None
    actual = kernels.fake_quantize(*arguments, **options)
    for one, other in zip(actual, on_reference(kernels.fake_quantize, *arguments, **options), strict=True):
        assert_same(one, other)


@given(
    significand=st.integers(2**23, 2**24 - 1),
    exponent=st.integers(-62, 40),
    code=st.integers(-140, 140),
    run=st.booleans(),
)
def test_it_divides(significand: int, exponent: int, code: int, run: bool) -> None:
    """Around every tie, where a product with the reciprocal would go astray."""
    scale = torch.tensor([significand * 2.0 ** (exponent - 23)])
    tie = (code + 0.5) * scale
    around = [tie]
    for _ in range(20):
        around = [around[0].nextafter(torch.tensor(-math.inf)), *around, around[-1].nextafter(torch.tensor(math.inf))]
    values = torch.cat(around)
    scales = scale if run else scale.repeat(41)
    axis = None if run else 0
    quantized = kernels.fake_quantize(values, scales, torch.zeros_like(scales), -128, 127, axis, codes=SIGNED)
    assert quantized.codes is not None
    assert torch.equal(quantized.codes, (values / scale).round().clamp(-128, 127).to(SIGNED))


def test_scales_at_the_ends_of_float32() -> None:
    scale = torch.tensor([1e-45, 1e-40, 1e-38, 2.0**-61, 2.0**61, 1e37, 3e38])
    values = torch.tensor([0.0, 1.0, -1.4, 2.5, 127.5, -128.5, 300.0, math.inf, -math.inf, math.nan]) * scale[:, None]
    for one, other in zip(values, scale[:, None], strict=True):
        arguments = (one.contiguous(), other, torch.tensor([2.0]), -128, 127, None)
        for actual, expected in zip(
            kernels.fake_quantize(*arguments, mask=True, extremes=True),
            on_reference(kernels.fake_quantize, *arguments, mask=True, extremes=True),
            strict=True,
        ):
            assert_same(actual, expected)


def test_values_never_are_a_negative_zero() -> None:
    input = torch.tensor([-0.0, -1e-30, -0.4, 0.0]).repeat(9)
    for scale, axis in ((torch.ones(1), None), (torch.ones(36), 0)):
        values = kernels.fake_quantize(input, scale, torch.zeros_like(scale), -128, 127, axis).values
        assert values is not None
        assert not values.signbit().any()


@pytest.mark.parametrize("at", [0, 100, 4095, 4096, 100_000])
def test_one_nan_means_that_there_are_no_codes(at: int) -> None:
    input = torch.randn(100_001)
    arguments = (torch.tensor([0.1]), torch.zeros(1), -128, 127, None)
    assert kernels.fake_quantize(input, *arguments, codes=SIGNED).codes is not None
    input[at] = math.nan
    quantized = kernels.fake_quantize(input, *arguments, codes=SIGNED)
    assert quantized.codes is None
    assert quantized.values is not None
    assert quantized.values.isnan().nonzero().tolist() == [[at]]


def test_a_clip_lets_nothing_pass_at_its_ends() -> None:
    input = torch.tensor([-1.0, 0.0, 1e-20, 5.9, 6.0, 7.0, math.nan, math.inf])
    arguments = (torch.tensor([0.1]), torch.zeros(1), -128, 127, None)
    quantized = kernels.fake_quantize(input, *arguments, clip=RELU6, mask=True)
    assert quantized.mask is not None
    assert unpack_mask(quantized.mask, (8,), (1,)).tolist() == [False, False, True, True, False, False, False, False]
    leaf = input.clone().requires_grad_()
    torch.nn.functional.relu6(leaf).nansum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad[:6].bool().tolist() == [False, False, True, True, False, False]


def test_other_dtypes_and_what_only_stands_for_a_tensor_go_the_reference_way() -> None:
    scale, zero_point = torch.tensor([0.1]), torch.tensor([3])
    for dtype in (torch.float16, torch.float64):
        input = torch.randn(20, dtype=dtype)
        assert not kernels.is_native(input, scale, zero_point)
        quantized = kernels.fake_quantize(input, scale, zero_point, -128, 127, None)
        assert quantized.values is not None
        assert quantized.values.dtype is dtype
    input = torch.randn(4, 5)
    assert kernels.is_native(input, scale, zero_point)
    mapped = torch.vmap(lambda row: torch.tensor(kernels.is_native(row, scale, zero_point)))(input)
    assert not mapped.any()


def test_wrong_arguments_are_refused() -> None:
    operator = native.operators["fake_quantize"]
    input, scale, zero_point = torch.randn(2, 3), torch.ones(3), torch.zeros(3)
    rest = (-128, 127, 1, *UNBOUNDED, True, False, False, None)
    operator(input, None, scale, zero_point, *rest)
    with pytest.raises(RuntimeError, match="scale must be on the CPU and hold 1 or 3 numbers, got 2"):
        operator(input, None, torch.ones(2), zero_point, *rest)
    with pytest.raises(RuntimeError, match="input must be float32 or bfloat16"):
        operator(input.double(), None, scale, zero_point, *rest)
    with pytest.raises(RuntimeError, match="addend must be on the CPU, of the shape"):
        operator(input, torch.randn(2, 2), scale, zero_point, *rest)
    with pytest.raises(RuntimeError, match="axis must lie within 2 dimensions, got 2"):
        operator(input, None, scale, zero_point, -128, 127, 2, *rest[3:])
    with pytest.raises(RuntimeError, match="mask must hold 1 bytes, got 2"):
        native.operators["mask_gradient"](input, torch.zeros(2, dtype=torch.uint8), (3, 1), None)


# Backward


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple), turned=st.booleans())
def test_a_packed_mask_unpacks(shape: tuple[int, ...], turned: bool) -> None:
    flags = torch.rand(shape) < 0.5
    if turned:
        flags = flags.transpose(0, -1).contiguous().transpose(0, -1)
    mask = pack_mask(flags)
    assert mask.shape == (math.ceil(flags.numel() / 8),)
    assert torch.equal(unpack_mask(mask, flags.shape, flags.stride()), flags)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for flags in layouts(torch.rand(shape) < 0.5).values():
        flags = torch.zeros_like(flags).copy_(flags)  # dense, as a mask is
        mask = pack_mask(flags)
        for gradient in layouts(with_specials(torch.randn(shape).to(dtype))).values():
            for clip in (None, 0.7):
                masked = kernels.mask_gradient(gradient, mask, flags.stride(), clip)
                clipped = gradient if clip is None else gradient.clamp(-clip, clip)
                assert_same(masked, torch.where(flags, clipped, 0.0))
                assert_same_layout(masked, flags)
                assert_same(on_reference(kernels.mask_gradient, gradient, mask, flags.stride(), clip), masked)


def in_float64(
    gradient: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ and LSQ+ as their papers write them, of the codes of float32; and how far float32 may stray."""
    number, step, offset = (tensor.double() for tensor in (input, scale, zero_point.round().clamp(-128, 127)))
    step, offset = (arithmetic.along_axis(tensor, input.dim(), axis) for tensor in (step, offset))
    codes = (input.float() / step.float()).round().double() + offset
    inside = (codes >= -128) & (codes <= 127)
    slope = codes.clamp(-128, 127) - offset - torch.where(inside, number / step, 0.0)
    factor = gradient.double() * gradient_scale(input, scale, 127)
    dimensions = [dimension for dimension in range(input.dim()) if dimension != axis]

    def total(terms: Tensor) -> Tensor:
        return (terms.sum(dimensions) if dimensions else terms).reshape(scale.shape)

    # x / s is rounded: below 256, by up to 2**-17. A sum of 32 floats is, by up to 32 * 2**-24 of their magnitudes.
    tolerance = total(factor.abs()) * 2.0**-17 + total((factor * slope).abs()) * 2.0**-18
    return total(factor * slope), total(factor * torch.where(inside, 0.0, -step)), tolerance


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [*AXES, (LARGE, None), (LARGE, 0), (LARGE, 1), (LARGE, 3), ((700, 40), 0)])
def test_gradients_of_scale_and_zero_point(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    scale, zero_point, lowest, highest = parameters(channels_of(shape, axis))
    zero_point.requires_grad_()
    options: dict[str, Any] = {"pass_saturated": False, "gradient_clip": None, "needs": (True, True, True)}
    for input in layouts((torch.randn(shape) * 3).to(dtype)).values():
        gradient = torch.randn(shape).to(dtype)
        arguments = (gradient, input, scale, zero_point.detach(), lowest, highest, axis)
        to_input, to_scale, to_zero_point = kernels.fake_quantize_backward(*arguments, **options)
        assert_same(to_input, on_reference(kernels.fake_quantize_backward, *arguments, **options)[0])
        expected_scale, expected_zero_point, tolerance = in_float64(gradient, input, scale, zero_point.detach(), axis)
        assert to_scale is not None
        assert to_zero_point is not None
        assert ((to_scale.double() - expected_scale).abs() <= tolerance).all()
        # Here terms are a gradient each, and the scale comes last.
        assert torch.allclose(to_zero_point.double(), expected_zero_point, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_is_not_lost_in_the_sums() -> None:
    scale, zero_point, lowest, highest = parameters(1)
    input, gradient = torch.randn(1000), torch.randn(1000)
    options: dict[str, Any] = {"pass_saturated": True, "gradient_clip": None, "needs": (False, True, True)}
    broken = input.clone()
    broken[500] = math.nan
    to_input, to_scale, to_zero_point = kernels.fake_quantize_backward(
        gradient, broken, scale, zero_point, lowest, highest, None, **options
    )
    assert to_input is None
    assert to_scale is not None
    assert to_zero_point is not None
    assert to_scale.isnan()
    assert to_zero_point.isfinite()
    gradient[500] = math.nan
    _, to_scale, to_zero_point = kernels.fake_quantize_backward(
        gradient, input, scale, zero_point, lowest, highest, None, **options
    )
    assert to_scale is not None
    assert to_zero_point is not None
    assert to_scale.isnan()
    assert to_zero_point.isnan()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("axis", [None, 1, 3])
def test_sums_do_not_depend_on_threads(axis: int | None) -> None:
    input, gradient = torch.randn(LARGE) * 3, torch.randn(LARGE)
    scale, zero_point, lowest, highest = parameters(channels_of(LARGE, axis))

    def gradients() -> Any:
        return kernels.fake_quantize_backward(
            gradient,
            input,
            scale,
            zero_point,
            lowest,
            highest,
            axis,
            pass_saturated=True,
            gradient_clip=0.5,
            needs=(True, True, True),
        )

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(gradients(), first, strict=True))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(gradients(), first, strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3])
def test_several_threads_compute_the_same(axis: int | None) -> None:
    scale, zero_point, lowest, highest = parameters(channels_of(LARGE, axis))
    for input in layouts(torch.randn(LARGE)).values():
        arguments = (input, scale, zero_point, lowest, highest, axis)
        options: dict[str, Any] = {"mask": True, "codes": SIGNED, "extremes": True}
        actual = kernels.fake_quantize(*arguments, **options)
        for one, other in zip(actual, on_reference(kernels.fake_quantize, *arguments, **options), strict=True):
            assert_same(one, other)
        assert actual.mask is not None
        assert actual.values is not None
        gradient = torch.randn(LARGE)
        strides = actual.values.stride()
        assert_same(
            kernels.mask_gradient(gradient, actual.mask, strides),
            on_reference(kernels.mask_gradient, gradient, actual.mask, strides),
        )


# Extremes


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize(("shape", "axis"), [*AXES, (LARGE, None), (LARGE, 1)])
def test_extremes(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    for values in (torch.randn(shape), with_specials(torch.randn(shape)), torch.full(shape, math.inf)):
        for input in layouts(values.to(dtype)).values():
            both = kernels.extremes(input, axis)
            assert both.shape == (2, channels_of(shape, axis))
            assert_same(both, on_reference(kernels.extremes, input, axis))


@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]), max_size=40),
    momentum=st.floats(0.001, 1.0),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    due=st.booleans(),
)
def test_update_moving_average(
    values: list[float], momentum: float, bits: int, signed: bool, symmetric: bool, due: bool
) -> None:
    """Against the observer's formulas, over batches of eight channels."""
    scheme = QuantizationScheme(bits=bits, signed=signed, symmetric=symmetric)
    minimum, maximum = torch.full((8,), math.inf), torch.full((8,), -math.inf)
    scale, zero_point, batches = torch.ones(8), torch.zeros(8), torch.zeros(1, dtype=torch.int64)
    expected_minimum, expected_maximum, count = minimum.clone(), maximum.clone(), 0
    for start in range(0, len(values), 8):
        batch = torch.full((1, 8), math.nan)
        batch[0, : len(values[start : start + 8])] = torch.tensor(values[start : start + 8])
        extremes = kernels.extremes(batch, 1)
        versions = [tensor._version for tensor in (minimum, maximum, batches, scale, zero_point)]
        given_batch = (extremes, True, None) if start % 16 else (batch, False, 1)
        assert kernels.update_moving_average(
            *given_batch, minimum, maximum, batches, scale, zero_point, momentum, scheme, due
        )
        assert all(
            tensor._version > version
            for tensor, version in zip((minimum, maximum, batches, scale, zero_point), versions, strict=True)
        )
        for running, ends in ((expected_minimum, -extremes[0]), (expected_maximum, extremes[1])):
            averaged = torch.where(running.isfinite(), torch.lerp(running, ends, momentum), ends)
            running.copy_(torch.where(ends.isfinite(), averaged, running))
        count += bool(extremes.isfinite().any())
        assert_same(minimum, expected_minimum)
        assert_same(maximum, expected_maximum)
        assert int(batches) == count
        if due:
            ends = (torch.where(end.isfinite(), end, 0.0) for end in (minimum, maximum))
            expected_scale, expected_zero_point = arithmetic.range_to_scale_and_zero_point(*ends, scheme)
            assert_same(scale, expected_scale)
            assert_same(zero_point, expected_zero_point)
    if not due:
        assert (scale == 1).all()


def test_update_moving_average_leaves_alone_what_it_does_not_take() -> None:
    state = [torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1)]
    scheme = QuantizationScheme()
    assert not kernels.update_moving_average(torch.randn(5).half(), False, None, *state, 0.1, scheme, True)
    learned = [*state[:3], torch.nn.Parameter(torch.ones(1)), state[4]]
    assert not kernels.update_moving_average(torch.randn(5), False, None, *learned, 0.1, scheme, True)
    assert not on_reference(kernels.update_moving_average, torch.randn(5), False, None, *state, 0.1, scheme, True)
    assert int(state[2]) == 0
