"""Distances from a teacher: against float64 formulas; features: against what the modules really return."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import FeatureMatching, QATConfig, calibrate, distillation_loss, prepare
from mlframework.quantization.training.teacher import require_own_parameters


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_logits_against_the_definition_in_float64(temperature: float, shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape) * 3, torch.randn(shape) * 3
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(
        distillation_loss(student, teacher, temperature=temperature).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_gradients_at_high_temperature_do_not_vanish() -> None:
    student = torch.randn(8, 10, requires_grad=True)
    teacher = torch.randn(8, 10)
    sizes = []
    for temperature in (50.0, 100.0):  # T^2 makes them converge (Hinton et al., equation 4)
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature=temperature), student)
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_other_outputs_are_compared_relative_to_the_teachers_power() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    loss = distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(((student - teacher).norm() / teacher.norm()).square().item(), rel=1e-5)
    torch.testing.assert_close(distillation_loss(100 * student, 100 * teacher), loss)


class Outputs(NamedTuple):
    logits: Tensor
    hidden: dict[str, Tensor]
    count: int


def test_structures_are_compared_tensor_by_tensor() -> None:
    a, b, c, d = (torch.randn(3, 2) for _ in range(4))
    loss = distillation_loss(Outputs(a, {"x": b}, 3), Outputs(c, {"x": d}, 4))
    torch.testing.assert_close(loss, (distillation_loss(a, c) + distillation_loss(b, d)) / 2)


def test_no_gradient_reaches_the_teacher_and_a_silent_teacher_is_no_division_by_zero() -> None:
    student, teacher = torch.randn(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    distillation_loss(student, student.detach() * 0 + teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert distillation_loss(torch.zeros(3), torch.zeros(3)).item() == 0


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "error", "message"),
    [
        (torch.ones(2), torch.ones(3), None, ValueError, r"shape of teacher_outputs, got \(2,\) and \(3,\)"),
        (torch.ones(2), torch.ones(2), 0.0, ValueError, "temperature must be positive"),
        (torch.ones(2), (torch.ones(2), torch.ones(2)), None, TypeError, "got 1 and 2"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), None, TypeError, "got 0 and 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    student: object, teacher: object, temperature: float | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        distillation_loss(student, teacher, temperature=temperature)


class Block(nn.Module):
    def __init__(self, activation: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU() if activation else None

    def forward(self, input: Tensor) -> Tensor:
        output = self.norm(self.conv(input))
        return F.relu(output) if self.relu is None else self.relu(output)  # type: ignore[no-any-return]


def models(activation: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    teacher = nn.Sequential(Block(activation), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.randn(5, 3, 4, 4)
    student = prepare(copy.deepcopy(teacher), QATConfig(weight_bits=3), (images,))
    calibrate(student, [images])
    return student, teacher, images


@pytest.mark.parametrize("name", ["0", "0.conv"])
def test_features_are_those_of_modules_that_compute_the_same(name: str) -> None:
    student, teacher, images = models()
    with FeatureMatching(student, teacher, (name,)) as features:
        student(images), teacher(images)
        loss = features.loss()
    block, first = teacher[0](images), student[0](images)
    torch.testing.assert_close(loss, distillation_loss(first, block))
    assert 0 < loss.item() < 0.2


def test_features_train_the_student_alone() -> None:
    student, teacher, images = models()
    with FeatureMatching(student, teacher, ("0",)) as features:
        student(images), teacher(images)
        features.loss().backward()
    assert student[0].conv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_features_need_both_models_to_run_anew() -> None:
    student, teacher, images = models()
    with FeatureMatching(student, teacher, ("0",)) as features:
        student(images), teacher(images)
        features.loss()
        student(images)
        with pytest.raises(RuntimeError, match="0 did not run in both"):
            features.loss()
    assert not teacher[0]._forward_hooks
    assert not features._handles


class Convolution(nn.Module):
    def __init__(self, adds: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.adds = adds

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input) + input if self.adds else self.conv(input)  # type: ignore[no-any-return]


class Followed(nn.Module):
    """Containers that end before what is taken into their last layer or operation."""

    def __init__(self) -> None:
        super().__init__()
        self.function, self.sum, self.norm, self.module = (Convolution(adds) for adds in (False, True, False, False))
        self.after = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)  # called twice: what it returned last is not what each block returned
        self.last = Convolution()

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.sum(F.relu(self.function(input))))
        return self.last(self.relu(self.module(self.relu(self.after(self.norm(hidden))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["function", "function.conv", "sum", "norm", "norm.conv", "module", "last"])
def test_what_follows_a_container_in_the_teacher_is_compared_where_the_student_took_it_in(name: str) -> None:
    teacher, images = Followed().eval(), torch.randn(8, 3, 6, 6)
    teacher.after.running_mean.copy_(torch.tensor([-0.3, 0.0, 0.3]))
    student = prepare(copy.deepcopy(teacher), QATConfig(), (images,))
    calibrate(student, [images])
    with FeatureMatching(student, teacher, (name,)) as features:
        student(images), teacher(images)
        assert 0 < features.loss() < 2e-3  # at 8 bits; on two sides of the activation it is about 0.5
    with FeatureMatching(student, teacher, (name,)) as features:
        teacher(images), student(images + 1)
        assert features.loss() > 2e-3


def test_modules_that_do_not_run_can_be_left_out() -> None:
    teacher, images = Followed().eval(), torch.randn(8, 3, 6, 6)
    teacher.spare = nn.Linear(2, 2)
    student = prepare(copy.deepcopy(teacher), QATConfig(), (images,))
    calibrate(student, [images])
    with FeatureMatching(student, teacher, ("sum", "spare")) as features:
        student(images), teacher(images)
        assert features.leave_out_idle() == ("spare",)
        assert features.loss() > 0
    with FeatureMatching(student, teacher, ("spare",)) as features:
        student(images), teacher(images)
        with pytest.raises(ValueError, match="modules that both models call, got spare"):
            features.leave_out_idle()


def test_names_are_checked() -> None:
    student, teacher, _ = models()
    with pytest.raises(ValueError, match=r"'1\.head', which the student does not have"):
        FeatureMatching(student, teacher, ("1.head",))
    with pytest.raises(ValueError, match="sequence of at least one"):
        FeatureMatching(student, teacher, ())


def test_a_teacher_must_not_share_what_is_trained() -> None:
    model = nn.Linear(2, 2)
    prepared = prepare(model, QATConfig(), (torch.randn(1, 2),))
    with pytest.raises(ValueError, match=r"its weight is the model's weight.*copy.deepcopy\(model\) before prepare"):
        require_own_parameters(model, prepared)
    require_own_parameters(copy.deepcopy(model), prepared)
