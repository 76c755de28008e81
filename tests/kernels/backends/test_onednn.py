"""Sums of convolutions by PyTorch's oneDNN, against int64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from example_codes import DTYPES, SIGNED, UNSIGNED, layouts, random_codes
from mlframework.quantization.kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    LinearProduct,
    TransposedProduct,
    onednn_is_exact,
)
from mlframework.quantization.kernels.backends import onednn
from mlframework.quantization.kernels.backends.backend import EXACT_IN_FLOAT32
from mlframework.quantization.kernels.backends.onednn import ONEDNN
from mlframework.quantization.kernels.backends.onednn_convolution import OnednnConvolution

needs_onednn = pytest.mark.skipif(not onednn_is_exact(), reason="needs oneDNN's integer kernel")
POINTWISE = ConvolutionGeometry((1, 1), (0, 0), (1, 1))


@pytest.mark.parametrize("is_exact", [False, True])
def test_it_takes_convolutions_in_two_dimensions_where_it_is_exact(
    is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "onednn_is_exact", lambda: is_exact)
    weight = random_codes((4, 8, 3, 3), SIGNED)
    taken: Any = [
        ConvolutionProduct(weight, 0, SIGNED, POINTWISE),
        TransposedProduct(weight, 0, SIGNED, POINTWISE, (0, 0)),
    ]
    assert all(ONEDNN.takes(product.description) is is_exact for product in taken)
    row = ConvolutionProduct(weight[..., 0], 0, SIGNED, ConvolutionGeometry((1,), (0,), (1,)))
    others = [LinearProduct(weight[..., 0, 0], 0, SIGNED).description, row.description]
    others.append(taken[0].description._replace(device="cuda"))
    assert not any(map(ONEDNN.takes, others))


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_sums_are_exact(groups: int, dtype: torch.dtype) -> None:
    geometry = ConvolutionGeometry((2, 1), (1, 2), (1, 2), groups)
    weight = random_codes((12, 6 // groups, 3, 2), SIGNED)
    ends = torch.iinfo(dtype)
    for zero_point in (ends.min, 5, ends.max):
        sums = ONEDNN.sums(ConvolutionProduct(weight, zero_point, dtype, geometry))
        for name, codes in layouts(random_codes((2, 6, 9, 7), dtype)).items():
            expected = F.conv2d(codes.long() - zero_point, weight.long(), None, *geometry)
            assert torch.equal(sums(codes).long(), expected), name


@needs_onednn
def test_beyond_float32_it_runs_in_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    class Recording(OnednnConvolution):
        def __init__(self, weight: Any, *arguments: Any) -> None:
            widths.append(weight.shape[1])
            super().__init__(weight, *arguments)

    monkeypatch.setattr(onednn, "OnednnConvolution", Recording)
    product = ConvolutionProduct(torch.full((2, 1001, 3, 3), -127, dtype=torch.int8), 0, UNSIGNED, POINTWISE)
    sums = ONEDNN.sums(product)
    assert len(widths) == 1 + product.bound // EXACT_IN_FLOAT32 == 18
    assert sum(widths) == 1001
    codes = torch.full((1, 1001, 3, 3), 255, dtype=UNSIGNED)
    codes[0, 0, 0, 0] = 254
    assert (sums(codes) == -127 * (255 * 1001 * 9 - 1)).all()


@needs_onednn
def test_a_graph_that_is_traced_and_an_empty_batch_are_left_to_floats() -> None:
    product = ConvolutionProduct(random_codes((4, 3, 3, 3), SIGNED), 5, UNSIGNED, POINTWISE)
    assert ONEDNN.sums(product)(torch.zeros(0, 3, 5, 5, dtype=UNSIGNED)).shape == (0, 4, 3, 3)
