"""What a schedule switches, at which step."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from example_models import EXAMPLES, train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATSchedule, prepare
from mlframework.quantization.kernels import reference_kernels
from mlframework.quantization.qat.least_squares_observer import least_squares_scale

INPUTS = torch.randn(8, 3, 8, 8)


def prepared_model(**fields: Any) -> nn.Module:
    return prepare(EXAMPLES["resnet"].make(), QATConfig(**fields), (INPUTS,))


def nodes(model: nn.Module, weights: bool) -> list[FakeQuantizeLayer]:
    found = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    return [node for node in found if node.name.endswith("weight_fake_quantize") is weights]


def scales(model: nn.Module, weights: bool = False) -> torch.Tensor:
    return torch.cat([node.scale for node in nodes(model, weights)])


def states(schedule: QATSchedule, steps: int) -> list[tuple[bool, bool, bool]]:
    seen = []
    for _ in range(steps):
        seen.append((schedule.is_observing, schedule.is_quantizing, schedule.freezes_batch_norm))
        schedule.step()
    return seen


def test_states_follow_the_steps() -> None:
    schedule = QATSchedule(prepared_model(), observe_from=1, quantize_from=2, observe_until=3, freeze_batch_norm_from=4)
    assert states(schedule, 5) == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, True, True),
    ]


def test_by_default_everything_runs_from_the_start() -> None:
    assert states(QATSchedule(prepared_model()), 2) == [(True, True, False)] * 2


def test_before_quantization_the_model_is_float() -> None:
    model = EXAMPLES["resnet"].make()
    model.get_submodule("block.relu").inplace = False
    prepared = prepare(model, QATConfig(), (INPUTS,))
    schedule = QATSchedule(prepared, quantize_from=1)
    assert torch.equal(prepared(INPUTS), model(INPUTS))
    schedule.step()
    assert not torch.equal(prepared(INPUTS), model(INPUTS))


def test_frozen_observers_keep_activation_scales_and_follow_weights() -> None:
    prepared = prepared_model()
    schedule = QATSchedule(prepared, observe_until=1)
    prepared(INPUTS)
    schedule.step()
    activations, weights = scales(prepared), scales(prepared, weights=True)
    train_briefly(prepared, (INPUTS * 5,))
    assert torch.equal(scales(prepared), activations)
    assert not torch.equal(scales(prepared, weights=True), weights)


def test_observers_that_start_late_see_nothing_before() -> None:
    prepared = prepared_model()
    schedule = QATSchedule(prepared, observe_from=1, quantize_from=1)
    prepared(INPUTS * 100)
    assert not any(node.is_initialized for node in nodes(prepared, weights=False))
    schedule.step()
    prepared(INPUTS)
    assert all(node.is_initialized for node in nodes(prepared, weights=False))
    other = prepared_model()
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(scales(prepared), scales(other))


def test_frozen_batch_norm_survives_train() -> None:
    prepared = prepared_model()
    schedule = QATSchedule(prepared, freeze_batch_norm_from=1)
    prepared(INPUTS)
    before = copy.deepcopy(prepared.bn.state_dict())
    schedule.step()
    prepared.train()(INPUTS * 3)
    assert all(torch.equal(value, before[name]) for name, value in prepared.bn.state_dict().items())
    assert prepared.bn.weight.requires_grad


def test_batch_norm_thaws_where_an_earlier_state_is_loaded() -> None:
    prepared = prepared_model()
    schedule = QATSchedule(prepared, freeze_batch_norm_from=1)
    early = schedule.state_dict()
    schedule.step()
    prepared(INPUTS)
    schedule.load_state_dict(early)
    before = prepared.bn.running_mean.clone()
    prepared.train()(INPUTS * 3)
    assert not torch.equal(prepared.bn.running_mean, before)


def test_a_saved_state_goes_on() -> None:
    schedule = QATSchedule(prepared_model(), quantize_from=3)
    for _ in range(3):
        schedule.step()
    model = prepared_model()
    resumed = QATSchedule(model, quantize_from=3)
    assert not any(node.fake_quantize_enabled for node in nodes(model, weights=True))
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.steps == 3
    assert all(node.fake_quantize_enabled for node in nodes(model, weights=True))


def test_learnable_scales_start_from_the_first_quantized_batch() -> None:
    prepared = prepared_model(learnable=True)
    schedule = QATSchedule(prepared, quantize_from=1)
    prepared(INPUTS)
    started = scales(prepared).detach().clone()
    schedule.step()
    prepared(INPUTS * 10)
    assert torch.equal(scales(prepared), started)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"observe_from": -1}, "observe_from must be a step number from 0, got -1"),
        ({"observe_until": 1.5}, "observe_until must be a step number"),
        ({"quantize_from": True}, "quantize_from must be a step number"),
        ({"freeze_batch_norm_from": -2}, "freeze_batch_norm_from"),
        ({"observe_from": 3, "quantize_from": 2}, "quantize_from must not be before observe_from=3, got 2"),
        ({"observe_from": 3, "quantize_from": 3, "observe_until": 3}, "observe_until must be after observe_from=3"),
    ],
    ids=str,
)
def test_impossible_steps_are_refused(steps: dict[str, Any], message: str) -> None:
    prepared = prepared_model()
    with pytest.raises(ValueError, match=message):
        QATSchedule(prepared, **steps)
    assert all(node.fake_quantize_enabled for node in nodes(prepared, weights=True))


def test_a_node_switched_by_hand_stays_so_until_the_schedule_switches() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), QATConfig(), (torch.randn(1, 4),))
    schedule = QATSchedule(prepared, observe_until=3)
    node = next(module for module in prepared.modules() if isinstance(module, FakeQuantizeLayer))
    node.fake_quantize_enabled = False
    schedule.step()
    assert not node.fake_quantize_enabled


def test_learned_scales_follow_the_weights_until_quantization_starts() -> None:
    prepared = prepare(nn.Linear(4, 2), QATConfig(learnable=True), (torch.randn(1, 4),))
    schedule = QATSchedule(prepared, quantize_from=3)
    node = prepared.weight_fake_quantize
    for _ in range(3):
        prepared(torch.randn(8, 4))
        with torch.no_grad():
            prepared.weight.mul_(4)
        schedule.step()
    seen_last = prepared.weight.detach() / 4
    torch.testing.assert_close(node.scale.detach(), least_squares_scale(seen_last, node.scheme))
    prepared(torch.randn(8, 4))
    before = node.scale.clone()
    prepared(torch.randn(8, 4))
    assert torch.equal(node.scale, before)


class NormalizationAndActivation(nn.BatchNorm2d):
    """Batch normalization by its own class, which a prepared model computes without calling the module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, NormalizationAndActivation])
def test_frozen_statistics_stay_in_whatever_way_they_are_computed(kind: type[nn.BatchNorm2d]) -> None:
    images = torch.randn(4, 2, 5, 5).contiguous(memory_format=torch.channels_last)
    prepared = prepare(nn.Sequential(nn.Conv2d(2, 3, 3), kind(3)), QATConfig(), (images,))
    prepared(images)
    QATSchedule(prepared, freeze_batch_norm_from=0)
    before = {name: buffer.clone() for name, buffer in prepared.named_buffers() if "running" in name}
    assert before
    for fused in (True, False):
        prepared.train()
        with nullcontext() if fused else reference_kernels():
            prepared(images + 1)
        for name, buffer in prepared.named_buffers():
            assert "running" not in name or torch.equal(buffer, before[name])
