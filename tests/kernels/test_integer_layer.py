"""Whole integer layers against int64 sums and the formulas, bit for bit: compiled, and as without compiled kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from example_codes import DTYPES, SIGNED, UNSIGNED, layouts, random_codes
from mlframework.quantization import arithmetic, kernels
from mlframework.quantization.kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    Epilogue,
    IntegerLayer,
    LinearProduct,
    TransposedProduct,
    native,
)
from mlframework.quantization.kernels.backends.compiled import COMPILED, CompiledLayer
from mlframework.quantization.kernels.operators.integer_layers import packed_layer
from mlframework.quantization.kernels.plan import plan
from mlframework.quantization.kernels.products import Product

FLOATS = torch.float32
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
needs_compiled_kernels = pytest.mark.skipif(not native.is_available(), reason="needs the compiled kernels")


class Grid(NamedTuple):
    """Where a layer's output goes."""

    dtype: torch.dtype
    zero_point: int
    lowest: float
    highest: float


GRIDS = [
    Grid(UNSIGNED, 0, 0, 255),
    Grid(UNSIGNED, 117, 3, 250),
    Grid(SIGNED, -20, -128, 127),
    Grid(SIGNED, 5, -7, 7),
    Grid(FLOATS, 0, -math.inf, math.inf),
    Grid(FLOATS, 0, 0.0, 6.0),
]


def random_weight(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def epilogue_for(sums: Tensor, channel_axis: int, grid: Grid) -> Epilogue:
    """One that spreads these sums over the grid and beyond its ends."""
    channels = sums.shape[channel_axis]
    bias = torch.randint(-3000, 3000, (channels,), dtype=torch.int32)
    width = 100.0 if grid.dtype is not FLOATS else 5.0
    spread = sums.double().abs().mean().nan_to_num(1.0).clamp(min=1.0)
    return Epilogue(bias, (torch.rand(channels) + 0.5) * (width / spread).float(), *grid[1:], grid.dtype)


def expected_output(sums: Tensor, epilogue: Epilogue, channel_axis: int) -> Tensor:
    """By the formulas, from int64 sums."""
    axis = channel_axis % sums.dim()
    accumulator = sums + arithmetic.along_axis(epilogue.bias, sums.dim(), axis)
    multiplier = arithmetic.along_axis(epilogue.multiplier, sums.dim(), axis)
    if epilogue.dtype is FLOATS:
        return (accumulator.to(FLOATS) * multiplier).clamp(epilogue.lowest, epilogue.highest)
    return arithmetic.requantize_accumulator(
        accumulator, multiplier, epilogue.zero_point, int(epilogue.lowest), int(epilogue.highest), epilogue.dtype
    )


def assert_layer(product: Product, codes: Tensor, sums: Tensor, grid: Grid) -> None:
    """Both ways of running the product's layer on codes give what follows from its int64 sums."""
    epilogue = epilogue_for(sums, product.channel_axis, grid)
    layer, expected = IntegerLayer(product, epilogue), expected_output(sums, epilogue, product.channel_axis)
    before = codes.clone()
    with kernels.reference_kernels():
        assert_same(layer(codes), expected)
    assert_same(layer(codes), expected)
    assert torch.equal(codes, before)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype
    assert torch.equal(actual, expected)


def convolution_sums(codes: Tensor, weight: Tensor, zero_point: int, geometry: ConvolutionGeometry) -> Tensor:
    return CONVOLUTIONS[weight.dim() - 2](codes.long() - zero_point, weight.long(), None, *geometry)


def random_zero_point(dtype: torch.dtype) -> int:
    return int(random_codes((1,), dtype))


# Linear


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((7,), 3), ((1, 1), 1), ((5, 17), 16), ((2, 3, 64), 33), ((0, 8), 4), ((40, 33), 70), ((15, 130), 48)],
)
def test_linear(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, grid: Grid) -> None:
    codes, weight, zero_point = random_codes(shape, dtype), random_weight(outputs, shape[-1]), random_zero_point(dtype)
    sums = (codes.long() - zero_point) @ weight.long().t()
    assert_layer(LinearProduct(weight, zero_point, dtype), codes, sums, grid)


@pytest.mark.parametrize("rows", range(1, 36))
@pytest.mark.parametrize("outputs", [16, 32, 80])
def test_linear_of_every_number_of_rows(rows: int, outputs: int) -> None:
    codes, weight = random_codes((rows, 12), UNSIGNED), random_weight(outputs, 12)
    assert_layer(LinearProduct(weight, 9, UNSIGNED), codes, (codes.long() - 9) @ weight.long().t(), GRIDS[1])


def test_linear_of_codes_however_they_lie() -> None:
    weight = random_weight(20, 19)
    for codes in layouts(random_codes((6, 5, 19), SIGNED)).values():
        assert_layer(LinearProduct(weight, 3, SIGNED), codes, (codes.long() - 3) @ weight.long().t(), GRIDS[2])


