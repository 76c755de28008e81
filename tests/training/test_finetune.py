"""The training loop: what it improves, what it leaves as it was, and how it goes on after an interruption."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlframework.quantization import QATConfig, Recipe, convert, finetune, prepare
from mlframework.quantization.qat.fake_quantize_layer import FakeQuantizeLayer
from students import data, distance, expected_pace, float_model, student_and_teacher


@pytest.mark.parametrize("learnable", [False, True])
def test_the_student_comes_closer_to_its_teacher(learnable: bool) -> None:
    student, teacher, batches = student_and_teacher(learnable=learnable)
    before = distance(student, teacher, batches)
    history = finetune(student, teacher, batches, steps=80, lr=3e-3)
    assert distance(student, teacher, batches) < 0.6 * before
    assert len(history.losses) == len(history.learning_rates) == 80
    int8 = convert(student)
    with torch.no_grad():
        assert all(torch.equal(int8(batch), student.eval()(batch)) for batch in batches)


def test_learning_rates_rise_and_fall() -> None:
    student, teacher, batches = student_and_teacher()
    rates = finetune(student, teacher, batches, steps=20, recipe=Recipe(lr=1e-3, warmup=0.2)).learning_rates
    assert rates == pytest.approx([1e-3 * rate for rate in expected_pace(20, 4)])


def test_the_first_distance_tells_the_learning_rate() -> None:
    """A user's loss is on a scale of its own, and tells nothing; nor does a batch that is only observed."""
    student, teacher, batches = student_and_teacher()
    pairs = [(batch, torch.zeros(16, 4)) for batch in batches]
    recipe = Recipe(warmup=0.0, quantization_lr=1e-3)
    history = finetune(*student_and_teacher(bits=8)[:2], batches, steps=1, recipe=recipe)
    assert history.learning_rates[0] == pytest.approx(5e-3 * math.sqrt(history.losses[0]), rel=1e-4)
    history = finetune(student, teacher, pairs, steps=1, recipe=recipe, loss=lambda outputs, zeros: zeros.sum() + 7)
    assert history.learning_rates[0] == pytest.approx(5e-4 * math.sqrt(history.losses[0] - 7), rel=1e-4)
    history = finetune(student, None, pairs, steps=3, recipe=recipe, loss=lambda outputs, zeros: outputs.sum() + 7)
    assert history.learning_rates[0] == 2e-5
    fresh = prepare(float_model(), QATConfig(), (batches[0],))
    assert finetune(fresh, teacher, batches, steps=3, recipe=recipe).learning_rates[0] == 2e-5


def test_a_first_distance_is_bounded_and_finite() -> None:
    student, teacher, batches = student_and_teacher()
    with torch.no_grad():
        silent = copy.deepcopy(teacher)
        silent[-1].weight.zero_()
        silent[-1].bias.zero_()
    assert finetune(student, silent, batches, steps=1, recipe=Recipe(warmup=0.0)).learning_rates == [1e-3]
    with pytest.raises(ValueError, match=r"outputs are finite, got a distance of nan"):
        finetune(student, teacher, [batches[0] * torch.nan], steps=1)


def test_all_of_the_first_batches_tell_the_learning_rate() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    expected = []
    for batch in batches:
        outputs, goal = student.eval()(batch), teacher(batch)
        expected.append(((outputs - goal).square().sum() / goal.square().sum()).item())
    rate = finetune(student, teacher, batches, steps=4, recipe=Recipe(warmup=0.0)).learning_rates[0]
    assert rate == pytest.approx(5e-3 * math.sqrt(sum(expected) / 4), rel=1e-3)


def test_what_tells_the_learning_rate_is_not_observed() -> None:
    counts = []
    for lr in (1e-4, None):
        student, teacher, batches = student_and_teacher(bits=8)
        finetune(student, teacher, batches, steps=4, lr=lr)
        counts.append(
            [node.observer.batches.item() for node in student.modules() if isinstance(node, FakeQuantizeLayer)]
        )
    assert counts[0] == counts[1]


def test_an_interruption_of_the_first_step_leaves_the_rates(tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-3, vector_lr_factor=10.0, warmup=0.0)
    student, teacher, batches = student_and_teacher()
    handle = student[-1].register_full_backward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(student, teacher, batches, steps=2, recipe=recipe, checkpoint=tmp_path / "state")
    handle.remove()
    rates = finetune(student, teacher, batches, steps=2, recipe=recipe, checkpoint=tmp_path / "state").learning_rates
    assert rates == pytest.approx([1e-3, 5e-4])


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_biases_and_normalization_learn_faster() -> None:
    """By Adam's first step, which is as long as the rate: of both kinds, as the recipe has it."""
    student, teacher, batches = student_and_teacher()
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    finetune(student, teacher, batches, steps=1, recipe=Recipe(lr=1e-4, vector_lr_factor=20.0, warmup=0.0))
    moved = {name: (parameter - before[name]).abs().max() for name, parameter in student.named_parameters()}
    rates = {name: 2e-3 if before[name].dim() == 1 else 1e-4 for name in moved}
    assert len(set(rates.values())) == 2
    for name, rate in rates.items():
        torch.testing.assert_close(moved[name], torch.tensor(rate), rtol=1e-2, atol=0)


