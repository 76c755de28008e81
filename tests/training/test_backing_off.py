"""A training that diverges starts over, and one that ends badly is put back to where it was better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import History, Recipe, finetune
from mlframework.quantization.training.backing_off import BackingOff
from mlframework.quantization.training.training_loop import TrainingLoop
from students import distance, expected_pace, student_and_teacher


def _diverging(student: nn.Module, teacher: nn.Module, batches: list[Tensor], first: int, last: int) -> History:
    """A training whose outputs are far off in some of its 64 steps, as the first rate has it."""
    steps = 0

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal steps
        is_step = module.training is False and torch.is_grad_enabled()
        steps += is_step
        return output * 5 if is_step and first <= steps - 1 < last else output

    handle = student.register_forward_hook(disturb)
    try:
        return finetune(student, teacher, batches, steps=64, recipe=Recipe(warmup=0.25))
    finally:
        handle.remove()


def _pace(steps: int) -> list[float]:
    return list(expected_pace(steps, steps // 4))


def test_a_training_that_diverges_starts_over_at_lower_rates() -> None:
    """Weights at a tenth, all else at a third; with the steps that are left, from the state before the first."""
    student, teacher, batches = student_and_teacher(bits=8)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rates = torch.tensor(_diverging(student, teacher, batches, 8, 12).learning_rates)
    top = rates[0] / _pace(64)[0]
    torch.testing.assert_close(rates[:12], top * torch.tensor(_pace(64)[:12]))
    torch.testing.assert_close(rates[12:], top / 10 * torch.tensor(_pace(52)))

    again = student_and_teacher(bits=8)[0]
    again.load_state_dict(start)
    batches = [batches[step % len(batches)] for step in range(12, 64)]
    recipe = Recipe(lr=top.item() / 10, vector_lr_factor=10 / 3, warmup=0.25)
    finetune(again, teacher, batches, steps=52, recipe=recipe)
    for name, tensor in student.state_dict().items():
        # A third of a rate is rounded one way or another.
        torch.testing.assert_close(tensor, again.state_dict()[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_training_that_starts_over_goes_on_freezing() -> None:
    """A freezer counts the steps of the whole training, also where it knows no layer before the first."""
    student, teacher, _ = student_and_teacher(bits=3)
    loop = TrainingLoop(student, teacher, None, Recipe(freeze_oscillations=True), 64)
    assert loop.freezer is not None
    assert loop.backing_off is not None
    for count in (1, 0):
        loop.freezer.steps_taken = 7
        if not count:
            loop.backing_off._kept["freezer"]["layers"].clear()
        loop.backing_off.require_fitting(loop.backing_off.state_dict())
        assert loop.backing_off.goes_back([torch.tensor(torch.nan)] * 8)
        assert loop.freezer.steps_taken == 8


def test_late_divergence_goes_back_to_the_least_loss() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    before = distance(student, teacher, batches)
    history = _diverging(student, teacher, batches, 60, 64)
    assert distance(student, teacher, batches) < before
    assert history.losses[-1] > 10 * history.losses[-5]


@pytest.mark.parametrize(("steps", "learns"), [(2, False), (66, True)])
def test_what_goes_wrong_in_the_last_step_is_put_right(steps: int, learns: bool) -> None:
    """No window of steps shows it any more; the first state is at hand, and in a longer training a better one."""
    student, teacher, batches = student_and_teacher(bits=8)
    before, start = distance(student, teacher, batches), copy.deepcopy(student.state_dict())
    loop = TrainingLoop(student, teacher, None, Recipe(), steps)

    def spoil(*args: Any) -> None:
        if loop.done == steps - 1:
            student[-1].weight.detach().mul_(3)

    loop.optimizer.register_step_post_hook(spoil)
    loop.run(batches, progress=False)
    assert loop.losses[-1] < 3 * before  # the spoilt weights come after it
    assert (distance(student, teacher, batches) < before) is learns
    if not learns:
        assert all(torch.equal(tensor, start[name]) for name, tensor in student.state_dict().items())


def test_a_training_put_back_to_its_start_tells_of_no_frozen_weights() -> None:
    student, teacher, batches = student_and_teacher(bits=3)
    loop = TrainingLoop(student, teacher, None, Recipe(freeze_oscillations=True), 2)
    freezer = loop.freezer
    assert freezer is not None

    def spoil(*args: Any) -> None:
        if loop.done == 1:
            student[-1].weight.detach().mul_(30)
            for tracker in freezer._trackers.values():
                tracker.is_frozen.fill_(True)

    loop.optimizer.register_step_post_hook(spoil)
    loop.run(batches, progress=False)
    assert set(freezer.frozen().values()) == {0.0}


@pytest.mark.parametrize(("of_end", "of_start", "stays"), [(5.0, 6.0, True), (6.0, 5.0, False)])
def test_the_end_is_compared_with_the_start_on_the_same_batches(of_end: float, of_start: float, stays: bool) -> None:
    """Whatever loss it began with: a loader that shuffles anew gives others to a training that is taken up again."""
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    backing_off = BackingOff(model, torch.optim.AdamW(model.parameters()), None, 16)
    backing_off.begin(5.5)
    model.weight.detach().add_(1)
    end = model.weight.detach().clone()
    backing_off.end(lambda: of_start if torch.equal(model.weight, start) else of_end)
    assert torch.equal(model.weight, end if stays else start)


def test_weights_are_compared_on_their_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that follow their weights are, after the last step, still those of the weights before it."""
    student, teacher, batches = student_and_teacher(bits=8)
    node = student.get_submodule("5").weight_fake_quantize
    scales, end = [], BackingOff.end

    def watched(self: BackingOff, loss: Callable[[], float]) -> None:
        def measured() -> float:
            found = loss()
            scales.append((node.scale.clone(), student[-1].weight.detach().abs().amax(1) / 127))
            return found

        end(self, measured)

    monkeypatch.setattr(BackingOff, "end", watched)
    finetune(student, teacher, batches, steps=3, recipe=Recipe())
    assert len(scales) == 2  # of the end and of the start, which is what is kept
    for scale, expected in scales:
        torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)  # a division rounds


def test_models_of_batch_statistics_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(BackingOff, "end", end)
    student, teacher, batches = student_and_teacher(bits=8)
    finetune(student, teacher, batches, steps=2, recipe=Recipe(batch_norm="batch"))
    with pytest.raises(AssertionError):
        finetune(student, teacher, batches, steps=2, recipe=Recipe())


def test_where_a_rate_is_given_or_a_loss_nothing_starts_over() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    growing = [batch * 10**step for step, batch in enumerate(batches * 2)]  # which clip ever more
    rates = finetune(student, teacher, growing, steps=8, lr=1e-5, recipe=Recipe(warmup=0.0)).learning_rates
    assert rates == pytest.approx([1e-5 * pace for pace in expected_pace(8, 0)])
    pairs = [(batch, torch.zeros(1)) for batch in growing]

    def negative(outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.sum() * 0 - 5

    rates = finetune(student, teacher, pairs, steps=8, recipe=Recipe(warmup=0.0), loss=negative).learning_rates
    assert rates == pytest.approx([rates[0] * pace for pace in expected_pace(8, 0)])
