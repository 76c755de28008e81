"""Observers of extremes: what they measure, keep, ignore and forget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlframework.quantization import (
    ActivationObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QuantizationScheme,
)

SCHEME = QuantizationScheme()
MakeObserver = Callable[..., ActivationObserver]
OF_EXTREMES: list[MakeObserver] = [MinMaxObserver, MovingAverageObserver]
ALL: list[MakeObserver] = [*OF_EXTREMES, PercentileObserver, HistogramObserver]

each_observer = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
each_observer_of_extremes = pytest.mark.parametrize("make", OF_EXTREMES, ids=lambda make: make.__name__)


def ends(observer: ActivationObserver) -> tuple[list[float], list[float]]:
    low, high = observer.range(SCHEME)
    return low.tolist(), high.tolist()


@each_observer
@pytest.mark.parametrize("update_every", [0, -1, 1.0, True])
def test_update_every_must_be_a_positive_int(make: MakeObserver, update_every: Any) -> None:
    with pytest.raises(ValueError, match="update_every must be a positive int"):
        make(update_every=update_every)


@each_observer_of_extremes
@pytest.mark.parametrize("channels", [0, -3, 2.0, True])
def test_num_channels_must_be_a_positive_int(make: MakeObserver, channels: Any) -> None:
    with pytest.raises(ValueError, match="num_channels must be a positive int"):
        make(channel_axis=0, num_channels=channels)


@each_observer_of_extremes
def test_channels_need_an_axis(make: MakeObserver) -> None:
    with pytest.raises(ValueError, match="num_channels must be 1 without a channel_axis, got 4"):
        make(num_channels=4)


@each_observer
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_refuses_what_is_not_floating_point_and_keeps_its_state(make: MakeObserver, dtype: torch.dtype) -> None:
    observer = make()
    with pytest.raises(TypeError, match=f"input must be a floating-point tensor, got {dtype}"):
        observer(torch.ones(3, dtype=dtype))
    assert observer.batches.item() == 0


@each_observer_of_extremes
@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 2)), (-1, (3, 2)), (2, (3, 3)), (-3, (3, 3))])
def test_refuses_other_channels_and_keeps_its_state(make: MakeObserver, axis: int, shape: tuple[int, ...]) -> None:
    observer = make(channel_axis=axis, num_channels=3)
    with pytest.raises(ValueError, match=f"input must have 3 channels along axis {axis}"):
        observer(torch.ones(shape))
    assert observer.batches.item() == 0
    assert ends(observer) == ([0.0] * 3, [0.0] * 3)


@each_observer
def test_returns_its_input_and_leaves_the_graph_alone(make: MakeObserver) -> None:
    input = torch.randn(5, requires_grad=True)
    observer = make()
    assert observer(input) is input
    assert not any(buffer.requires_grad for buffer in observer.buffers())


@each_observer
def test_range_is_zero_before_data(make: MakeObserver) -> None:
    assert ends(make()) == ([0.0], [0.0])


def views(channels: int) -> dict[str, tuple[Tensor, int]]:
    base = torch.randn(4, channels, 5, 6)
    return {
        "rows": (torch.randn(channels, 7), 0),
        "columns": (torch.randn(7, channels), -1),
        "image": (base, 1),
        "negative axis": (base, -3),
        "channels_last": (base.to(memory_format=torch.channels_last), 1),
        "channels_last_3d": (torch.randn(2, channels, 3, 4, 5).to(memory_format=torch.channels_last_3d), 1),
        "transposed": (base.transpose(0, 1), 0),
        "sliced": (torch.randn(8, channels, 9)[::3, :, 1::2], 1),
        "expanded": (torch.randn(1, channels, 1).expand(3, channels, 4), 1),
    }


@each_observer_of_extremes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", views(1))
def test_extremes_of_any_view_and_dtype(make: MakeObserver, dtype: torch.dtype, name: str) -> None:
    view, axis = views(3)[name]
    input = view.to(dtype)
    per_tensor, per_channel = make(), make(channel_axis=axis, num_channels=3)
    per_tensor(input)
    per_channel(input)
    values = np.moveaxis(input.double().numpy(), axis, 0).reshape(3, -1).astype(np.float32)
    assert ends(per_tensor) == ([values.min()], [values.max()])
    assert ends(per_channel) == (values.min(1).tolist(), values.max(1).tolist())


def test_min_max_only_widens() -> None:
    observer = MinMaxObserver(channel_axis=0, num_channels=2)
    batches = torch.randn(10, 2, 5)
    for batch in batches:
        observer(batch)
    values = batches.transpose(0, 1).reshape(2, -1).numpy()
    assert ends(observer) == (values.min(1).tolist(), values.max(1).tolist())


@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_moving_average_follows_with_its_momentum(momentum: float) -> None:
    observer = MovingAverageObserver(momentum, channel_axis=1, num_channels=4)
    batches = torch.randn(20, 8, 4)
    expected = np.stack([batches[0].double().numpy().min(0), batches[0].double().numpy().max(0)])
    for number, batch in enumerate(batches):
        observer(batch)
        if number:
            extremes = np.stack([batch.double().numpy().min(0), batch.double().numpy().max(0)])
            expected += momentum * (extremes - expected)
    # 20 steps of float32, each off by a rounding (6e-8 relative) of values below 4.
    np.testing.assert_allclose(np.stack([end.numpy() for end in observer.range(SCHEME)]), expected, rtol=0, atol=5e-6)


def test_moving_average_with_momentum_one_is_the_newest_batch() -> None:
    observer = MovingAverageObserver(momentum=1.0)
    for magnitude in (1e8, 0.1):
        observer(torch.tensor([-magnitude, magnitude]))
    assert ends(observer) == (torch.tensor([-0.1]).tolist(), torch.tensor([0.1]).tolist())


@each_observer
@pytest.mark.parametrize("broken", [[math.nan, 0.0], [math.nan] * 2, [math.inf, -math.inf]])
def test_a_broken_batch_leaves_the_range_as_it_was(make: MakeObserver, broken: list[float]) -> None:
    observer = make()
    observer(torch.linspace(-1, 2, 1001))
    before = ends(observer)
    observer(torch.tensor(broken))
    # What is finite in a broken batch still counts in a histogram, as one value among a thousand.
    tolerance = 0.0 if make in OF_EXTREMES else 3 / 1000
    for end, expected in zip(ends(observer), before, strict=True):
        assert end == pytest.approx(expected, rel=0, abs=tolerance)


@each_observer_of_extremes
def test_an_infinite_end_is_ignored_and_the_other_end_counts(make: MakeObserver) -> None:
    observer = make()
    observer(torch.tensor([-3.0, math.inf]))
    assert ends(observer) == ([-3.0], [0.0])
    observer(torch.tensor([-3.0, 5.0]))
    assert ends(observer) == ([-3.0], [5.0])


def test_a_broken_channel_does_not_touch_its_neighbours() -> None:
    observer = MinMaxObserver(channel_axis=0, num_channels=2)
    observer(torch.tensor([[math.nan, 1.0], [-2.0, 2.0]]))
    assert ends(observer) == ([0.0, -2.0], [0.0, 2.0])


@each_observer
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
def test_an_empty_batch_is_legal(make: MakeObserver, shape: tuple[int, ...]) -> None:
    observer = make()
    observer(torch.empty(shape))
    assert ends(observer) == ([0.0], [0.0])
    observer(torch.linspace(-1, 1, 101))
    before = ends(observer)
    observer(torch.empty(shape))
    assert ends(observer) == before


@each_observer
def test_float64_beyond_float32_is_not_finite(make: MakeObserver) -> None:
    observer = make()
    observer(torch.tensor([-1e300, 1e300], dtype=torch.float64))
    assert ends(observer) == ([0.0], [0.0])


@each_observer
def test_switched_off_it_sees_nothing(make: MakeObserver) -> None:
    observer = make()
    observer.enabled = False
    observer(torch.ones(3))
    assert observer.batches.item() == 0
    assert ends(observer) == ([0.0], [0.0])
    observer.enabled = True
    observer(torch.ones(3))
    assert observer.batches.item() == 1


@pytest.mark.parametrize("update_every", [1, 3])
def test_due_at_the_first_batch_and_then_every_nth(update_every: int) -> None:
    observer = MinMaxObserver(update_every=update_every)
    due = []
    for _ in range(7):
        observer(torch.ones(2))
        due.append(bool(observer.due()))
    assert due == [batch % update_every == 0 for batch in range(7)]


@each_observer
def test_state_has_its_shape_from_construction_and_is_updated_in_place(make: MakeObserver) -> None:
    observer = make()
    shapes = {name: value.shape for name, value in observer.state_dict().items()}
    places = [buffer.data_ptr() for buffer in observer.buffers()]
    observer(torch.randn(10))
    observer(torch.randn(20))
    assert {name: value.shape for name, value in observer.state_dict().items()} == shapes
    observer.reset()
    assert [buffer.data_ptr() for buffer in observer.buffers()] == places


@each_observer
def test_state_round_trips_and_goes_on_alike(make: MakeObserver) -> None:
    observer, other = make(update_every=2), make(update_every=2)
    observer(torch.randn(100))
    other.load_state_dict(observer.state_dict())
    batch = torch.randn(100) * 2
    for either in (observer, other):
        either(batch)
    assert ends(observer) == ends(other)
    assert observer.due() == other.due()


@each_observer
def test_an_average_of_states_without_data_is_one(make: MakeObserver) -> None:
    """Averages of the infinities that stand for no data are NaN."""
    observer, expected = make(), make()
    averaged = AveragedModel(observer, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        averaged.update_parameters(observer)
    observer.load_state_dict(averaged.module.state_dict())
    assert ends(observer) == ([0.0], [0.0])
    batch = torch.linspace(-1, 3, 50)
    observer(batch)
    expected(batch)
    assert ends(observer) == ends(expected)


@each_observer
def test_reset_makes_it_new(make: MakeObserver) -> None:
    observer, new = make(), make()
    observer(torch.randn(100) * 9)
    observer.reset()
    for (name, value), expected in zip(observer.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@each_observer
def test_measuring_keeps_nothing_until_update(make: MakeObserver) -> None:
    measured, direct = make(), make()
    batch = torch.randn(1000)
    statistics = measured.measure(batch)
    assert ends(measured) == ([0.0], [0.0])
    measured.update(statistics)
    direct(batch)
    assert ends(measured) == ends(direct)


@each_observer
def test_statistics_reduce_over_ranks_to_those_of_all_data(make: MakeObserver) -> None:
    halves = torch.randn(2, 500)
    observer, whole = make(), make()
    first, second = (observer.measure(half) for half in halves)
    counts = None if first.counts is None or second.counts is None else first.counts + second.counts
    observer.update(first._replace(extremes=torch.maximum(first.extremes, second.extremes), counts=counts))
    observer.update(observer.nothing())
    whole(halves)
    assert ends(observer) == ends(whole)


@each_observer_of_extremes
def test_nothing_is_shaped_like_a_measurement(make: MakeObserver) -> None:
    observer = make(channel_axis=0, num_channels=3)
    assert observer.nothing().extremes.shape == observer.measure(torch.randn(3, 2)).extremes.shape


def test_repr_names_what_differs_from_the_default() -> None:
    assert "channels=3" in repr(MinMaxObserver(channel_axis=1, num_channels=3))
    assert "update_every=4" in repr(MovingAverageObserver(update_every=4))
    assert "percentile=99.0" in repr(PercentileObserver(99.0))