# Convolutions


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolution(dimensions: int, groups: int, dtype: torch.dtype, grid: Grid) -> None:
    geometry = ConvolutionGeometry((2, 1, 1)[:dimensions], (1, 2, 0)[:dimensions], (1, 2, 1)[:dimensions], groups)
    codes = random_codes((2, 6, *(9, 8, 7)[:dimensions]), dtype)
    weight, zero_point = random_weight(10, 6 // groups, *(3, 3, 2)[:dimensions]), random_zero_point(dtype)
    sums = convolution_sums(codes, weight, zero_point, geometry)
    assert_layer(ConvolutionProduct(weight, zero_point, dtype, geometry), codes, sums, grid)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    st.integers(1, 37),
    st.integers(1, 70),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.tuples(PAIRS, st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIRS),
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from(DTYPES),
    st.sampled_from(GRIDS),
    st.booleans(),
)
def test_convolution_of_any_geometry(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    lengths: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    grid: Grid,
    channels_last: bool,
) -> None:
    geometry = ConvolutionGeometry(*lengths)
    sizes = large_enough(size[1:], kernel, geometry)
    codes, weight = random_codes((size[0], inputs, *sizes), dtype), random_weight(outputs, inputs, *kernel)
    if channels_last:
        codes = codes.contiguous(memory_format=torch.channels_last)
    zero_point = random_zero_point(dtype)
    sums = convolution_sums(codes, weight, zero_point, geometry)
    assert_layer(ConvolutionProduct(weight, zero_point, dtype, geometry), codes, sums, grid)


@given(
    st.integers(1, 140),
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    st.tuples(PAIRS, st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIRS),
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 12)),
    st.sampled_from(DTYPES),
    st.sampled_from(GRIDS),
    st.sampled_from(["contiguous", "channels last", "spread", "half of the channels"]),
)
def test_depthwise_convolution_of_any_geometry(
    channels: int,
    kernel: tuple[int, int],
    lengths: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    grid: Grid,
    layout: str,
) -> None:
    geometry = ConvolutionGeometry(*lengths, groups=channels)
    sizes = large_enough(size[1:], kernel, geometry)
    codes = layouts(random_codes((size[0], channels, *sizes), dtype))[layout]
    weight, zero_point = random_weight(channels, 1, *kernel), random_zero_point(dtype)
    sums = convolution_sums(codes, weight, zero_point, geometry)
    assert_layer(ConvolutionProduct(weight, zero_point, dtype, geometry), codes, sums, grid)


def large_enough(size: tuple[int, int], kernel: tuple[int, int], geometry: ConvolutionGeometry) -> tuple[int, int]:
    """The size, or the smallest that the kernel fits into."""
    height, width = (
        max(length, dilation * (taps - 1) + 1 - 2 * padding)
        for length, taps, padding, dilation in zip(size, kernel, geometry.padding, geometry.dilation, strict=True)
    )
    return height, width


@pytest.mark.parametrize("width", range(1, 36))
@pytest.mark.parametrize("outputs", [16, 32, 65])
def test_convolution_of_every_width(width: int, outputs: int) -> None:
    geometry = ConvolutionGeometry((1, 1), (1, 1), (1, 1))
    codes, weight = random_codes((2, 3, 2, width), UNSIGNED), random_weight(outputs, 3, 3, 3)
    sums = convolution_sums(codes, weight, 7, geometry)
    assert_layer(ConvolutionProduct(weight, 7, UNSIGNED, geometry), codes, sums, GRIDS[1])


@pytest.mark.parametrize("channels", [*range(1, 21), 31, 32, 33, 48])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_of_every_number_of_channels_however_they_lie(kernel: int, channels: int) -> None:
    geometry = ConvolutionGeometry((1, 1), (kernel // 2,) * 2, (1, 1))
    weight = random_weight(4, channels, kernel, kernel)
    for codes in layouts(random_codes((2, channels, 3, 21), SIGNED)).values():
        sums = convolution_sums(codes, weight, -7, geometry)
        assert_layer(ConvolutionProduct(weight, -7, SIGNED, geometry), codes, sums, GRIDS[3])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 40, 33, 32), (7, 40, 16, 15), (2, 300, 4, 4), (1, 300, 1, 1), (50, 64, 8, 8)])
@pytest.mark.parametrize("outputs", [16, 100])
def test_any_number_of_threads(shape: tuple[int, ...], outputs: int) -> None:
    geometry = ConvolutionGeometry((1, 1), (1, 1), (1, 1))
    weight = random_weight(outputs, shape[1], 3, 3)
    codes = random_codes(shape, UNSIGNED).contiguous(memory_format=torch.channels_last)
    sums = convolution_sums(codes, weight, 30, geometry)
    assert_layer(ConvolutionProduct(weight, 30, UNSIGNED, geometry), codes, sums, GRIDS[2])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 300, 50, 50), (5, 70, 30, 30), (1, 4000, 9, 9)])