@pytest.mark.parametrize("learnable", [False, True])
def test_calibrated_ranges_stay(learnable: bool) -> None:
    """But of learned ones."""
    student, teacher, batches = student_and_teacher(bits=8, learnable=learnable)
    nodes = [node for node in student.modules() if isinstance(node, FakeQuantizeLayer) and node.reduces_over_ranks]
    before = [node.scale.detach().clone() for node in nodes]
    finetune(student, teacher, [10 * batch for batch in batches], steps=3, lr=1e-4)
    assert [torch.equal(node.scale, scale) for node, scale in zip(nodes, before, strict=True)] == [not learnable] * 2
    if not learnable:
        following = Recipe(lr=1e-4, observe_until=0.5)
        finetune(student, teacher, [10 * batch for batch in batches], steps=3, recipe=following)
        assert all((node.scale > 1.01 * scale).all() for node, scale in zip(nodes, before, strict=True))


def test_a_node_that_data_reach_later_is_set_then_and_the_others_stay() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    nodes = [node for node in student.modules() if isinstance(node, FakeQuantizeLayer) and node.reduces_over_ranks]
    nodes[0].reset()
    before = nodes[1].scale.clone()
    finetune(student, teacher, [10 * batch for batch in batches], steps=3, lr=1e-6)
    assert nodes[0].is_initialized
    assert torch.equal(nodes[1].scale, before)


def test_without_calibration_the_first_batch_sets_ranges_that_stay() -> None:
    model, batches = float_model(), data()
    student = prepare(copy.deepcopy(model), QATConfig(), (batches[0],))
    finetune(student, model, [batches[0], *(10 * batch for batch in batches)], steps=5, lr=1e-6)
    source = student.get_submodule("0").input_source
    assert source.scale.item() == pytest.approx((batches[0].max() - batches[0].min()).item() / 255, rel=1e-3)


def test_modes_hooks_observers_and_running_statistics_are_left_as_they_were() -> None:
    student, teacher, batches = student_and_teacher()
    student.train()
    student[3].eval()
    modes = [module.training for module in student.modules()]
    statistics = student[1].running_mean.clone()
    teacher.train()
    finetune(student, teacher, batches, steps=6, recipe=Recipe(features=("0",), observe_until=0.5))
    assert [module.training for module in student.modules()] == modes
    assert all(module.training for module in teacher.modules())
    assert torch.equal(student[1].running_mean, statistics)
    assert all(node.observer.enabled for node in student.modules() if isinstance(node, FakeQuantizeLayer))
    assert not student[0]._forward_hooks
    assert not teacher[2]._forward_hooks


def test_neither_dropout_nor_batch_statistics_disturb_a_student() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    history = finetune(student, teacher, batches, steps=8, lr=1e-6)
    assert max(history.losses) < 3e-3  # with half of the features dropped it is about 1


def test_batch_statistics_are_re_estimated_at_the_end() -> None:
    pytest.importorskip("mlframework.quantization.calibration.batch_norm")
    student, teacher, batches = student_and_teacher(bits=8)
    shifted = [batch + 1 for batch in batches]
    finetune(student, teacher, shifted, steps=4, recipe=Recipe(lr=1e-6, batch_norm="batch"))
    with torch.no_grad():
        outputs = torch.cat([F.conv2d(batch, student[0].weight, padding=1) for batch in shifted])
    expected = outputs.mean((0, 2, 3))
    torch.testing.assert_close(student[1].running_mean, expected, rtol=0.1, atol=0.02)  # 8 bits


def test_labels_alone() -> None:
    student, _, batches = student_and_teacher(bits=4)
    labels = [(batch.mean((1, 2, 3)) > 0).long() for batch in batches]
    pairs = list(zip(batches, labels, strict=True))
    history = finetune(student, None, pairs, steps=40, lr=1e-2, loss=F.cross_entropy)
    assert sum(history.losses[-5:]) < 0.5 * sum(history.losses[:5])


def test_labels_are_added_to_the_distance_from_the_teacher() -> None:
    student, teacher, batches = student_and_teacher(bits=8)
    labels = torch.zeros(16, dtype=torch.int64)
    recipe = Recipe(lr=1e-9, temperature=2.0)
    alone = finetune(student, teacher, batches[:1], steps=1, recipe=recipe).losses[0]
    both = finetune(
        student,
        teacher,
        [(batches[0], labels)],
        steps=1,
        recipe=recipe,
        loss=lambda outputs, targets: outputs.sum() * 0 + 7,
    ).losses[0]
    assert both == pytest.approx(alone + 7, rel=1e-4)


