"""The integer grid: its ends, its storage, its axis, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch

from mlframework.quantization import QuantizationScheme

BOTH = (False, True)
ALL_GRIDS = [
    QuantizationScheme(bits, signed, symmetric, narrow)
    for bits, signed, symmetric, narrow in itertools.product(range(2, 9), BOTH, BOTH, BOTH)
]


def test_default_is_symmetric_int8_per_tensor() -> None:
    scheme = QuantizationScheme()
    assert (scheme.bits, scheme.signed, scheme.symmetric, scheme.narrow_range) == (8, True, True, False)
    assert scheme.channel_axis is None


@pytest.mark.parametrize(
    ("bits", "signed", "narrow_range", "ends"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (8, False, True, (1, 255)),
        (4, True, False, (-8, 7)),
        (4, True, True, (-7, 7)),
        (4, False, False, (0, 15)),
        (2, True, False, (-2, 1)),
        (2, True, True, (-1, 1)),
        (2, False, True, (1, 3)),
    ],
)
def test_ends_of_the_grid(bits: int, signed: bool, narrow_range: bool, ends: tuple[int, int]) -> None:
    scheme = QuantizationScheme(bits, signed, narrow_range=narrow_range)
    assert (scheme.quant_min, scheme.quant_max) == ends


@pytest.mark.parametrize("scheme", ALL_GRIDS, ids=str)
def test_grid_fits_its_dtype_and_holds_its_zero(scheme: QuantizationScheme) -> None:
    assert scheme.dtype is (torch.int8 if scheme.signed else torch.uint8)
    storage = torch.iinfo(scheme.dtype)
    assert storage.min <= scheme.quant_min < scheme.quant_max <= storage.max
    assert scheme.quant_max - scheme.quant_min + 1 == 2**scheme.bits - scheme.narrow_range
    assert scheme.quant_min <= scheme.symmetric_zero_point <= scheme.quant_max


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_signed_grid_is_closed_under_negation(bits: int) -> None:
    scheme = QuantizationScheme(bits, narrow_range=True)
    assert scheme.quant_min == -scheme.quant_max


@pytest.mark.parametrize(
    ("axis", "dimensions", "expected"), [(None, 0, None), (0, 1, 0), (1, 4, 1), (-1, 4, 3), (-4, 4, 0)]
)
def test_channel_axis_resolves(axis: int | None, dimensions: int, expected: int | None) -> None:
    assert QuantizationScheme(channel_axis=axis).resolve_channel_axis(dimensions) == expected


@pytest.mark.parametrize(("axis", "dimensions"), [(1, 1), (-2, 1), (4, 4), (-5, 4), (0, 0)])
def test_channel_axis_out_of_range(axis: int, dimensions: int) -> None:
    with pytest.raises(ValueError, match=rf"channel_axis {axis} is out of range for a tensor of {dimensions} dim"):
        QuantizationScheme(channel_axis=axis).resolve_channel_axis(dimensions)


@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be between 2 and 8, got {bits}"):
        QuantizationScheme(bits=bits)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 8.0, r"bits must be an int, got 8\.0"),
        ("bits", True, "bits must be an int, got True"),
        ("bits", "8", "bits must be an int, got '8'"),
        ("signed", 1, "signed must be a bool, got 1"),
        ("symmetric", None, "symmetric must be a bool, got None"),
        ("narrow_range", "no", "narrow_range must be a bool, got 'no'"),
        ("channel_axis", 0.0, r"channel_axis must be an int or None, got 0\.0"),
        ("channel_axis", True, "channel_axis must be an int or None, got True"),
    ],
)
def test_fields_of_the_wrong_type(field: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantizationScheme(**{field: value})


def test_is_an_immutable_value() -> None:
    scheme = QuantizationScheme(bits=4, channel_axis=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bits = 8  # type: ignore[misc]
    assert scheme == QuantizationScheme(bits=4, channel_axis=0) != QuantizationScheme(bits=4)
    assert len({scheme, QuantizationScheme(bits=4, channel_axis=0)}) == 1
    assert pickle.loads(pickle.dumps(scheme)) == copy.deepcopy(scheme) == scheme


def test_reads_well() -> None:
    assert str(QuantizationScheme()) == "int8 [-128, 127] symmetric, per tensor"
    assert str(QuantizationScheme(4, False, False, channel_axis=1)) == "uint4 [0, 15] affine, per channel 1"