def test_depthwise_convolution_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    geometry = ConvolutionGeometry((2, 2), (1, 1), (1, 1), shape[1])
    weight = random_weight(shape[1], 1, 3, 3)
    codes = random_codes(shape, SIGNED).contiguous(memory_format=torch.channels_last)
    sums = convolution_sums(codes, weight, 30, geometry)
    assert_layer(ConvolutionProduct(weight, 30, SIGNED, geometry), codes, sums, GRIDS[2])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_linear_on_any_number_of_threads(rows: int) -> None:
    codes, weight = random_codes((rows, 2000), SIGNED), random_weight(700, 2000)
    assert_layer(LinearProduct(weight, 0, SIGNED), codes, codes.long() @ weight.long().t(), GRIDS[0])


def test_codes_come_out_channels_last() -> None:
    product = ConvolutionProduct(random_weight(5, 3, 3, 3), 0, UNSIGNED, ConvolutionGeometry((1, 1), (1, 1), (1, 1)))
    epilogue = Epilogue(torch.zeros(5, dtype=torch.int32), torch.ones(1), dtype=SIGNED, lowest=-128, highest=127)
    layer = IntegerLayer(product, epilogue)
    codes = random_codes((2, 3, 4, 4), UNSIGNED)
    assert layer(codes).is_contiguous(memory_format=torch.channels_last)
    with kernels.reference_kernels():
        assert layer(codes).is_contiguous(memory_format=torch.channels_last)


# What sums may be


@pytest.mark.parametrize("bias", [2**24, 2**30, -(2**30)])
def test_accumulators_beyond_float32_are_integers(bias: int) -> None:
    product = LinearProduct(torch.ones(1, 2, dtype=torch.int8), 0, UNSIGNED)
    epilogue = Epilogue(torch.tensor([bias], dtype=torch.int32), torch.tensor([1.0]))
    codes = torch.tensor([[1, 0], [1, 1], [2, 1]], dtype=UNSIGNED)
    expected = (codes.sum(1, keepdim=True) + bias).to(FLOATS)
    layer = IntegerLayer(product, epilogue)
    assert_same(layer(codes), expected)
    with kernels.reference_kernels():
        assert_same(layer(codes), expected)


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize(("code", "dtype", "zero_point"), [(255, UNSIGNED, 0), (0, UNSIGNED, 255), (-128, SIGNED, 127)])
def test_the_largest_products(code: int, dtype: torch.dtype, zero_point: int, value: int) -> None:
    geometry = ConvolutionGeometry((1, 1), (0, 0), (1, 1))
    codes = torch.full((1, 700, 3, 3), code, dtype=dtype)
    weight = torch.full((17, 700, 3, 3), value, dtype=torch.int8)
    sums = convolution_sums(codes, weight, zero_point, geometry)
    assert abs(int(sums[0, 0])) == 255 * abs(value) * 6300
    assert_layer(ConvolutionProduct(weight, zero_point, dtype, geometry), codes, sums, GRIDS[4])


# Around the largest pair whose products by 255 stay within 16 bits.
EXTREME_WEIGHTS = st.sampled_from([-128, -127, -65, -64, -1, 0, 1, 63, 64, 65, 127])


