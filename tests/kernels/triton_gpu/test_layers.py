"""Integer layers on the kernels for GPUs, in the interpreter: the sums of float64 and the formulas, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from example_codes import DTYPES, SIGNED, UNSIGNED, layouts, random_codes
from example_operators import assert_same
from mlframework.quantization import kernels
from mlframework.quantization.kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    Epilogue,
    IntegerLayer,
    LinearProduct,
    TransposedProduct,
)
from mlframework.quantization.kernels.backends.exact_floats import EXACT_FLOATS
from mlframework.quantization.kernels.backends.phases import PHASES
from mlframework.quantization.kernels.backends.triton_gpu import TRITON_GPU
from mlframework.quantization.kernels.plan import plan
from mlframework.quantization.kernels.products import Product

pytestmark = pytest.mark.interpreter

# The shape of the codes, that of the weight, and stride, padding, dilation and groups.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...] | None]] = {
    "linear": ((5, 37), (19, 37), None),
    "linear of many dimensions": ((2, 3, 64), (16, 64), None),
    "linear of tiles without a rest": ((128, 64), (128, 64), None),
    "conv1d": ((2, 5, 19), (20, 5, 4), ((2,), (3,), (2,), 1)),
    "few channels": ((2, 3, 11, 10), (16, 3, 5, 5), ((2, 2), (2, 2), (1, 1), 1)),
    "channels of a tile": ((2, 32, 5, 6), (9, 32, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "channels with a rest": ((1, 40, 5, 4), (9, 40, 3, 2), ((1, 2), (2, 0), (2, 1), 1)),
    "pointwise": ((2, 20, 5, 6), (33, 20, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "shortcut": ((2, 20, 7, 6), (16, 20, 1, 1), ((2, 2), (0, 0), (1, 1), 1)),
    "grouped": ((2, 12, 6, 5), (18, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 3)),
    "grouped, channels of a tile": ((1, 64, 4, 5), (12, 32, 1, 3), ((1, 1), (0, 1), (1, 1), 2)),
    "several outputs to a channel": ((1, 6, 5, 5), (12, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 6)),
    "depthwise": ((2, 37, 8, 9), (37, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 37)),
    "depthwise dilated": ((1, 6, 11, 9), (6, 1, 5, 3), ((1, 1), (4, 2), (2, 1), 6)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random_product(shape: tuple[int, ...], dtype: torch.dtype, geometry: Any, zero_point: int) -> Product:
    weight = random_codes(shape, SIGNED)
    if geometry is None:
        return LinearProduct(weight, zero_point, dtype)
    return ConvolutionProduct(weight, zero_point, dtype, ConvolutionGeometry(*geometry))


def epilogues(outputs: int) -> list[Epilogue]:
    """To codes and to values, with a multiplier to a channel and with one."""
    bias = torch.randint(-3000, 3000, (outputs,), dtype=torch.int32)
    multiplier = (torch.rand(outputs) + 0.5) * 2e-3
    return [
        Epilogue(bias, multiplier, 117, 3, 250, UNSIGNED),
        Epilogue(bias, multiplier[:1], -20, -128, 127, SIGNED),
        Epilogue(bias, multiplier[:1], 0, -math.inf, math.inf),
        Epilogue(bias, multiplier, 0, 0.0, 6.0),
    ]


def assert_as_floats(product: Product, epilogue: Epilogue, codes: Tensor) -> None:
    expected = EXACT_FLOATS.layer(product, epilogue)(codes)
    layer = IntegerLayer(product, epilogue)
    with kernels.interpreted_kernels():
        actual = layer(codes)
    assert_same(actual, expected)
    if codes.dim() > 2 and product.channel_axis == 1:
        assert actual.movedim(1, -1).is_contiguous(), "channels lie innermost"


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.long) for dtype in DTYPES[1:])], ids=str
)
@EVERY_CASE
def test_layers_of_converted_models(case: Any, dtype: torch.dtype) -> None:
    shape, weight_shape, geometry = case
    ends = torch.iinfo(dtype)
    own = epilogues(weight_shape[0])[dtype is SIGNED :: 2]
    for zero_point, epilogue in zip((ends.min + 3, ends.max), own, strict=True):
        product = random_product(weight_shape, dtype, geometry, zero_point)
        with kernels.interpreted_kernels():
            assert plan(product.description) is TRITON_GPU
        assert_as_floats(product, epilogue, random_codes(shape, dtype))


@pytest.mark.parametrize("case", ["channels of a tile", "pointwise", "depthwise"])
def test_codes_however_they_lie(case: str) -> None:
    shape, weight_shape, geometry = CASES[case]
    product = random_product(weight_shape, UNSIGNED, geometry, 3)
    for codes in layouts(random_codes(shape, UNSIGNED)).values():
        assert_as_floats(product, epilogues(weight_shape[0])[0], codes)


@pytest.mark.parametrize("output_padding", [(0, 0), (1, 1)])
def test_transposed_convolutions(output_padding: tuple[int, int]) -> None:
    weight, geometry = random_codes((6, 4, 3, 4), SIGNED), ConvolutionGeometry((2, 2), (1, 0), (1, 1))
    product = TransposedProduct(weight, 9, UNSIGNED, geometry, output_padding)
    codes = random_codes((2, 6, 5, 4), UNSIGNED)
    with kernels.interpreted_kernels():
        assert plan(product.description) is PHASES
    for epilogue in epilogues(4):
        expected = EXACT_FLOATS.layer(product, epilogue)(codes)
        with kernels.interpreted_kernels():
            assert_same(IntegerLayer(product, epilogue)(codes), expected)


@pytest.mark.parametrize(
    ("code", "weight", "zero_point"), [(255, -127, 0), (255, 127, 0), (255, -128, 0), (0, -128, 255)]
)
def test_the_largest_sums(code: int, weight: int, zero_point: int) -> None:
    """Odd sums beyond what float32 can count, and products that two of would saturate 16 bits."""
    length = 4099
    product = LinearProduct(torch.full((16, length), weight, dtype=torch.int8), zero_point, UNSIGNED)
    bias = torch.arange(16, dtype=torch.int32) + 1
    codes = torch.full((3, length), code, dtype=torch.uint8)
    exact = [(code - zero_point) * weight * length + int(each) for each in bias]
    with kernels.interpreted_kernels():
        output = IntegerLayer(product, Epilogue(bias, torch.ones(1)))(codes)
        # Only exact sums, less a number that brings them near zero, give these codes.
        lowered = IntegerLayer(product, Epilogue(bias - exact[0], torch.ones(1), 0, 0, 255, UNSIGNED))(codes)
    assert torch.equal(output, torch.tensor(exact, dtype=torch.float64).float().expand(3, 16))
    assert torch.equal(lowered, torch.arange(16, dtype=torch.uint8).expand(3, 16))


@settings(max_examples=25)
@given(st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    def numbers(lowest: int, highest: int) -> tuple[int, int]:
        number = st.integers(lowest, highest)
        return data.draw(number), data.draw(number)

    kernel, stride, padding, dilation = numbers(1, 4), numbers(1, 3), numbers(0, 3), numbers(1, 2)
    groups = data.draw(st.sampled_from([1, 1, 2, 5]))
    channels, outputs = (data.draw(st.sampled_from([1, 3, 17, 33])) for _ in range(2))
    size = tuple(
        max(d * (k - 1) + 1 - 2 * p, 1) + data.draw(st.integers(0, 4))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(DTYPES))
    zero_point = int(random_codes((1,), dtype))
    geometry = (stride, padding, dilation, groups)
    product = random_product((outputs * groups, channels, *kernel), dtype, geometry, zero_point)
    epilogue = data.draw(st.sampled_from(epilogues(outputs * groups)))
    assert_as_floats(product, epilogue, random_codes((2, channels * groups, *size), dtype))


@pytest.mark.parametrize("dtype", [UNSIGNED, SIGNED], ids=str)
@pytest.mark.parametrize("name", ["conv1d", "few channels", "channels of a tile", "channels with a rest", "depthwise"])
def test_padding_by_zero(name: str, dtype: torch.dtype) -> None:
    """A zero point of 0, as after a ReLU, has a way of its own through the kernel."""
    shape, weight_shape, geometry = CASES[name]
    product = random_product(weight_shape, dtype, geometry, 0)
    assert_as_floats(product, epilogues(weight_shape[0])[0], random_codes(shape, dtype))


def test_an_empty_batch() -> None:
    for shape, weight_shape, geometry in CASES.values():
        product = random_product(weight_shape, UNSIGNED, geometry, 3)
        assert_as_floats(product, epilogues(weight_shape[0])[0], random_codes((0, *shape[1:]), UNSIGNED))
