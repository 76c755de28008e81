"""Kernels that round, on whatever scale, against the formulas, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from example_codes import DTYPES, SIGNED, every_code, layouts, random_codes
from example_operators import assert_same
from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED

pytestmark = pytest.mark.interpreter

# Any float32 within these bounds, and the powers of two, of which halves and sums are exact.
SCALES = st.one_of(st.floats(2.0**-20, 2.0**20, width=32), st.integers(-20, 20).map(lambda exponent: 2.0**exponent))


class Grid:
    """Codes of a dtype from one end to another, with a zero point among them."""

    def __init__(self, data: st.DataObject) -> None:
        self.dtype = data.draw(st.sampled_from(DTYPES))
        limits = torch.iinfo(self.dtype)
        self.lowest, self.zero_point, self.highest = sorted(
            data.draw(st.integers(limits.min, limits.max)) for _ in range(3)
        )
        self.scale = number(data.draw(SCALES))


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)


def with_neighbours(values: Tensor) -> Tensor:
    """The values, and the next smaller and larger float32 of each."""
    ends = torch.tensor(-torch.inf), torch.tensor(torch.inf)
    return torch.cat([values, *(torch.nextafter(values, end) for end in ends)])


def assert_reference(name: str, *arguments: Any) -> None:
    operator = DECLARED[name]
    with kernels.interpreted_kernels():
        actual = operator.run(*arguments)
    assert_same(actual, operator.reference(*arguments))


@settings(max_examples=25)
@given(data=st.data())
def test_quantize_at_ties_and_beside_them(data: st.DataObject) -> None:
    grid = Grid(data)
    halves = torch.arange(grid.lowest - 2, grid.highest + 2, dtype=torch.float32) - grid.zero_point + 0.5
    values = with_neighbours(halves * grid.scale)
    for zero_point in (number(grid.zero_point), number(grid.zero_point).int()):
        assert_reference("quantize", values, grid.scale, zero_point, grid.lowest, grid.highest, grid.dtype, -1)


def test_nan_has_the_lowest_code() -> None:
    values = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0])
    with kernels.interpreted_kernels():
        codes = DECLARED["quantize"].run(values, number(0.1), number(5), 2, 9, SIGNED, -1)
    assert codes.tolist() == [2, 2, 9, 5]


@settings(max_examples=25)
@given(data=st.data())
def test_requantize_at_ties_and_beside_them(data: st.DataObject) -> None:
    grid = Grid(data)
    codes = torch.arange(grid.lowest - 2, grid.highest + 2).double() - grid.zero_point
    nearest = ((codes + 0.5) / grid.scale.double()).round().clamp(-(2**31), 2**31 - 1).to(torch.int64)
    sums = (nearest[:, None] + torch.arange(-1, 2)).clamp(-(2**30), 2**30).to(torch.int32)
    rest = grid.scale, grid.zero_point, grid.lowest, grid.highest, grid.dtype, 1
    assert_reference("requantize", sums, None, *rest)
    biases = data.draw(st.lists(st.integers(-(2**29), 2**29), min_size=3, max_size=3))
    bias = torch.tensor(biases, dtype=torch.int32)
    assert_reference("requantize", sums - bias, bias, *rest)


@settings(max_examples=25)
@given(data=st.data(), constant=st.floats(-1000, 1000, width=32))
def test_add_at_any_ratio(data: st.DataObject, constant: float) -> None:
    grid = Grid(data)
    left, right = (every_code(data.draw(st.sampled_from(DTYPES))) for _ in range(2))
    ratios = data.draw(SCALES), data.draw(SCALES)
    operands = left[::3], number(ratios[0]), right[:, None], number(ratios[1]), number(constant)
    assert_reference("add", *operands, grid.lowest, grid.highest, grid.dtype)


@settings(max_examples=25)
@given(data=st.data())
def test_add_broadcasts(data: st.DataObject) -> None:
    """Any axis of either operand may be of size 1, and the first ones may be absent."""
    shape = (*data.draw(st.lists(st.integers(1, 5), max_size=4)), 5)
    left, right = (
        random_codes(tuple(1 if data.draw(st.booleans()) else size for size in shape)[absent:], SIGNED)
        for absent in (0, data.draw(st.integers(0, len(shape) - 1)))
    )
    left = data.draw(st.sampled_from([*layouts(left).values()]))
    assert_reference("add", left, number(0.5), right, number(0.25), number(-9.0), -128, 127, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_at_ties(dtype: torch.dtype) -> None:
    """Sums of quarters, of which every fourth lies half way between two codes."""
    codes = every_code(dtype)
    assert_reference("add", codes, number(0.25), codes[:, None], number(0.25), number(0.0), -128, 127, torch.int8)


@settings(max_examples=25)
@given(data=st.data())
def test_max_pool2d_of_any_geometry(data: st.DataObject) -> None:
    kernel, stride, dilation = ([data.draw(st.integers(1, most)) for _ in range(2)] for most in (4, 3, 2))
    padding = [data.draw(st.integers(0, size // 2)) for size in kernel]
    sizes = (data.draw(st.integers(1 + d * (k - 1), 12)) for d, k in zip(dilation, kernel, strict=True))
    codes = random_codes((2, data.draw(st.sampled_from([1, 3, 16])), *sizes), data.draw(st.sampled_from(DTYPES)))
    codes = data.draw(st.sampled_from([*layouts(codes).values()]))
    assert_reference("max_pool2d", codes, kernel, stride, padding, dilation, data.draw(st.booleans()))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lookup", (torch.zeros(5, dtype=SIGNED), torch.zeros(255)), "table must hold 256 numbers, got 255"),
        (
            "lookup_gradient",
            (torch.zeros(5), torch.zeros(5, dtype=SIGNED), torch.zeros(255), None),
            "slopes must hold 256 numbers, got 255",
        ),
        (
            "lookup_gradient",
            (torch.zeros(4), torch.zeros(5, dtype=SIGNED), torch.zeros(256), None),
            "gradient must have the shape of codes, got",
        ),
    ],
)
def test_what_would_be_read_beyond_an_end_is_refused(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with kernels.interpreted_kernels(), pytest.raises(RuntimeError, match=message):
        DECLARED[name].run(*arguments)
