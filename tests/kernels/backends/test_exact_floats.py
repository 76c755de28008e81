"""Sums in floating point against int64 sums, exactly, around the ends of what float32 holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_codes import DTYPES, SIGNED, UNSIGNED, random_codes
from mlframework.quantization.kernels import ConvolutionGeometry, ConvolutionProduct, LinearProduct, TransposedProduct
from mlframework.quantization.kernels.backends.backend import EXACT_IN_FLOAT32
from mlframework.quantization.kernels.backends.exact_floats import (
    EXACT_FLOATS,
    WHOLE,
    exact_blocks,
    sums_in_floating_point,
)
from mlframework.quantization.kernels.products import Product, largest_sum

CONVOLUTIONS = {4: F.conv2d, 5: F.conv3d}


def test_blocks_are_the_channels_in_order_and_each_is_exact() -> None:
    weight = torch.full((2, 1001, 3, 3), -127, dtype=torch.int8)
    bound = largest_sum(weight, 0, UNSIGNED)
    blocks = exact_blocks(weight, 0, UNSIGNED, bound)
    assert len(blocks) == 1 + bound // EXACT_IN_FLOAT32 == 18
    assert torch.cat([torch.arange(1001)[block] for block in blocks]).tolist() == list(range(1001))
    assert all(largest_sum(weight[:, block], 0, UNSIGNED) < EXACT_IN_FLOAT32 for block in blocks)


def test_there_are_no_blocks_where_one_channel_is_too_much() -> None:
    weight = torch.full((1, 2, 23, 23), 127, dtype=torch.int8)
    assert exact_blocks(weight, 0, UNSIGNED, largest_sum(weight, 0, UNSIGNED)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [400, 517, 519, 4000])
@pytest.mark.parametrize("value", [-128, 127])
def test_sums_of_the_largest_products(features: int, value: int, dtype: torch.dtype) -> None:
    """517 products of 255 and 127 stay below 2**24, 519 do not; one code makes the sum odd, which floats lose first."""
    weight = torch.full((3, features), value, dtype=torch.int8)
    zero_point = torch.iinfo(dtype).min
    codes = torch.full((2, features), torch.iinfo(dtype).max, dtype=dtype)
    codes[0, 0] -= 1
    blocks = exact_blocks(weight, zero_point, dtype, largest_sum(weight, zero_point, dtype))
    sums = sums_in_floating_point(F.linear, codes, zero_point, weight, blocks)
    assert torch.equal(sums.long(), (codes.long() - zero_point) @ weight.long().t())
    assert sums.dtype is (torch.float32 if len(blocks) == 1 else torch.int32)


@pytest.mark.parametrize("blocks", [[], WHOLE, [slice(0, 2), slice(2, 3)]], ids=["float64", "one block", "two blocks"])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_convolutions_come_out_channels_last(blocks: list[slice], size: tuple[int, ...], layout: str) -> None:
    memory_format = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    codes = random_codes((2, 3, *size), SIGNED)
    if layout == "channels-last":
        codes = codes.contiguous(memory_format=memory_format)
    weight = random_codes((4, 3, *[2] * len(size)), SIGNED)
    convolution = CONVOLUTIONS[codes.dim()]
    sums = sums_in_floating_point(convolution, codes, -3, weight, blocks)
    assert torch.equal(sums.long(), convolution(codes.long() + 3, weight.long()))
    assert sums.is_contiguous(memory_format=memory_format)


def test_two_blocks_under_autocast() -> None:
    weight, codes = random_codes((4, 2000), SIGNED), random_codes((3, 2000), UNSIGNED)
    blocks = exact_blocks(weight, 0, UNSIGNED, largest_sum(weight, 0, UNSIGNED))
    assert len(blocks) > 1
    expected: Tensor = codes.long() @ weight.long().t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sums_in_floating_point(F.linear, codes, 0, weight, blocks).long(), expected)


@pytest.mark.parametrize(
    "product",
    [
        LinearProduct(random_codes((4, 8), SIGNED), 0, UNSIGNED),
        ConvolutionProduct(random_codes((4, 2, 3), SIGNED), 0, SIGNED, ConvolutionGeometry((1,), (0,), (1,), 2)),
        TransposedProduct(
            random_codes((4, 2, 3, 3), SIGNED), 0, SIGNED, ConvolutionGeometry((2, 2), (0, 0), (1, 1)), (0, 0)
        ),
    ],
    ids=lambda product: type(product).__name__,
)
def test_it_takes_every_layer_on_any_device(product: Product) -> None:
    assert EXACT_FLOATS.takes(product.description)
    assert EXACT_FLOATS.takes(product.description._replace(device="cuda"))
