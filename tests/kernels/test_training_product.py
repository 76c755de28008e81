"""Products of a training step: exactly the integers of float64, rounded once to float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_codes import DTYPES, UNSIGNED, layouts, random_codes
from mlframework.quantization import QuantizationScheme, kernels
from mlframework.quantization.kernels import ConvolutionGeometry
from mlframework.quantization.kernels.native import has_integer_layers

needs_integer_layers = pytest.mark.skipif(
    not has_integer_layers(), reason="needs integer layers compiled for this processor"
)

# The shape of the codes, that of the weight, and the geometry.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], ConvolutionGeometry | None]] = {
    "linear": ((7, 33), (21, 33), None),
    "linear of a vector": ((33,), (5, 33), None),
    "linear of many dimensions": ((2, 3, 4, 16), (32, 16), None),
    "one feature": ((3, 1), (1, 1), None),
    "conv1d": ((3, 5, 19), (20, 5, 4), ConvolutionGeometry((2,), (3,), (2,), 1)),
    "pointwise conv1d": ((2, 8, 9), (16, 8, 1), ConvolutionGeometry((1,), (0,), (1,), 1)),
    "depthwise conv1d": ((2, 6, 19), (6, 1, 3), ConvolutionGeometry((1,), (1,), (1,), 6)),
    "conv2d": ((2, 17, 9, 8), (35, 17, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1)),
    "stem": ((2, 3, 15, 15), (16, 3, 7, 7), ConvolutionGeometry((2, 2), (3, 3), (1, 1), 1)),
    "uneven": ((2, 4, 9, 12), (5, 4, 2, 3), ConvolutionGeometry((2, 1), (0, 2), (1, 3), 1)),
    "pointwise": ((2, 20, 5, 6), (33, 20, 1, 1), ConvolutionGeometry((1, 1), (0, 0), (1, 1), 1)),
    "shortcut": ((2, 20, 7, 6), (16, 20, 1, 1), ConvolutionGeometry((2, 2), (0, 0), (1, 1), 1)),
    "depthwise": ((2, 37, 8, 9), (37, 1, 3, 3), ConvolutionGeometry((2, 2), (1, 1), (1, 1), 37)),
    "depthwise dilated": ((2, 16, 11, 9), (16, 1, 5, 3), ConvolutionGeometry((1, 1), (4, 2), (2, 1), 16)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def exact_sums(codes: Tensor, weight: Tensor, geometry: ConvolutionGeometry | None, zero_point: int) -> Tensor:
    values = codes.double() - zero_point  # padding holds zeros, not codes
    if geometry is None:
        return F.linear(values, weight.double())
    convolution = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolution(values, weight.double(), None, *geometry)


def along_outputs(vector: Tensor, sums: Tensor, geometry: Any) -> Tensor:
    return vector if geometry is None else vector.reshape(-1, *[1] * (sums.dim() - 2))


@needs_integer_layers
@pytest.mark.parametrize("per_tensor", [False, True], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_CASE
def test_the_output_is_the_rounded_accumulator_times_the_scale(case: Any, dtype: torch.dtype, per_tensor: bool) -> None:
    shape, weight_shape, geometry = case
    ends = torch.iinfo(dtype)
    weight = torch.randint(-128, 128, weight_shape, dtype=torch.int8)
    bias = torch.randint(-(2**20), 2**20, (weight_shape[0],), dtype=torch.int32)
    scale = torch.rand(1 if per_tensor else weight_shape[0]) * 0.01
    for zero_point in (ends.min, 3, ends.max):
        product = kernels.pack_training_product(weight, bias, scale, geometry, zero_point, dtype)
        assert product.convolves == (geometry is not None)
        for name, codes in layouts(random_codes(shape, dtype)).items():
            sums = exact_sums(codes, weight, geometry, zero_point)
            accumulator = sums + along_outputs(bias, sums, geometry)
            scales = along_outputs(scale, sums, geometry) if scale.numel() > 1 else scale
            output = product(codes)
            assert output.dtype is torch.float32
            assert torch.equal(output, accumulator.float() * scales), name
            if geometry is not None:
                assert output.movedim(1, -1).is_contiguous(), "channels lie innermost"


@needs_integer_layers
def test_a_weight_of_any_layout() -> None:
    _, weight_shape, geometry = CASES["conv2d"]
    codes = random_codes((2, 17, 9, 8), UNSIGNED)
    whole = torch.randint(-128, 128, weight_shape, dtype=torch.int8)
    bias, scale = torch.zeros(weight_shape[0], dtype=torch.int32), torch.ones(1)
    for name, weight in layouts(whole).items():
        output = kernels.pack_training_product(weight, bias, scale, geometry, 9, UNSIGNED)(codes)
        assert torch.equal(output.double(), exact_sums(codes, weight, geometry, 9)), name


@needs_integer_layers
def test_the_largest_sums_do_not_overflow() -> None:
    features = 2**30 // (255 * 128)
    weight = torch.full((2, features), 127, dtype=torch.int8)
    weight[1] = -128
    assert kernels.takes_training_product(weight, 1)
    bias = torch.tensor([2**30, -(2**30)], dtype=torch.int32)
    product = kernels.pack_training_product(weight, bias, torch.ones(1), None, 0, UNSIGNED)
    sums = product(torch.full((1, features), 255, dtype=UNSIGNED))
    expected = torch.tensor([[255 * 127 * features + 2**30, -255 * 128 * features - 2**30]], dtype=torch.float64)
    assert torch.equal(sums, expected.float())


@pytest.mark.parametrize(
    ("shape", "groups", "takes"),
    [
        ((4, 8), 1, True),
        ((4, 8, 3), 1, True),
        ((4, 8, 3, 3), 1, True),
        ((8, 1, 3, 3), 8, True),
        ((4, 8, 3, 3, 3), 1, False),
        ((8, 4, 3, 3), 2, False),
        ((16, 1, 3, 3), 8, False),
        ((0, 8), 1, False),
        ((4, 0), 1, False),
        ((2, 2**30 // (255 * 128) + 1), 1, False),
    ],
    ids=str,
)
def test_which_layers_it_takes(shape: tuple[int, ...], groups: int, takes: bool) -> None:
    assert kernels.takes_training_product(torch.zeros(shape), groups) is (takes and has_integer_layers())
    assert not kernels.takes_training_product(torch.zeros(shape, device="meta"), groups)


@needs_integer_layers
def test_an_empty_batch_has_an_empty_output() -> None:
    for shape, weight_shape, geometry in CASES.values():
        if len(shape) == 1:
            continue
        weight = torch.zeros(weight_shape, dtype=torch.int8)
        bias = torch.zeros(weight_shape[0], dtype=torch.int32)
        product = kernels.pack_training_product(weight, bias, torch.ones(1), geometry, 0, UNSIGNED)
        codes = torch.zeros((0, *shape[1:]), dtype=UNSIGNED)
        assert product(codes).shape == exact_sums(codes, weight, geometry, 0).shape


@needs_integer_layers
@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["linear", "one feature", "conv1d", "uneven", "depthwise"])
def test_a_weight_in_one_call_is_observed_quantized_and_packed(
    name: str, channels_last: bool, axis: int | None, momentum: float
) -> None:
    _, shape, geometry = CASES[name]
    scheme = QuantizationScheme(narrow_range=True, channel_axis=axis)
    input_scale, channels = torch.tensor([0.1]), 1 if axis is None else shape[0]
    states = [
        (
            (
                torch.full((channels,), torch.inf),
                torch.full((channels,), -torch.inf),
                torch.zeros(1, dtype=torch.int64),
            ),
            torch.ones(channels),
            torch.zeros(channels),
        )
        for _ in range(2)
    ]
    (averages, scale, zero_point), (other_averages, other_scale, other_zero_point) = states
    for factor in (1.0, 0.5, 3.0):  # the last saturates where the averages lag behind
        weight = torch.randn(shape) * factor
        if channels_last and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        version = scale._version
        trained = kernels.train_weight(
            weight,
            None,
            averages,
            scale,
            zero_point,
            momentum,
            scheme,
            observes=True,
            mask=True,
            geometry=geometry,
            input_scale=input_scale,
            input_zero_point=3,
            dtype=torch.uint8,
        )
        assert trained is not None
        assert scale._version > version
        assert kernels.update_moving_average(
            weight, False, axis, *other_averages, other_scale, other_zero_point, momentum, scheme, True
        )
        ends = scheme.quant_min, scheme.quant_max
        quantized = kernels.fake_quantize(
            weight, scale, zero_point, *ends, axis, values=False, codes=torch.int8, mask=True
        )
        product = kernels.pack_training_product(quantized.codes, None, scale * input_scale, geometry, 3, torch.uint8)
        for one, other in zip((*averages, scale), (*other_averages, other_scale), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(trained.scale, scale)
        assert torch.equal(trained.mask, quantized.mask)
        assert torch.equal(trained.product.packed, product.packed)


@needs_integer_layers
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_a_weight_of_nan_has_no_product(axis: int | None) -> None:
    weight = torch.randn(4, 9)
    weight[2, 3] = torch.nan
    channels = 1 if axis is None else 4
    state = torch.zeros(channels), torch.zeros(channels), torch.zeros(1, dtype=torch.int64)
    trained = kernels.train_weight(
        weight,
        None,
        state,
        torch.ones(channels),
        torch.zeros(channels),
        1.0,
        QuantizationScheme(channel_axis=axis),
        observes=True,
        mask=True,
        geometry=None,
        input_scale=torch.ones(1),
        input_zero_point=0,
        dtype=torch.uint8,
    )
    assert trained is None
