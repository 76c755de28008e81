"""Sums of linear layers by ``torch._int_mm``, against int64, whatever this processor makes best."""

from __future__ import annotations

import pytest
import torch

from example_codes import DTYPES, SIGNED, layouts, random_codes
from mlframework.quantization.kernels import ConvolutionGeometry, ConvolutionProduct, LinearProduct, int_mm_is_exact
from mlframework.quantization.kernels.backends import int_mm
from mlframework.quantization.kernels.backends.int_mm import INT_MM

needs_int_mm = pytest.mark.skipif(not int_mm_is_exact("cpu"), reason="needs an exact torch._int_mm")


@pytest.mark.parametrize("is_best", [False, True])
def test_it_takes_linear_layers_where_it_is_best(is_best: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_mm, "int_mm_is_best", lambda device: is_best)
    assert INT_MM.takes(LinearProduct(random_codes((4, 8), SIGNED), 0, SIGNED).description) is is_best
    geometry = ConvolutionGeometry((1,), (0,), (1,))
    assert not INT_MM.takes(ConvolutionProduct(random_codes((4, 8, 1), SIGNED), 0, SIGNED, geometry).description)


@needs_int_mm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17,), (0, 17), (5, 17), (2, 3, 17), (40, 64)])
def test_sums_are_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_codes((9, shape[-1]), SIGNED)
    ends = torch.iinfo(dtype)
    for zero_point in (ends.min, 7, ends.max):
        sums = INT_MM.sums(LinearProduct(weight, zero_point, dtype))
        for name, codes in layouts(random_codes(shape, dtype)).items():
            before = codes.clone()
            assert torch.equal(sums(codes).long(), (codes.long() - zero_point) @ weight.long().t()), name
            assert torch.equal(codes, before)


@needs_int_mm
def test_they_are_int32_however_large() -> None:
    features = 2001
    weight = torch.full((2, features), 127, dtype=torch.int8)
    sums = INT_MM.sums(LinearProduct(weight, -128, SIGNED))(torch.full((3, features), 127, dtype=SIGNED))
    assert sums.dtype is torch.int32
    assert (sums == 255 * 127 * features).all()
