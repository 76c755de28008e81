"""What an observer of moving averages does with a batch, against the formulas one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from example_operators import assert_same, observer
from mlframework.quantization import QuantizationScheme, arithmetic, kernels

pytestmark = pytest.mark.usefixtures("_path")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # one path serves all examples
@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]), max_size=40),
    momentum=st.floats(0.001, 1.0),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    due=st.booleans(),
)
def test_update_moving_average(
    values: list[float], momentum: float, bits: int, signed: bool, symmetric: bool, due: bool
) -> None:
    """Against the observer's formulas, over batches of eight channels."""
    scheme = QuantizationScheme(bits=bits, signed=signed, symmetric=symmetric)
    minimum, maximum = torch.full((8,), math.inf), torch.full((8,), -math.inf)
    scale, zero_point, batches = torch.ones(8), torch.zeros(8), torch.zeros(1, dtype=torch.int64)
    expected_minimum, expected_maximum, count = minimum.clone(), maximum.clone(), 0
    for start in range(0, len(values), 8):
        batch = torch.full((1, 8), math.nan)
        batch[0, : len(values[start : start + 8])] = torch.tensor(values[start : start + 8])
        extremes = kernels.extremes(batch, 1)
        changes = (minimum, maximum, batches, *((scale, zero_point) if due else ()))
        versions = [tensor._version for tensor in changes]
        given_batch = (extremes, True, None) if start % 16 else (batch, False, 1)
        kernels.update_moving_average(*given_batch, minimum, maximum, batches, scale, zero_point, momentum, scheme, due)
        assert all(tensor._version > version for tensor, version in zip(changes, versions, strict=True))
        for running, ends in ((expected_minimum, -extremes[0]), (expected_maximum, extremes[1])):
            averaged = torch.where(running.isfinite(), torch.lerp(running, ends, momentum), ends)
            running.copy_(torch.where(ends.isfinite(), averaged, running))
        count += bool(extremes.isfinite().any())
        assert_same(minimum, expected_minimum)
        assert_same(maximum, expected_maximum)
        assert int(batches) == count
        if due:
            ends = (torch.where(end.isfinite(), end, 0.0) for end in (minimum, maximum))
            expected_scale, expected_zero_point = arithmetic.range_to_scale_and_zero_point(*ends, scheme)
            assert_same(scale, expected_scale)
            assert_same(zero_point, expected_zero_point)
    if not due:
        assert (scale == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_batch_of_any_dtype(dtype: torch.dtype) -> None:
    batch = torch.randn(5, 3).to(dtype)
    own, expected = observer(3), observer(3)
    for values, state in ((batch, own), (batch.float(), expected)):
        kernels.update_moving_average(values, False, 1, *state, 0.1, QuantizationScheme(), True)
    for one, other in zip(own, expected, strict=True):
        assert_same(one, other)
    assert_same(own[1], batch.float().amax(0))


def test_a_scale_that_learns_is_updated_apart_from_the_graph() -> None:
    minimum, maximum, batches, scale, zero_point = observer(1)
    scale.requires_grad_()
    batch = torch.randn(5, requires_grad=True)
    kernels.update_moving_average(
        batch, False, None, minimum, maximum, batches, scale, zero_point, 0.1, QuantizationScheme(), True
    )
    assert scale.requires_grad
    assert scale.is_leaf
    assert scale.item() == pytest.approx(float(batch.detach().abs().max()) / 127.5, rel=0.01)
    assert not any(state.requires_grad for state in (minimum, maximum, zero_point))
