"""Parameters and the public functions that quantize with them; the formulas themselves: test_arithmetic.py."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mlframework.quantization import QuantizationParameters, QuantizationScheme, dequantize, quantize, requantize

AFFINE = QuantizationScheme(signed=False, symmetric=False)
PER_CHANNEL = QuantizationScheme(channel_axis=1)
PER_TENSOR_PARAMETERS = QuantizationParameters(torch.tensor([0.5]), torch.tensor([10]), AFFINE)
THREE_CHANNELS = QuantizationParameters(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 1, -1]), PER_CHANNEL)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# What the parameters refuse


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_scale_must_be_finite_and_positive(scale: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"scale must be finite and positive, got [1.0, {scale}]")):
        QuantizationParameters(torch.tensor([1.0, scale]), torch.tensor([0, 0]), PER_CHANNEL)


def test_scale_must_be_positive_in_float32() -> None:
    with pytest.raises(ValueError, match=r"scale must be finite and positive, got \[1e-60\]"):
        QuantizationParameters(torch.tensor([1e-60], dtype=torch.float64), torch.tensor([0]), QuantizationScheme())


@pytest.mark.parametrize(
    ("zero_point", "scheme", "ends"),
    [
        (-1.0, AFFINE, "0 to 255"),
        (256.0, AFFINE, "0 to 255"),
        (0.5, AFFINE, "0 to 255"),
        (math.nan, AFFINE, "0 to 255"),
        (128.0, QuantizationScheme(), "-128 to 127"),
        (-128.0, QuantizationScheme(narrow_range=True), "-127 to 127"),
        (8.0, QuantizationScheme(bits=4), "-8 to 7"),
    ],
)
def test_zero_point_must_be_a_code(zero_point: float, scheme: QuantizationScheme, ends: str) -> None:
    message = re.escape(f"zero_point must hold codes from {ends}, got [{zero_point}]")
    with pytest.raises(ValueError, match=message):
        QuantizationParameters(torch.tensor([1.0]), torch.tensor([zero_point]), scheme)


@pytest.mark.parametrize(
    ("scale", "scheme", "expected"),
    [
        (torch.tensor(1.0), AFFINE, "(1,) for this scheme, got ()"),
        (torch.ones(2), AFFINE, "(1,) for this scheme, got (2,)"),
        (torch.ones(1, 1), AFFINE, "(1,) for this scheme, got (1, 1)"),
        (torch.ones(0), PER_CHANNEL, "(C,) with C at least 1 for this scheme, got (0,)"),
        (torch.ones(2, 3), PER_CHANNEL, "(C,) with C at least 1 for this scheme, got (2, 3)"),
    ],
)
def test_shape_of_scale(scale: Tensor, scheme: QuantizationScheme, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"scale must have shape {expected}")):
        QuantizationParameters(scale, torch.zeros_like(scale), scheme)


def test_zero_point_must_have_the_shape_of_scale() -> None:
    with pytest.raises(ValueError, match=r"zero_point must have the shape of scale, \(3,\), got \(1,\)"):
        QuantizationParameters(torch.ones(3), torch.zeros(1), PER_CHANNEL)


def test_zero_point_must_be_on_the_device_of_scale() -> None:
    with pytest.raises(ValueError, match="zero_point must be on the device of scale, cpu, got meta"):
        QuantizationParameters(torch.ones(1), torch.zeros(1, device="meta"), AFFINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, torch.zeros(1), AFFINE), "scale must be a tensor, got float"),
        ((torch.ones(1), 0, AFFINE), "zero_point must be a tensor, got int"),
        ((torch.ones(1), torch.zeros(1), "int8"), "scheme must be a QuantizationScheme, got str"),
        ((int32(1), torch.zeros(1), AFFINE), "scale must be a floating-point tensor, got torch.int32"),
        ((torch.ones(1), torch.zeros(1, dtype=torch.bool), AFFINE), "zero_point must be an .* got torch.bool"),
        (
            (torch.ones(1), torch.zeros(1, dtype=torch.complex64), AFFINE),
            "zero_point must be an .* got torch.complex64",
        ),
    ],
)
def test_arguments_of_the_wrong_type(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantizationParameters(*arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("signed", [False, True])
def test_zero_point_of_any_real_dtype(dtype: torch.dtype, signed: bool) -> None:
    scheme = QuantizationScheme(signed=signed, symmetric=False)
    parameters = QuantizationParameters(torch.tensor([1.0]), torch.tensor([100], dtype=dtype), scheme)
    values = torch.tensor([-300.0, -1.0, 0.0, 300.0])
    expected = torch.tensor([scheme.quant_min, 99, 100, scheme.quant_max], dtype=scheme.dtype)
    codes = quantize(values, parameters)
    assert torch.equal(codes, expected)
    assert torch.equal(dequantize(codes, parameters)[1:3], values[1:3])


# From a range


def test_from_range_places_the_grid() -> None:
    parameters = QuantizationParameters.from_range(torch.tensor([-1.0]), torch.tensor([1.55]), AFFINE)
    assert torch.equal(parameters.scale, torch.tensor([2.55 / 255]))
    assert torch.equal(parameters.zero_point, torch.tensor([100.0]))


def test_from_range_per_channel() -> None:
    parameters = QuantizationParameters.from_range(torch.tensor([-127.0, 0.0]), torch.tensor([1.0, 0.0]), PER_CHANNEL)
    # 127 / 128 is a float32 number; a range of no width has no scale of its own.
    assert torch.equal(parameters.scale, torch.tensor([127 / 128, 1.0]))
    assert torch.equal(parameters.zero_point, torch.zeros(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_from_range_refuses_ends_that_are_not_finite(name: str, value: float) -> None:
    ends = {"minimum": torch.tensor([0.0]), "maximum": torch.tensor([1.0]), name: torch.tensor([value])}
    with pytest.raises(ValueError, match=re.escape(f"{name} must be finite, got [{value}]")):
        QuantizationParameters.from_range(ends["minimum"], ends["maximum"], AFFINE)


def test_from_range_refuses_a_reversed_range() -> None:
    with pytest.raises(ValueError, match=r"minimum must not exceed maximum, got \[2\.0\] and \[1\.0\]"):
        QuantizationParameters.from_range(torch.tensor([2.0]), torch.tensor([1.0]), AFFINE)


def test_from_range_refuses_ends_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"maximum must have the shape of minimum, \(1,\), got \(2,\)"):
        QuantizationParameters.from_range(torch.zeros(1), torch.ones(2), AFFINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, torch.ones(1), AFFINE), "minimum must be a tensor, got float"),
        ((torch.zeros(1), 1, AFFINE), "maximum must be a tensor, got int"),
        ((torch.zeros(1), torch.ones(1), None), "scheme must be a QuantizationScheme, got NoneType"),
    ],
)
def test_from_range_arguments_of_the_wrong_type(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantizationParameters.from_range(*arguments)


# quantize and dequantize


def test_quantize_per_channel() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [-3.0, 500.0, 5.0]])
    codes = quantize(values, THREE_CHANNELS)
    # 5 / 2 = 2.5 rounds to the even 2.
    assert torch.equal(codes, torch.tensor([[2, 2, -1], [-6, 127, 1]], dtype=torch.int8))
    assert torch.equal(dequantize(codes, THREE_CHANNELS)[0], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_every_axis_may_be_the_channel_axis(axis: int) -> None:
    scheme = QuantizationScheme(channel_axis=axis)
    values = torch.randn(3, 3, 3)
    scale = torch.tensor([0.01, 0.1, 1.0])
    codes = quantize(values, QuantizationParameters(scale, torch.zeros(3), scheme))
    for channel in range(3):
        alone = QuantizationParameters(scale[channel : channel + 1], torch.zeros(1), QuantizationScheme())
        assert torch.equal(codes.select(axis, channel), quantize(values.select(axis, channel), alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    parameters = QuantizationParameters(torch.tensor([0.0123]), torch.tensor([77]), AFFINE)
    assert torch.equal(quantize(values, parameters), quantize(values.float(), parameters))


def test_strides_do_not_matter() -> None:
    values = torch.randn(2, 3, 4, 5)
    expected = quantize(values, THREE_CHANNELS)
    assert torch.equal(quantize(values.contiguous(memory_format=torch.channels_last), THREE_CHANNELS), expected)
    spread = values.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert not spread.is_contiguous()
    assert torch.equal(quantize(spread, THREE_CHANNELS), expected)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 4)])
def test_no_values_and_no_dimensions(shape: tuple[int, ...]) -> None:
    codes = quantize(torch.zeros(shape), PER_TENSOR_PARAMETERS)
    assert codes.shape == shape
    assert codes.dtype is torch.uint8
    assert torch.equal(dequantize(codes, PER_TENSOR_PARAMETERS), torch.zeros(shape))


def test_infinities_saturate_unless_refused() -> None:
    values = torch.tensor([-math.inf, 1e38, math.inf])
    assert torch.equal(quantize(values, PER_TENSOR_PARAMETERS), torch.tensor([0, 255, 255], dtype=torch.uint8))
    with pytest.raises(ValueError, match="input must be finite, got NaN or infinity"):
        quantize(values, PER_TENSOR_PARAMETERS, check_finite=True)


def test_nan_is_refused_on_request() -> None:
    with pytest.raises(ValueError, match="input must be finite, got NaN or infinity"):
        quantize(torch.tensor([0.0, math.nan]), PER_TENSOR_PARAMETERS, check_finite=True)
    assert quantize(torch.tensor([0.0]), PER_TENSOR_PARAMETERS, check_finite=True).item() == 10


def test_parameters_that_require_grad() -> None:
    scale = torch.tensor([0.5], requires_grad=True)
    zero_point = torch.tensor([10.0], requires_grad=True)
    codes = quantize(torch.tensor([1.0], requires_grad=True), QuantizationParameters(scale, zero_point, AFFINE))
    assert codes.item() == 12
    assert not codes.requires_grad


@pytest.mark.parametrize(
    ("input", "kind"),
    [(int32(1), "torch.int32"), (torch.tensor([1j]), "torch.complex64"), (torch.tensor([True]), "torch.bool")],
)
def test_quantize_takes_real_numbers(input: Tensor, kind: str) -> None:
    with pytest.raises(TypeError, match=f"input must be a floating-point tensor, got {kind}"):
        quantize(input, PER_TENSOR_PARAMETERS)


def test_quantize_arguments_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        quantize([1.0], PER_TENSOR_PARAMETERS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters must be QuantizationParameters, got Tensor"):
        quantize(torch.ones(1), torch.ones(1))  # type: ignore[arg-type]


def test_number_of_channels_must_fit() -> None:
    message = re.escape("input must have 3 channels along axis 1, as many as scale has, got shape (3, 2)")
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(3, 2), THREE_CHANNELS)
    with pytest.raises(ValueError, match="channel_axis 1 is out of range for a tensor of 1 dimensions"):
        quantize(torch.ones(3), THREE_CHANNELS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_dequantize_takes_codes_of_its_grid(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"codes must have dtype torch.uint8, got {dtype}"):
        dequantize(torch.ones(1, dtype=dtype), PER_TENSOR_PARAMETERS)


def test_dequantize_arguments_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="codes must be a tensor, got int"):
        dequantize(3, PER_TENSOR_PARAMETERS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters must be QuantizationParameters, got NoneType"):
        dequantize(torch.ones(1, dtype=torch.uint8), None)  # type: ignore[arg-type]


# requantize


def test_requantize_rounds_before_the_zero_point() -> None:
    # 0.5 and 1.5 are ties: 0 and 2 before zero point 11; with the odd zero point added first they would be 12 and 12.
    parameters = QuantizationParameters(torch.tensor([2.0]), torch.tensor([11]), AFFINE)
    codes = requantize(int32(-30, -1, 0, 1, 3, 1000), torch.tensor([1.0]), parameters)
    assert torch.equal(codes, torch.tensor([0, 11, 11, 11, 13, 255], dtype=torch.uint8))


def test_requantize_per_channel_scale_broadcasts() -> None:
    codes = requantize(int32(8, 8).view(1, 2, 1), torch.tensor([0.5, 1.0]).view(-1, 1), PER_TENSOR_PARAMETERS)
    assert codes.flatten().tolist() == [18, 26]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(1), torch.ones(1), PER_TENSOR_PARAMETERS), TypeError, "accumulator .*int32.* got torch.float32"),
        ((3, torch.ones(1), PER_TENSOR_PARAMETERS), TypeError, "accumulator must be an int32 tensor, got .*int"),
        ((int32(1), 0.5, PER_TENSOR_PARAMETERS), TypeError, "accumulator_scale must be a tensor, got float"),
        ((int32(1), torch.ones(1), None), TypeError, "parameters must be QuantizationParameters, got NoneType"),
        ((int32(1), torch.ones(1), THREE_CHANNELS), ValueError, "parameters must be per tensor, got channel_axis 1"),
    ],
)
def test_requantize_refuses(arguments: tuple[Any, Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        requantize(*arguments)
