"""XNNPACK's formulas, against Python's integers and NumPy's float32."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mlframework.quantization import QuantizationScheme, xnnpack_arithmetic

SCHEME = QuantizationScheme(symmetric=False)
codes = st.integers(-128, 127)
scales = st.floats(2.0**-9, 8.0, width=32)


def tensor(value: float) -> Tensor:
    return torch.tensor([value])


@given(codes, codes, scales, scales, scales, codes, codes, codes)
def test_fixed_point_sum(a: int, b: int, sa: float, sb: float, sy: float, za: int, zb: int, zy: int) -> None:
    """As XNNPACK's scalar kernel, in Python's integers."""
    left, right = (np.float32(scale) / np.float32(sy) for scale in (sa, sb))
    shift = min(20 - (math.frexp(max(left, right))[1] - 1), 30)
    left_multiplier, right_multiplier = (int(np.rint(ratio * np.float32(2.0**shift))) for ratio in (left, right))
    total = (a - za) * left_multiplier + (b - zb) * right_multiplier + (1 << (shift - 1))
    expected = min(max((total >> shift) + zy, -128), 127)
    zero_points = [torch.tensor([zero], dtype=torch.int32) for zero in (za, zb, zy)]
    constants = xnnpack_arithmetic.fixed_point_sum_constants(
        tensor(sa), zero_points[0], tensor(sb), zero_points[1], tensor(sy)
    )
    operands = (torch.tensor([code], dtype=torch.int8) for code in (a, b))
    result = xnnpack_arithmetic.fixed_point_sum(*operands, constants, zero_points[2], -128, 127, torch.int8)
    assert result.tolist() == [expected]


def test_a_tie_of_a_sum_is_rounded_up() -> None:
    """Where the sum of ONNX Runtime rounds to even."""
    zero = torch.zeros(1, dtype=torch.int32)
    constants = xnnpack_arithmetic.fixed_point_sum_constants(tensor(0.5), zero, tensor(0.5), zero, tensor(1.0))
    left = torch.tensor([0, 1, 2, -1, -3], dtype=torch.int8)
    right = torch.tensor([1, 0, 3, 0, 0], dtype=torch.int8)
    total = xnnpack_arithmetic.fixed_point_sum(left, right, constants, zero, -128, 127, torch.int8)
    assert total.tolist() == [1, 1, 3, 0, -1]


@given(scales, codes, scales, codes)
def test_table_of_a_change_of_grid(sx: float, zx: int, sy: float, zy: int) -> None:
    """float32 products, the reciprocal rounded before."""
    table = xnnpack_arithmetic.reciprocal_table(
        tensor(sx), torch.tensor([zx]), SCHEME, tensor(sy), torch.tensor([zy]), SCHEME
    )
    values = (np.arange(-128, 128) - zx).astype(np.float32) * np.float32(sx)
    expected = np.rint(values * (np.float32(1) / np.float32(sy))) + zy
    assert table.tolist() == np.clip(expected, -128, 127).tolist()


@given(st.floats(2.0**-30, 2.0**30, width=32), codes)
def test_a_change_to_the_same_grid_changes_nothing(scale: float, zero: int) -> None:
    grid = tensor(scale), torch.tensor([zero]), SCHEME
    assert xnnpack_arithmetic.reciprocal_table(*grid, *grid).tolist() == list(range(-128, 128))
