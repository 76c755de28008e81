"""Products against int64 sums, exactly: on the best backend of this machine and on the one for every machine."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from example_codes import SIGNED, UNSIGNED, random_codes
from mlframework.quantization.kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    LinearProduct,
    TransposedProduct,
    onednn_is_exact,
)
from mlframework.quantization.kernels.backends.backend import EXACT_IN_FLOAT32, SumsBackend
from mlframework.quantization.kernels.backends.exact_floats import EXACT_FLOATS
from mlframework.quantization.kernels.plan import plan_sums
from mlframework.quantization.kernels.products import Product, largest_sum

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Backends:
    """Of sums: the best one of this machine for a product, or the one that takes every product."""

    is_best = True

    def sums(self, product: Product) -> Callable[[Tensor], Tensor]:
        backend: SumsBackend = plan_sums(product.description) if self.is_best else EXACT_FLOATS
        return backend.sums(product)


BACKENDS = Backends()


@pytest.fixture(params=["best", "exact floats"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on the best backend of this machine and again as on a machine that has none."""
    monkeypatch.setattr(BACKENDS, "is_best", request.param == "best")


on_both_backends = pytest.mark.usefixtures("_backend")


def linear(weight: Tensor, zero_point: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return BACKENDS.sums(LinearProduct(weight, zero_point, dtype))


def convolution(
    weight: Tensor, zero_point: int, dtype: torch.dtype, geometry: ConvolutionGeometry
) -> Callable[[Tensor], Tensor]:
    return BACKENDS.sums(ConvolutionProduct(weight, zero_point, dtype, geometry))


def transposed(
    weight: Tensor, zero_point: int, dtype: torch.dtype, geometry: ConvolutionGeometry, output_padding: tuple[int, int]
) -> Callable[[Tensor], Tensor]:
    return BACKENDS.sums(TransposedProduct(weight, zero_point, dtype, geometry, output_padding))


def random_weight(*shape: int, bits: int = 8) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


def geometry_of(
    dimensions: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> ConvolutionGeometry:
    return ConvolutionGeometry((stride,) * dimensions, (padding,) * dimensions, (dilation,) * dimensions, groups)


def exact_linear(codes: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    return (codes.long() - zero_point) @ weight.long().t()


def exact_convolution(codes: Tensor, weight: Tensor, zero_point: int, geometry: ConvolutionGeometry) -> Tensor:
    # PyTorch convolves int64 on the CPU, in integer arithmetic. The padding is code zero_point, which is value 0.
    return CONVOLUTIONS[weight.dim() - 2](codes.long() - zero_point, weight.long(), None, *geometry)


def assert_exact(sums: Tensor, expected: Tensor) -> None:
    assert sums.dtype in (torch.float32, torch.int32)
    assert sums.shape == expected.shape
    assert torch.equal(sums.to(torch.int64), expected)
    if sums.dtype is torch.float32 and sums.numel() > 0:
        assert expected.abs().max() < EXACT_IN_FLOAT32


# Linear


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (5, 17), (2, 3, 17), (40, 64)])
def test_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    codes, weight = random_codes(shape, dtype), random_weight(9, shape[-1])
    assert_exact(linear(weight, 7, dtype)(codes), exact_linear(codes, weight, 7))


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
def test_linear_at_every_zero_point(dtype: torch.dtype) -> None:
    codes, weight = random_codes((4, 16), dtype), random_weight(8, 16)
    ends = torch.iinfo(dtype)
    for zero_point in range(ends.min, ends.max + 1):
        assert_exact(linear(weight, zero_point, dtype)(codes), exact_linear(codes, weight, zero_point))


@on_both_backends
@pytest.mark.parametrize(("code", "dtype", "zero_point"), [(255, UNSIGNED, 0), (0, UNSIGNED, 255), (-128, SIGNED, 127)])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("features", [8, 512, 700])
def test_linear_of_extreme_codes(code: int, dtype: torch.dtype, zero_point: int, value: int, features: int) -> None:
    codes = torch.full((32, features), code, dtype=dtype)
    weight = torch.full((16, features), value, dtype=torch.int8)
    assert LinearProduct(weight, zero_point, dtype).bound == 255 * abs(value) * features
    assert_exact(linear(weight, zero_point, dtype)(codes), exact_linear(codes, weight, zero_point))


@on_both_backends
def test_linear_of_odd_sums_beyond_float32() -> None:
    codes = torch.full((3, 2001), 255, dtype=UNSIGNED)
    weight = torch.full((2, 2001), 127, dtype=torch.int8)
    expected = exact_linear(codes, weight, 0)
    # Odd and above 2**24: not a float32 number, so only integers hold it.
    assert expected[0, 0] % 2 == 1
    assert expected[0, 0] > EXACT_IN_FLOAT32
    sums = linear(weight, 0, UNSIGNED)(codes)
    assert sums.dtype is torch.int32
    assert_exact(sums, expected)


@on_both_backends
def test_linear_of_transposed_and_spread_codes() -> None:
    weight = random_weight(8, 24)
    packed = linear(weight, 100, UNSIGNED)
    wide = random_codes((24, 40), UNSIGNED)
    for codes in (wide.t(), random_codes((20, 48), UNSIGNED)[:, ::2], random_codes((1, 24), UNSIGNED).expand(20, 24)):
        assert not codes.is_contiguous()
        assert_exact(packed(codes), exact_linear(codes, weight, 100))


@on_both_backends
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_linear_of_no_rows(shape: tuple[int, ...]) -> None:
    assert linear(random_weight(8, 16), 3, SIGNED)(torch.empty(shape, dtype=SIGNED)).shape == (*shape[:-1], 8)


# Convolutions


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": 2, "dilation": 2},
        {"stride": 3, "padding": 2, "dilation": 2},
        {"groups": 2, "padding": 1},
        {"groups": 8, "padding": 1},
        {"groups": 8, "stride": 2, "padding": 1, "dilation": 2},
    ],
    ids=str,
)
def test_convolution(dtype: torch.dtype, dimensions: int, options: dict[str, int]) -> None:
    geometry = geometry_of(dimensions, **options)
    codes = random_codes((2, 8, *[9, 7, 6][:dimensions]), dtype)
    weight = random_weight(16, 8 // geometry.groups, *[3] * dimensions)
    packed = convolution(weight, 5, dtype, geometry)
    assert_exact(packed(codes), exact_convolution(codes, weight, 5, geometry))


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_at_every_zero_point(dtype: torch.dtype, groups: int) -> None:
    geometry = geometry_of(2, padding=1, groups=groups)
    codes, weight = random_codes((1, 4, 3, 3), dtype), random_weight(4, 4 // groups, 3, 3)
    ends = torch.iinfo(dtype)
    for zero_point in range(ends.min, ends.max + 1):
        packed = convolution(weight, zero_point, dtype, geometry)
        assert_exact(packed(codes), exact_convolution(codes, weight, zero_point, geometry))


@on_both_backends
@pytest.mark.parametrize("channels", [(1, 1), (3, 32), (17, 5), (64, 64)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (1, 5)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_convolution_of_many_shapes(channels: tuple[int, int], kernel: tuple[int, int], bits: int) -> None:
    geometry = ConvolutionGeometry((1, 2), (kernel[0] // 2, kernel[1] // 2), (1, 1))
    codes = random_codes((1, channels[0], 8, 9), UNSIGNED)
    weight = random_weight(channels[1], channels[0], *kernel, bits=bits)
    packed = convolution(weight, 200, UNSIGNED, geometry)
    assert_exact(packed(codes), exact_convolution(codes, weight, 200, geometry))


@on_both_backends
@pytest.mark.parametrize(("channels", "groups"), [(512, 1), (700, 1), (1040, 1), (1040, 2)])
@pytest.mark.parametrize(("code", "dtype", "zero_point"), [(255, UNSIGNED, 0), (127, SIGNED, -128)])
def test_convolution_of_odd_sums_beyond_float32(
    channels: int, groups: int, code: int, dtype: torch.dtype, zero_point: int
) -> None:
    geometry = geometry_of(2, padding=1, groups=groups)
    codes = torch.full((1, channels, 3, 3), code, dtype=dtype)
    codes[:, 0] = code - 1
    weight = torch.full((4, channels // groups, 3, 3), 127, dtype=torch.int8)
    expected = exact_convolution(codes, weight, zero_point, geometry)
    sums = convolution(weight, zero_point, dtype, geometry)(codes)
    assert (expected[0, 0, 1, 1] % 2 == 1) == (channels // groups % 2 == 0)
    if expected.max() > EXACT_IN_FLOAT32:
        assert sums.dtype is torch.int32
    assert_exact(sums, expected)


@on_both_backends
def test_one_channel_beyond_float32() -> None:
    # No block of channels is small enough: 23 x 23 taps of the largest products are above 2**24.
    weight = torch.full((1, 1, 23, 23), 127, dtype=torch.int8)
    codes = torch.full((1, 1, 23, 23), 255, dtype=UNSIGNED)
    assert convolution(weight, 0, UNSIGNED, geometry_of(2))(codes).item() == 23 * 23 * 127 * 255


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
def test_convolution_whatever_the_strides(dtype: torch.dtype) -> None:
    geometry, weight = geometry_of(2, padding=1), random_weight(8, 6, 3, 3)
    packed = convolution(weight, 3, dtype, geometry)
    codes = random_codes((3, 6, 5, 8), dtype)
    views = [
        codes.contiguous(memory_format=torch.channels_last),
        random_codes((3, 12, 5, 8), dtype)[:, ::2],
        random_codes((8, 5, 6, 3), dtype).permute(3, 2, 1, 0),
        random_codes((1, 6, 5, 8), dtype).expand(3, -1, -1, -1),
        random_codes((3, 6, 5, 9), dtype)[..., 1:],
    ]
    for view in views:
        assert not view.is_contiguous()
        before = view.clone()
        assert_exact(packed(view), exact_convolution(view, weight, 3, geometry))
        assert torch.equal(view, before)


@on_both_backends
def test_weight_need_not_be_contiguous() -> None:
    weight = random_weight(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    codes = random_codes((1, 6, 5, 5), UNSIGNED)
    assert_exact(
        convolution(weight, 0, UNSIGNED, geometry_of(2))(codes),
        exact_convolution(codes, weight, 0, geometry_of(2)),
    )


@on_both_backends
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolution_of_an_empty_batch(dimensions: int) -> None:
    packed = convolution(random_weight(5, 3, *[3] * dimensions), 3, SIGNED, geometry_of(dimensions))
    sums = packed(torch.empty(0, 3, *[4] * dimensions, dtype=SIGNED))
    assert sums.shape == (0, 5, *[2] * dimensions)


# Transposed convolution


@on_both_backends
@pytest.mark.parametrize("dtype", [SIGNED, UNSIGNED])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "output_padding"), [(1, 0, 1, 0), (2, 1, 1, 1), (3, 2, 2, 1), (2, 0, 2, 1)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(
    dtype: torch.dtype, stride: int, padding: int, dilation: int, output_padding: int, groups: int
) -> None:
    geometry = geometry_of(2, stride, padding, dilation, groups)
    codes, weight = random_codes((2, 4, 5, 6), dtype), random_weight(4, 3, 3, 3)
    expected = exact_transposed(codes, weight, 9, geometry, output_padding)
    packed = transposed(weight, 9, dtype, geometry, (output_padding,) * 2)
    assert_exact(packed(codes), expected)


def exact_transposed(
    codes: Tensor, weight: Tensor, zero_point: int, geometry: ConvolutionGeometry, output_padding: int
) -> Tensor:
    """Scatters every product to where it belongs, tap by tap."""
    values, taps = codes.long() - zero_point, weight.long()
    stride, padding, dilation, groups = geometry.stride[0], geometry.padding[0], geometry.dilation[0], geometry.groups
    kernel = taps.shape[2]
    sizes = [(size - 1) * stride + dilation * (kernel - 1) + 1 + output_padding for size in values.shape[2:]]
    sums = torch.zeros(values.shape[0], groups * taps.shape[1], *sizes, dtype=torch.int64)
    rows, columns = ((size - 1) * stride + 1 for size in values.shape[2:])
    grouped = values.unflatten(1, (groups, -1))
    for i, j in itertools.product(range(kernel), repeat=2):
        products = torch.einsum("ngihw,gio->ngohw", grouped, taps[:, :, i, j].unflatten(0, (groups, -1)))
        top, left = i * dilation, j * dilation
        sums[:, :, top : top + rows : stride, left : left + columns : stride] += products.flatten(1, 2)
    return sums[:, :, padding : sizes[0] - padding, padding : sizes[1] - padding]


@given(
    st.integers(1, 4),
    st.tuples(st.integers(1, 5), st.integers(1, 4)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([UNSIGNED, SIGNED]),
)
def test_transposed_convolution_by_phases_of_any_geometry(
    stride: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    assume(max(output_padding) < stride)
    sizes = [(n - 1) * stride - 2 * p + k + o for n, p, k, o in zip(size, padding, kernel, output_padding, strict=True)]
    assume(min(sizes) > 0)
    codes, weight, zero_point = random_codes((2, 3, *size), dtype), random_weight(3, 2, *kernel), 5
    geometry = ConvolutionGeometry((stride, stride), padding, (1, 1))
    product = TransposedProduct(weight, zero_point, dtype, geometry, output_padding)
    assert product.phases is not None
    expected = F.conv_transpose2d(codes.double() - zero_point, weight.double(), None, stride, padding, output_padding)
    assert_exact(BACKENDS.sums(product)(codes), expected.long())


@on_both_backends
def test_transposed_convolution_beyond_float32() -> None:
    codes = torch.full((1, 601, 3, 3), 255, dtype=UNSIGNED)
    weight = torch.full((601, 1, 3, 3), 127, dtype=torch.int8)
    geometry = geometry_of(2)
    expected = exact_transposed(codes, weight, 0, geometry, 0)
    assert expected.max() == 9 * 601 * 255 * 127
    sums = transposed(weight, 0, UNSIGNED, geometry, (0, 0))(codes)
    assert sums.dtype is torch.int32
    assert_exact(sums, expected)


@on_both_backends
def test_transposed_convolution_of_an_empty_batch() -> None:
    packed = transposed(random_weight(3, 5, 2, 2), 0, SIGNED, geometry_of(2), (0, 0))
    assert packed(torch.empty(0, 3, 4, 4, dtype=SIGNED)).shape == (0, 5, 5, 5)


# What all have in common


@pytest.mark.parametrize(
    ("dtype", "zero_point", "magnitude"),
    [(UNSIGNED, 0, 255), (UNSIGNED, 255, 255), (UNSIGNED, 100, 155), (SIGNED, 0, 128), (SIGNED, -128, 255)],
)
def test_bound_on_any_sum(dtype: torch.dtype, zero_point: int, magnitude: int) -> None:
    # -128 has no magnitude in int8.
    weight = torch.tensor([[-128, -128], [127, 127]], dtype=torch.int8)
    assert largest_sum(weight, zero_point, dtype) == 256 * magnitude


def test_a_description_tells_what_runs_a_product() -> None:
    geometry = geometry_of(2, stride=2, groups=4)
    product = ConvolutionProduct(random_weight(8, 1, 3, 3), 3, UNSIGNED, geometry)
    bound = int(product.weight.long().abs().flatten(1).sum(1).max()) * 252
    assert product.description == ("ConvolutionProduct", (8, 1, 3, 3), geometry, UNSIGNED, bound, "cpu")
    assert hash(product.description) == hash(ConvolutionProduct(product.weight, 3, UNSIGNED, geometry).description)
    assert not product.description.is_dense_or_depthwise
    depthwise = ConvolutionProduct(random_weight(4, 1, 3, 3), 3, UNSIGNED, geometry)
    assert depthwise.description.is_dense_or_depthwise
    assert LinearProduct(random_weight(8, 4), 3, UNSIGNED).description.is_dense_or_depthwise


@pytest.mark.parametrize(
    ("product", "shape"),
    [
        (LinearProduct(random_weight(8, 4), 3, UNSIGNED), (2, 4, 1, 1)),
        (ConvolutionProduct(random_weight(8, 2, 3), 3, UNSIGNED, geometry_of(1, 2, 1, 2, 2)), (2, 4, 1, 9)),
        (ConvolutionProduct(random_weight(8, 4, 3, 2), 3, UNSIGNED, geometry_of(2, 2, 1)), (2, 4, 7, 9)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Product) else str(value),
)
def test_a_product_as_a_convolution_in_two_dimensions(product: Product, shape: tuple[int, ...]) -> None:
    form = product.as_convolution()
    assert form is not None
    values = torch.randint(-9, 9, shape).double()
    own = values.reshape(product_shape(product, shape))
    expected = product.on_floats(own, product.weight.double())
    sums = F.conv2d(values, form.weight.double(), None, *form.geometry)
    assert torch.equal(sums.reshape(expected.shape), expected)


def product_shape(product: Product, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if product.weight.dim() == 2 else (*shape[:2], *shape[-(product.weight.dim() - 2) :])


def test_what_is_no_convolution_in_two_dimensions() -> None:
    assert ConvolutionProduct(random_weight(8, 4, 3, 3, 3), 3, UNSIGNED, geometry_of(3)).as_convolution() is None
    assert TransposedProduct(random_weight(8, 4, 3, 3), 3, UNSIGNED, geometry_of(2), (0, 0)).as_convolution() is None


@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "has_phases"),
    [((2, 2), 1, 1, True), ((1, 1), 1, 1, True), ((2, 1), 1, 1, False), ((2, 2), 2, 1, False), ((2, 2), 1, 2, False)],
)
def test_which_transposed_products_have_phases(
    stride: tuple[int, int], dilation: int, groups: int, has_phases: bool
) -> None:
    geometry = ConvolutionGeometry(stride, (0, 0), (dilation,) * 2, groups)
    product = TransposedProduct(random_weight(4, 4, 3, 3), 3, UNSIGNED, geometry, (0, 0))
    assert (product.phases is not None) is has_phases


@on_both_backends
@pytest.mark.parametrize("lower_precision", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(lower_precision: torch.dtype) -> None:
    codes = random_codes((2, 32, 6, 6), UNSIGNED)
    weight = random_weight(32, 32, 3, 3)
    with torch.autocast("cpu", dtype=lower_precision):
        rows = linear(weight[:, :, 0, 0], 3, UNSIGNED)(codes[:, :, 0, 0])
        planes = convolution(weight, 3, UNSIGNED, geometry_of(2))(codes)
        upscaled = transposed(weight, 3, UNSIGNED, geometry_of(2), (0, 0))(codes)
    assert_exact(rows, exact_linear(codes[:, :, 0, 0], weight[:, :, 0, 0], 3))
    assert_exact(planes, exact_convolution(codes, weight, 3, geometry_of(2)))
    assert_exact(upscaled, exact_transposed(codes, weight, 3, geometry_of(2), 0))


def run_without_vnni(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(not onednn_is_exact(), reason="the instruction set can only be lowered from one that is exact")
def test_without_vnni_probes_refuse_kernels_that_saturate_and_sums_are_exact() -> None:
    program = (
        "import sys, pytest\n"
        "from mlframework.quantization.kernels import *\n"
        "print(onednn_is_exact(), int_mm_is_exact('cpu'), flush=True)\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    result = run_without_vnni("-c", program, __file__, "-m", "not slow", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert result.stdout.splitlines()[0] == "False False"
