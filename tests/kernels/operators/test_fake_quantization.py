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
from example_operators import FLOATS, RELU6, UNBOUNDED, assert_same, assert_same_layout, on_reference, with_specials
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED
from mlframework.quantization.kernels.operators.fake_quantization import (
    fake_quantize_backward,
    gradient_scale,
    mask_gradient,
)
from mlframework.quantization.kernels.operators.masks import pack_mask, unpack_mask

# One vector and its neighbours, channels of few and of many elements, rows longer than one period.
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (130,), (3, 0, 5), (5, 17), (2, 3, 4, 5), (3, 4, 33, 5), (2, 70, 9, 9)]
AXES = [(shape, axis) for shape in SHAPES for axis in (None, *range(len(shape)))]
LARGE = (3, 70, 40, 41)  # enough for several threads
RELU = (0.0, math.inf)


def parameters(channels: int, dtype: torch.dtype = SIGNED) -> tuple[Tensor, Tensor, int, int]:
    """Scales, fractional zero points of which some lie off the grid, and the grid."""
    ends = torch.iinfo(dtype)
    return torch.rand(channels) * 0.05 + 0.01, torch.randn(channels) * 60, ends.min, ends.max


def channels_of(shape: tuple[int, ...], axis: int | None) -> int:
    return 1 if axis is None else shape[axis]


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
def test_one_nan_means_that_the_grid_has_no_scale(at: int) -> None:
    input = torch.randn(100_001)
    arguments = (torch.tensor([0.1]), torch.tensor([2.6]), -128, 127, None)
    clean = kernels.fake_quantize(input, *arguments, codes=SIGNED)
    assert_same(clean.grid, torch.tensor([[0.1], [3.0]]))
    input[at] = math.nan
    quantized = kernels.fake_quantize(input, *arguments, codes=SIGNED)
    assert_same(quantized.grid, torch.tensor([[math.nan], [3.0]]))
    assert quantized.codes is not None
    assert clean.codes is not None
    assert quantized.codes[at] == -128, "the lowest code"
    others = torch.arange(input.numel()) != at
    assert torch.equal(quantized.codes[others], clean.codes[others])
    assert quantized.values is not None
    assert quantized.values.isnan().nonzero().tolist() == [[at]]


@pytest.mark.parametrize("inner", [1, 7, 100], ids=lambda inner: f"{inner} side by side")
def test_the_grid_tells_which_channels_held_nan(inner: int) -> None:
    input = torch.randn(3, 40, inner)
    input[1, 5, inner // 2] = math.nan
    input[2, 39, inner - 1] = math.nan
    scale, zero_point, lowest, highest = parameters(40)
    quantized = kernels.fake_quantize(input, scale, zero_point, lowest, highest, 1, codes=SIGNED)
    assert quantized.grid is not None
    assert quantized.grid[0].isnan().nonzero().flatten().tolist() == [5, 39]
    shared = kernels.fake_quantize(input, scale[:1], zero_point[:1], lowest, highest, 1, codes=SIGNED)
    assert_same(shared.grid, torch.stack([torch.tensor([math.nan]), zero_point[:1].round().clamp(-128, 127)]))
    # A sum of infinities is NaN, and a clip leaves it so.
    adds = (torch.full((4, 2), math.inf), torch.full((4, 2), -math.inf).index_fill_(0, torch.tensor([0, 1, 3]), 1.0))
    summed = kernels.fake_quantize(
        adds[0], scale[:4], zero_point[:4], lowest, highest, 0, addend=adds[1], clip=RELU6, codes=SIGNED
    )
    assert summed.grid is not None
    assert summed.grid[0].isnan().tolist() == [False, False, True, False]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_go_the_reference_way(dtype: torch.dtype) -> None:
    arguments = (torch.randn(20, dtype=dtype), torch.tensor([0.1]), torch.tensor([3]), -128, 127, None)
    quantized = kernels.fake_quantize(*arguments, mask=True)
    for one, other in zip(quantized, on_reference(kernels.fake_quantize, *arguments, mask=True), strict=True):
        assert_same(one, other)
    assert quantized.values is not None
    assert quantized.values.dtype is dtype


@pytest.mark.skipif(kernels.active_path() != "native", reason="needs compiled kernels")
def test_wrong_arguments_are_refused() -> None:
    operator = DECLARED["fake_quantize"].overload
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
        DECLARED["mask_gradient"].overload(input, torch.zeros(2, dtype=torch.uint8), (3, 1), None)


# Backward


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for flags in layouts(torch.rand(shape) < 0.5).values():
        flags = torch.zeros_like(flags).copy_(flags)  # dense, as a mask is
        mask = pack_mask(flags)
        for gradient in layouts(with_specials(torch.randn(shape).to(dtype))).values():
            for clip in (None, 0.7):
                masked = mask_gradient(gradient, mask, flags.stride(), clip)
                clipped = gradient if clip is None else gradient.clamp(-clip, clip)
                assert_same(masked, torch.where(flags, clipped, 0.0))
                assert_same_layout(masked, flags)
                assert_same(on_reference(mask_gradient, gradient, mask, flags.stride(), clip), masked)


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
        to_input, to_scale, to_zero_point = fake_quantize_backward(*arguments, **options)
        assert_same(to_input, on_reference(fake_quantize_backward, *arguments, **options)[0])
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
    to_input, to_scale, to_zero_point = fake_quantize_backward(
        gradient, broken, scale, zero_point, lowest, highest, None, **options
    )
    assert to_input is None
    assert to_scale is not None
    assert to_zero_point is not None
    assert to_scale.isnan()
    assert to_zero_point.isfinite()
    gradient[500] = math.nan
    _, to_scale, to_zero_point = fake_quantize_backward(
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
        return fake_quantize_backward(
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
            mask_gradient(gradient, actual.mask, strides),
            on_reference(mask_gradient, gradient, actual.mask, strides),
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