@pytest.mark.parametrize(("lr", "stop"), [(3e-3, 6), (None, 14)])
def test_an_interrupted_training_goes_on_where_it_stood(lr: float | None, stop: int, tmp_path: Path) -> None:
    """Also where the distance of eight batches tells the rate, and what is kept to start over from."""
    recipe = Recipe(lr=lr, freeze_oscillations=True, dampening=1e-3)

    def run(interrupted: bool) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(1)
        student, teacher, batches = student_and_teacher(learnable=True)
        if interrupted:
            original, calls = teacher.forward, 0

            def forward(*args: Any) -> Tensor:
                nonlocal calls
                calls += 1
                if calls == stop:  # in the middle of the batches: the others of them are next
                    raise KeyboardInterrupt
                return original(*args)  # type: ignore[no-any-return]

            teacher.forward = forward
            with pytest.raises(KeyboardInterrupt):
                finetune(student, teacher, batches, steps=8, recipe=recipe, checkpoint=tmp_path / "tuning.pt")
            convert(student)  # what there is can be used
            del teacher.forward
            torch.manual_seed(1)
            student, teacher, batches = student_and_teacher(learnable=True)
        history = finetune(student, teacher, batches, steps=8, recipe=recipe, checkpoint=tmp_path / "tuning.pt")
        return student, history.losses

    whole, losses = run(interrupted=False)
    resumed, resumed_losses = run(interrupted=True)
    assert resumed_losses == losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not (tmp_path / "tuning.pt").exists()


@pytest.mark.parametrize("kind", ["list", "generator", "seeded loader"])
def test_what_was_trained_on_is_skipped_after_an_interruption(kind: str, tmp_path: Path) -> None:
    student, teacher, batches = student_and_teacher()
    seen: list[int] = []

    def stream() -> Any:
        if kind == "seeded loader":
            shuffled = torch.Generator().manual_seed(3)
            return DataLoader(batches, batch_size=None, shuffle=True, generator=shuffled)  # type: ignore[arg-type]
        return batches if kind == "list" else (batch for _ in range(3) for batch in batches)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(next(index for index, batch in enumerate(batches) if torch.equal(batch, args[0])))

    teacher.register_forward_pre_hook(note)
    stop = 10
    finetune(student, teacher, stream(), steps=10, lr=1e-4)
    expected = list(seen)
    seen.clear()
    stop = 6
    with pytest.raises(KeyboardInterrupt):
        finetune(student, teacher, stream(), steps=10, lr=1e-4, checkpoint=tmp_path / "tuning.pt")
    stop = 10
    finetune(student, teacher, stream(), steps=10, lr=1e-4, checkpoint=tmp_path / "tuning.pt")
    assert seen == expected


def test_batches_that_end_are_refused_before_training_where_statistics_need_them_again() -> None:
    student, teacher, batches = student_and_teacher()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"starts anew.*got a list_iterator"):
        finetune(student, teacher, iter(batches), steps=4, recipe=Recipe(batch_norm="batch"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    finetune(student, teacher, iter(batches), steps=4)


def test_oscillations_are_reported_where_they_are_counted() -> None:
    student, teacher, batches = student_and_teacher(bits=2, learnable=True)
    history = finetune(student, teacher, batches, steps=30, recipe=Recipe(lr=1e-2, freeze_oscillations=True))
    assert history.oscillating.keys() == history.frozen.keys() == {"0", "5"}
    assert sum(history.frozen.values()) > 0


def test_progress_is_shown_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher, batches = student_and_teacher()
    finetune(student, teacher, batches, steps=2, progress=True)
    assert "2/2" in capsys.readouterr().out
    finetune(student, teacher, batches, steps=2)
    assert not capsys.readouterr().out


def test_what_cannot_be_trained_is_refused_before_anything_changes() -> None:
    student, teacher, batches = student_and_teacher()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="steps must be a positive int, got 0"):
        finetune(student, teacher, batches, steps=0)
    with pytest.raises(ValueError, match="teacher and loss must not both be None"):
        finetune(student, None, batches, steps=1)
    with pytest.raises(ValueError, match=r"copy.deepcopy\(model\)"):
        finetune(student, student, batches, steps=1)
    with pytest.raises(TypeError, match="batches must be an iterable of batches"):
        finetune(student, teacher, batches[0], steps=1)
    with pytest.raises(ValueError, match="ended after 0"):
        finetune(student, teacher, [], steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    with pytest.raises(ValueError, match="ended after 4"):
        finetune(student, teacher, iter(batches), steps=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 1.5}, "warmup must be a share"),
        ({"dampening": -1.0}, "dampening must not be negative"),
        ({"batch_norm": "eval"}, "batch_norm must be 'frozen' or 'batch'"),
    ],
)
def test_recipes_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Recipe(), **fields)
