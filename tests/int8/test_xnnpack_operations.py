"""Operations as XNNPACK computes them, against NumPy's float32 and Python's integers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import QuantizationParameters, QuantizationScheme
from mlframework.quantization.int8.average_pooling import Mean
from mlframework.quantization.int8.operations import Int8Operation
from mlframework.quantization.int8.xnnpack_operations import (
    FixedPointAddition,
    FloatMultiplierAverage,
    ReciprocalConcatenation,
    RoundedMultiplication,
)

SCHEME = QuantizationScheme(symmetric=False)


def grid(scale: float, zero_point: int) -> QuantizationParameters:
    return QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), SCHEME)


LEFT, RIGHT, OUTPUT = grid(0.031, -7), grid(0.0173, 11), grid(0.047, 3)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def values(codes: Tensor, parameters: QuantizationParameters) -> Tensor:
    return (codes.double() - parameters.zero_point) * parameters.scale.double()


def test_sums_are_within_a_step_of_the_real_ones_and_broadcast() -> None:
    """Half a step, and what 20 bits of a multiplier leave of 255 codes."""
    left, right = random_codes(2, 3, 5, 7), random_codes(3, 1, 1)
    for clip, low in (((-float("inf"), float("inf")), -128), ((0.0, float("inf")), 3)):
        total = Int8Operation(FixedPointAddition(), (LEFT, RIGHT), OUTPUT, clip)(left, right)
        real = (values(left, LEFT) + values(right, RIGHT)) / OUTPUT.scale.double() + 3
        assert (total - real.clamp(low, 127)).abs().max() <= 0.5 + 2 * 255 * 2.0**-21
        assert total.min() >= low


def test_products_round_before_the_zero_point_is_added() -> None:
    left, right = random_codes(4, 9), random_codes(4, 9)
    ratio = np.float32(0.031) * np.float32(0.0173) / np.float32(0.047)
    product = (left.numpy().astype(np.float32) + 7) * (right.numpy().astype(np.float32) - 11)
    expected = np.clip(np.rint(product * ratio) + 3, -128, 127)
    result = Int8Operation(RoundedMultiplication(), (LEFT, RIGHT), OUTPUT)(left, right)
    assert result.tolist() == expected.tolist()


def test_concatenations_change_grids_by_reciprocals() -> None:
    left, right = random_codes(2, 3), random_codes(2, 4)
    result = Int8Operation(ReciprocalConcatenation(1), (LEFT, RIGHT), OUTPUT)(left, right)
    expected = []
    for codes, scale, zero in ((left, 0.031, -7), (right, 0.0173, 11)):
        part = (codes.numpy().astype(np.float32) - zero) * np.float32(scale)
        expected.append(np.clip(np.rint(part * (np.float32(1) / np.float32(0.047))) + 3, -128, 127))
    assert result.tolist() == np.concatenate(expected, 1).tolist()


def test_averages_have_the_multiplier_of_a_depthwise_convolution() -> None:
    codes = random_codes(2, 3, 4, 6)
    for pooling, count in ((nn.AvgPool2d(2), 4), (nn.AdaptiveAvgPool2d(1), 24), (Mean((2, 3), True), 24)):
        result = Int8Operation(FloatMultiplierAverage(pooling), (LEFT,), OUTPUT)(codes)
        kernel = 2 if count == 4 else (4, 6)
        sums = F.avg_pool2d(codes.double() + 7, kernel, divisor_override=1).numpy().astype(np.float32)
        multiplier = np.float32(0.031) * (np.float32(1) / np.float32(count)) / np.float32(0.047)
        assert result.tolist() == np.clip(np.rint(sums * multiplier) + 3, -128, 127).tolist()
