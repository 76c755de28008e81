"""What becomes of sums: against the formulas, in float64 and in integers."""

from __future__ import annotations

import pytest
import torch

from example_codes import DTYPES
from mlframework.quantization.kernels import Epilogue

pytestmark = pytest.mark.usefixtures("_path")


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("multipliers", ["one", "one to a channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes(dtype: torch.dtype, multipliers: str, channel_axis: int) -> None:
    shape = (3, 5, 4) if channel_axis == 1 else (3, 4, 5)
    sums = torch.randint(-5000, 5000, shape, dtype=torch.int32)
    bias = torch.randint(-500, 500, (5,), dtype=torch.int32)
    multiplier = torch.rand(5 if multipliers != "one" else 1) * 0.05
    lowest = torch.iinfo(dtype).min
    epilogue = Epilogue(bias, multiplier, lowest + 9, lowest + 3, lowest + 250, dtype)
    along = (1, -1, 1) if channel_axis == 1 else (1, 1, -1)
    factor = multiplier.expand(5).reshape(along)
    # A float32 product of two float32 numbers, rounded half to even.
    products = ((sums + bias.reshape(along)).double() * factor.double()).float()
    expected = (products.round().long() + lowest + 9).clamp(lowest + 3, lowest + 250)
    assert torch.equal(epilogue(sums, bias, channel_axis).long(), expected)
    # Sums that are small are exact in floating point, with the bias.
    assert torch.equal(epilogue(sums.float(), bias.float(), channel_axis).long(), expected)
    assert epilogue(sums, bias, channel_axis).dtype is dtype


def test_values() -> None:
    sums, bias = torch.randint(-5000, 5000, (3, 5), dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    epilogue = Epilogue(bias, torch.full((5,), 0.5), lowest=-100.0, highest=6.0)
    assert torch.equal(epilogue(sums, bias, 1), ((sums + bias) / 2).clamp(-100, 6))


def test_an_accumulator_beyond_float32_is_an_integer() -> None:
    bias = torch.tensor([2**24], dtype=torch.int32)
    sums = torch.tensor([[2**24 - 1.0]])
    # 2**25 - 1 is no float32; rounded to even it is 2**25, and only then multiplied.
    assert Epilogue(bias, torch.tensor([2.0**-25]))(sums, bias, 1).item() == 1.0
