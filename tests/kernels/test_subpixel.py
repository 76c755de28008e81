"""Transposed convolutions as convolutions of their phases, exactly, for any geometry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from mlframework.quantization.kernels import subpixel_convolution

LENGTHS = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(
    st.integers(1, 5),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    LENGTHS,
    LENGTHS,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_it_sums_what_a_transposed_convolution_sums(
    stride: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    size: tuple[int, int],
) -> None:
    assume(max(output_padding) < stride)
    assume(
        all(
            (n - 1) * stride - 2 * p + k + o >= 1
            for n, p, k, o in zip(size, padding, kernel, output_padding, strict=True)
        )
    )
    values = torch.randint(-9, 9, (2, 3, *size)).float()
    weight = torch.randint(-9, 9, (3, 2, *kernel)).float()
    expected = F.conv_transpose2d(values, weight, None, stride, padding, output_padding)
    subpixel = subpixel_convolution(weight, stride, padding, output_padding)
    assert subpixel.weight.shape[:2] == (2 * stride * stride, 3)
    assert min(*subpixel.crop, *subpixel.padding) >= 0
    assert torch.equal(subpixel.shuffled(F.conv2d(values, subpixel.weight, None, 1, subpixel.padding)), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "taps", "around", "crop"),
    [
        (2, 2, 0, 1, 0, (0, 0, 0, 0)),  # upsampling of a U-Net: nothing overlaps, nothing is cut off
        (4, 2, 1, 2, 1, (1, 1, 1, 1)),  # that of a DCGAN
        (3, 1, 1, 3, 1, (0, 0, 0, 0)),
    ],
)
def test_common_ones(
    kernel: int, stride: int, padding: int, taps: int, around: int, crop: tuple[int, int, int, int]
) -> None:
    weight = torch.randn(5, 7, kernel, kernel)
    subpixel = subpixel_convolution(weight, stride, (padding,) * 2, (0, 0))
    assert subpixel.weight.shape == (7 * stride**2, 5, taps, taps)
    assert subpixel.padding == (around, around)
    assert subpixel.crop == crop


def test_codes_stay_codes() -> None:
    weight = torch.randint(-128, 128, (3, 4, 3, 3), dtype=torch.int8)
    subpixel = subpixel_convolution(weight, 2, (1, 1), (1, 1))
    assert subpixel.weight.dtype is torch.int8
    assert subpixel.weight.is_contiguous()
    assert subpixel.weight.long().sum() == weight.long().sum()
    assert subpixel.shuffled(torch.zeros(1, 16, 5, 5, dtype=torch.uint8)).dtype is torch.uint8
