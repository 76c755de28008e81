"""Zero points of few bits that jump to another integer, and back where that was a loss."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mlframework.quantization import QATConfig, Recipe, calibrate, prepare
from mlframework.quantization.qat.fake_quantize_layer import FakeQuantizeLayer
from mlframework.quantization.training.training_loop import TrainingLoop
from mlframework.quantization.training.zero_point_trials import ZeroPointTrials


def _student(bits: int = 4) -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    batches = [torch.randn(64, 8) for _ in range(4)]
    student = prepare(copy.deepcopy(model), QATConfig(activation_bits=bits, learnable=True), (batches[0],))
    calibrate(student, batches)
    return student, model, batches


def _learned(student: nn.Module) -> list[FakeQuantizeLayer]:
    return [node for node in student.modules() if isinstance(node, FakeQuantizeLayer) and node.zero_point.requires_grad]


@torch.no_grad()
def test_of_two_jumps_the_one_that_helps_stays() -> None:
    first, second = _learned(_student()[0])[:2]
    trials = ZeroPointTrials([first, second])
    first.zero_point.fill_(4.0)
    second.zero_point.fill_(7.0)
    codes = trials.codes()
    first.zero_point.fill_(3.25)
    second.zero_point.fill_(7.75)
    trials.take_back(codes, lambda: -float(first.code_of_zero + second.code_of_zero))  # the higher, the better
    assert first.zero_point.item() == 4.0  # in the middle of its integer
    assert second.zero_point.item() == 7.75  # as the optimizer left it
    codes = trials.codes()
    first.zero_point.fill_(2.0)
    trials.take_back(codes, lambda: float("nan") if first.code_of_zero < 3 else 1.0)
    assert first.zero_point.item() == 4.0


@torch.no_grad()
def test_without_a_jump_and_with_many_codes_nothing_is_tried() -> None:
    def loss() -> float:
        raise AssertionError

    for bits, move in ((4, 0.25), (8, 3.0)):
        (node, *_) = _learned(_student(bits)[0])
        trials = ZeroPointTrials([node])
        node.zero_point.fill_(5.0)
        codes = trials.codes()
        node.zero_point.add_(move)
        trials.take_back(codes, loss)
        assert node.zero_point.item() == 5.0 + move


def test_a_training_takes_back_a_jump() -> None:
    """The one code of a GELU below zero; the rate is too low for the gradient to bring it back."""
    student, teacher, batches = _student()
    node = next(node for node in _learned(student) if node.code_of_zero == 1)
    loop = TrainingLoop(student, teacher, None, Recipe(lr=1e-9, quantization_lr=1e-9), 3)

    def push(*args: object) -> None:
        if loop.done == 1:
            node.zero_point.detach().sub_(0.75)

    loop.optimizer.register_step_post_hook(push)
    loop.run(batches, progress=False)
    assert node.code_of_zero == 1
