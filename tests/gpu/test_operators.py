"""Operators give on a GPU what their references give on the CPU: every sample, and random calls at realistic sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from example_operators import LABELS_ON_GPU, ON_GPU, SUMS, assert_same, assert_same_layout, samples_on_gpu, tensors_of
from gpu.moving import moved, on_cpu
from gpu.random_operators import RANDOM, Draw
from mlframework.quantization.kernels.operators.declaration import DECLARED, Operator
from mlframework.quantization.kernels.triton_gpu.availability import is_installed

pytestmark = pytest.mark.usefixtures("_kernels", "_any_configuration")

CASES, CASES_A_TEST, REHEARSED_CASES = 50, 10, 2

# Sums of up to two million terms, relative to the largest of a result: float32 in another order, or rounded to a half.
# (The CPU's kernels, which sum doubles, differ by 2e-6 at the most in these cases.)
SUM_TOLERANCE = 1e-4
HALF_TOLERANCE = 1e-2


@pytest.fixture
def _any_configuration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kernel that has several, a random one and not the fastest, so that all of them are run; the library's
    products are one."""
    if not is_installed():
        return
    from mlframework.quantization.kernels.triton_gpu import depthwise, products

    chosen = random.Random(request.node.name)
    for module in (depthwise, products):
        monkeypatch.setattr(module, "fastest", lambda key, choices, run: chosen.choice(choices))


def compare(operator: Operator, arguments: tuple[Any, ...], device: torch.device, is_realistic: bool) -> float:
    """Asserts that both give the same; returns by how much sums differ, relative to the largest of each result."""
    on_device = moved(arguments, device)
    actual = tensors_of(operator, operator.run(*on_device), on_device)
    expected = tensors_of(operator, operator.reference(*arguments), arguments)
    assert len(actual) == len(expected)
    largest = 0.0
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(other, Tensor):
            assert one.device == device
            assert_same_layout(one, other)
        tolerance = SUMS.get(operator.name, {}).get(index, 0.0)
        if is_realistic and tolerance:
            largest = max(largest, sums_differ(on_cpu(one), other))
        else:
            assert_same(on_cpu(one), other, tolerance)
    return largest


def sums_differ(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest; NaN and infinities in the same places."""
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    if not finite.any():
        return 0.0
    one, other = actual[finite].double(), expected[finite].double()
    difference = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
    assert difference <= (SUM_TOLERANCE if expected.dtype is torch.float32 else HALF_TOLERANCE)
    return difference


@pytest.mark.parametrize(("operator", "label"), [sample for sample in LABELS_ON_GPU if sample[0] in ON_GPU])
def test_samples(operator: str, label: str, device: torch.device) -> None:
    arguments = samples_on_gpu(operator)[label]
    assert device.type == "cpu" or DECLARED[operator].has_kernel(moved(arguments[0], device))
    compare(DECLARED[operator], arguments, device, is_realistic=False)


def test_every_operator_is_called_at_random() -> None:
    assert set(RANDOM) == set(ON_GPU)


@pytest.mark.parametrize("first", range(0, CASES, CASES_A_TEST))
@pytest.mark.parametrize("operator", RANDOM)
def test_random_calls(
    operator: str, first: int, device: torch.device, rehearses: bool, record_property: Callable[[str, object], None]
) -> None:
    # (The interpreter's halves are not those of a GPU: tests/kernels/triton_gpu/conftest.py.)
    taken = tuple(dtype for dtype in ON_GPU[operator] if dtype.is_floating_point)
    dtypes = taken if taken and not rehearses else (torch.float32,)
    largest = 0.0
    for seed in range(first, first + (REHEARSED_CASES if rehearses else CASES_A_TEST)):
        arguments = RANDOM[operator](Draw(seed, rehearses, dtypes))
        try:
            largest = max(largest, compare(DECLARED[operator], arguments, device, is_realistic=True))
        except AssertionError as error:
            raise AssertionError(f"case {seed}, {described(arguments)}: {error}") from error
    if operator in SUMS:
        record_property("largest relative difference of sums", largest)


def described(arguments: tuple[Any, ...]) -> str:
    """Tensors by dtype, shape and strides."""
    return ", ".join(
        f"{each.dtype} {tuple(each.shape)} {each.stride()}" if isinstance(each, Tensor) else repr(each)
        for each in arguments
    )
