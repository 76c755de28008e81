"""Running extremes against a float64 recurrence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlframework.quantization import MovingAverageStatistics


@pytest.mark.parametrize("momentum", [0, 0.0, -0.1, 1.5, math.nan, "0.1", True, None])
def test_momentum_must_lie_in_its_range(momentum: Any) -> None:
    with pytest.raises(ValueError, match=r"momentum must be a number in \(0, 1\], got"):
        MovingAverageStatistics(momentum)


@pytest.mark.parametrize("channels", [0, -1, 2.0, True, None])
def test_channels_must_be_a_positive_int(channels: Any) -> None:
    with pytest.raises(ValueError, match="num_channels must be a positive int, got"):
        MovingAverageStatistics(num_channels=channels)


def test_infinite_before_data() -> None:
    statistics = MovingAverageStatistics(num_channels=2)
    assert statistics.minimum.tolist() == [math.inf] * 2
    assert statistics.maximum.tolist() == [-math.inf] * 2


def test_first_batch_is_copied() -> None:
    statistics = MovingAverageStatistics(momentum=0.01)
    statistics.update(torch.tensor([-0.1]), torch.tensor([0.3]))
    assert torch.equal(statistics.minimum, torch.tensor([-0.1]))
    assert torch.equal(statistics.maximum, torch.tensor([0.3]))


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5, 0.9])
def test_recurrence_against_float64(momentum: float) -> None:
    batches = torch.randn(50, 2, 4)
    statistics = MovingAverageStatistics(momentum, num_channels=4)
    expected = batches[0].double().numpy()
    for number, (minimum, maximum) in enumerate(batches):
        statistics.update(minimum, maximum)
        if number:
            expected = expected + momentum * (batches[number].double().numpy() - expected)
    # 50 steps of float32, each off by a rounding (6e-8) of values of about 1.
    np.testing.assert_allclose(statistics.minimum.numpy(), expected[0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(statistics.maximum.numpy(), expected[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("before", [-1.0, -1e8, -3e38])
def test_momentum_one_is_the_newest_batch_alone(before: float) -> None:
    statistics = MovingAverageStatistics(momentum=1.0)
    for end in (before, -0.1):
        statistics.update(torch.tensor([end]), torch.tensor([-end]))
    assert torch.equal(statistics.minimum, torch.tensor([-0.1]))
    assert torch.equal(statistics.maximum, torch.tensor([0.1]))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_end_that_is_not_finite_is_ignored_in_its_channel(broken: float) -> None:
    statistics = MovingAverageStatistics(momentum=0.5, num_channels=2)
    statistics.update(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]))
    statistics.update(torch.tensor([-2.0, broken]), torch.tensor([broken, 2.0]))
    assert statistics.minimum.tolist() == [-1.5, -1.0]
    assert statistics.maximum.tolist() == [1.0, 1.5]


def test_a_broken_first_batch_leaves_the_next_one_to_be_the_first() -> None:
    statistics = MovingAverageStatistics(momentum=0.5)
    statistics.update(torch.tensor([math.nan]), torch.tensor([math.inf]))
    statistics.update(torch.tensor([-4.0]), torch.tensor([6.0]))
    assert (statistics.minimum.item(), statistics.maximum.item()) == (-4.0, 6.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_extremes_of_any_float_dtype(dtype: torch.dtype) -> None:
    statistics = MovingAverageStatistics(momentum=0.5)
    for end in (1.0, 2.0):
        statistics.update(torch.tensor([-end], dtype=dtype), torch.tensor([end], dtype=dtype))
    assert torch.equal(statistics.minimum, torch.tensor([-1.5]))
    assert torch.equal(statistics.maximum, torch.tensor([1.5]))


def test_refuses_another_number_of_channels() -> None:
    statistics = MovingAverageStatistics(num_channels=2)
    with pytest.raises(ValueError, match=r"expected extremes of shape \(2,\), got \(3,\)"):
        statistics.update(torch.zeros(3), torch.zeros(3))


def test_state_is_updated_in_place_and_round_trips() -> None:
    statistics, other = MovingAverageStatistics(0.5, 3), MovingAverageStatistics(0.5, 3)
    places = [buffer.data_ptr() for buffer in statistics.buffers()]
    assert {name: value.shape for name, value in statistics.state_dict().items()} == {
        "minimum": (3,),
        "maximum": (3,),
    }
    statistics.update(-torch.rand(3), torch.rand(3))
    statistics.update(-torch.rand(3), torch.rand(3))
    assert [buffer.data_ptr() for buffer in statistics.buffers()] == places
    other.load_state_dict(statistics.state_dict())
    for module in (statistics, other):
        module.update(torch.full((3,), -2.0), torch.full((3,), 2.0))
    assert torch.equal(statistics.minimum, other.minimum)
    assert torch.equal(statistics.maximum, other.maximum)


def test_reset_forgets_in_place() -> None:
    statistics = MovingAverageStatistics()
    place = statistics.minimum.data_ptr()
    statistics.update(torch.tensor([-1.0]), torch.tensor([1.0]))
    statistics.reset()
    assert (statistics.minimum.item(), statistics.maximum.item()) == (math.inf, -math.inf)
    assert statistics.minimum.data_ptr() == place


def test_no_gradient_flows_into_statistics() -> None:
    statistics = MovingAverageStatistics()
    statistics.update(torch.tensor([-1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True))
    assert not statistics.minimum.requires_grad