@given(st.data())
def test_pairs_of_products_that_exceed_16_bits(data: st.DataObject) -> None:
    """Instructions that add two products in 16 bits saturate there; layers are packed so that they do not."""
    depthwise = data.draw(st.booleans())
    inputs, outputs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    kernel = data.draw(st.sampled_from([1, 2, 3]))
    outputs, groups = (inputs, inputs) if depthwise else (outputs, 1)
    shape = (outputs, inputs // groups, kernel, kernel)
    count = math.prod(shape)
    few = data.draw(st.lists(EXTREME_WEIGHTS, min_size=1, max_size=12))
    weight = torch.tensor((few * count)[:count], dtype=torch.int8).reshape(shape)
    codes = torch.tensor([255, data.draw(st.integers(0, 255))], dtype=UNSIGNED).repeat(inputs * 25)[: inputs * 25]
    codes = codes.reshape(1, inputs, 5, 5)
    geometry = ConvolutionGeometry((1, 1), (0, 0), (1, 1), groups)
    sums = convolution_sums(codes, weight, 0, geometry)
    assert_layer(ConvolutionProduct(weight, 0, UNSIGNED, geometry), codes, sums, GRIDS[4])


@needs_compiled_kernels
@pytest.mark.parametrize("groups", [1, 64])
def test_weights_of_seven_bits_are_packed_in_a_byte_each(groups: int) -> None:
    """Whatever the processor: no pair of them exceeds 16 bits. Of eight bits, AVX2 needs up to twice as many."""
    geometry = ConvolutionGeometry((1, 1), (0, 0), (1, 1), groups)

    def packed_bytes(value: int) -> int:
        weight = torch.full((64, 64 // groups, 3, 3), value, dtype=torch.int8)
        epilogue = Epilogue(torch.zeros(64, dtype=torch.int32), torch.ones(64))
        return CompiledLayer(ConvolutionProduct(weight, 0, UNSIGNED, geometry), epilogue).packed.nbytes

    assert packed_bytes(63) == packed_bytes(64) == packed_bytes(-64) == packed_bytes(0)
    grows = kernels.instruction_set() in ("avx2", "avx512")
    assert (packed_bytes(65) > 1.4 * packed_bytes(64)) is grows


def test_sums_that_may_exceed_int32_are_refused() -> None:
    product = LinearProduct(torch.full((1, 2), 127, dtype=torch.int8), 0, UNSIGNED)
    with pytest.raises(OverflowError, match=r"weight of shape \(1, 2\) may exceed int32"):
        IntegerLayer(product, Epilogue(torch.tensor([2**31 - 1], dtype=torch.int32), torch.ones(1)))


# Transposed convolutions


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "output_padding", "groups"),
    [((2, 2), 0, 1, 0, 1), ((2, 2), 1, 1, 1, 1), ((3, 3), 2, 1, 2, 1), ((1, 1), 1, 2, 0, 1), ((2, 1), 1, 1, 0, 2)],
)
def test_transposed_convolution(
    stride: tuple[int, int],
    padding: int,
    dilation: int,
    output_padding: int,
    groups: int,
    dtype: torch.dtype,
    grid: Grid,
) -> None:
    geometry = ConvolutionGeometry(stride, (padding,) * 2, (dilation,) * 2, groups)
    codes, weight, zero_point = random_codes((2, 4, 5, 6), dtype), random_weight(4, 3, 3, 4), random_zero_point(dtype)
    product = TransposedProduct(weight, zero_point, dtype, geometry, (output_padding, 0))
    sums = F.conv_transpose2d(
        codes.double() - zero_point, weight.double(), None, stride, padding, (output_padding, 0), groups, dilation
    )
    assert_layer(product, codes, sums.long(), grid)


# What the compiled kernels refuse


@needs_compiled_kernels
def test_layers_run_compiled_where_they_can() -> None:
    geometry = ConvolutionGeometry((1, 1), (0, 0), (1, 1))
    weight = random_weight(8, 4, 3, 3)
    products: list[tuple[Product, bool]] = [
        (LinearProduct(weight[:, :, 0, 0], 0, UNSIGNED), True),
        (ConvolutionProduct(weight, 0, UNSIGNED, geometry), True),
        (ConvolutionProduct(weight[:, :1], 0, UNSIGNED, geometry._replace(groups=8)), True),
        (ConvolutionProduct(weight, 0, UNSIGNED, geometry._replace(groups=2)), False),
    ]
    assert [plan(product.description) is COMPILED for product, _ in products] == [compiled for _, compiled in products]
    with kernels.reference_kernels():
        assert not any(plan(product.description) is COMPILED for product, _ in products)


@needs_compiled_kernels
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 5, 4, 4, dtype=UNSIGNED), "codes must have 4 channels, got 5"),
        (torch.zeros(1, 4, 2, 4, dtype=UNSIGNED), "kernel must fit into the padded input, got size 2, kernel 3"),
        (torch.zeros(4, 4, dtype=UNSIGNED), r"codes must have shape \(N, C, W\) or \(N, C, H, W\), got 2 dim"),
        (torch.zeros(1, 4, 4, 4, dtype=SIGNED), "codes must be uint8, as the layer was packed for"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor, message: str) -> None:
    product = ConvolutionProduct(random_weight(8, 4, 3, 3), 0, UNSIGNED, ConvolutionGeometry((1, 1), (0, 0), (1, 1)))
    layer = IntegerLayer(product, Epilogue(torch.zeros(8, dtype=torch.int32), torch.ones(8)))
    with pytest.raises(RuntimeError, match=message):
        layer(codes)


@needs_compiled_kernels
def test_what_was_not_packed_is_no_layer() -> None:
    codes = torch.zeros(1, 4, dtype=UNSIGNED)
    for block in (torch.zeros(10, dtype=UNSIGNED), torch.zeros(1000, dtype=UNSIGNED), torch.zeros(1000)):
        with pytest.raises(RuntimeError, match="layer must come from pack_layer"):
            packed_layer(codes, block, 4, (), (), (), (), 1, FLOATS)
