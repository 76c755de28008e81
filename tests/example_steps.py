"""One training step of a model on the compiled kernels, and the same on the user's own modules."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import kernels
from mlframework.quantization.kernels.operators.declaration import DECLARED

needs_integer_layers = pytest.mark.skipif(kernels.active_path() != "native", reason="needs compiled kernels")


class Step(NamedTuple):
    """What a step computed: gradients by name, ``input`` among them, and the buffers that it left."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step_of(model: nn.Module, input: Tensor) -> Step:
    """One forward and backward of a copy of the model; random weights make every output's gradient another."""
    model = copy.deepcopy(model)
    input = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(input)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (output * weights.to(output.dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(output.detach(), {"input": input.grad, **gradients}, dict(model.named_buffers()))


def reference_step(model: nn.Module, input: Tensor) -> Step:
    """The step through the user's own modules and PyTorch's operations."""
    with kernels.reference_kernels():
        return step_of(model, input)


def float64_step(model: nn.Module, input: Tensor) -> Step:
    """The step through the user's own modules in float64, on the same grids."""
    return step_of(copy.deepcopy(model).double(), input.double())


def assert_steps_agree(actual: Step, expected: Step, step_size: float = 0.0, rtol: float = 1e-4) -> None:
    """Results are the same but for the order of float32 sums.

    Sums that differ by float32 rounding lie, one time in a thousand or so, on different sides of a rounding boundary:
    the output is then another code, by one ``step_size``. Gradients do not depend on it within one layer.
    """
    difference = (actual.output.double() - expected.output.double()).abs()
    close = difference <= 1e-5 * expected.output.double().abs().max() + 1e-12
    assert bool((difference[~close] <= 1.001 * step_size).all())
    assert (~close).sum() <= max(1, 0.002 * close.numel())
    assert actual.gradients.keys() == expected.gradients.keys()
    # The bias of a layer before a batch normalization has a gradient of zero but for rounding: so much of the largest.
    floor = 3e-6 * max(float(each.abs().max()) for each in expected.gradients.values() if each is not None)
    for name, gradient in actual.gradients.items():
        other = expected.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert_gradients_agree(gradient, other, rtol, name, floor)
    assert_buffers_agree(actual.buffers, expected.buffers)


def assert_gradients_agree(
    actual: Tensor, expected: Tensor, rtol: float = 1e-4, name: str = "", floor: float = 1e-7
) -> None:
    """Relative to the largest: sums of both signs leave small gradients with few digits."""
    assert actual.shape == expected.shape, name
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= rtol * expected.double().abs().max() + floor, f"{name}: {difference}"


def assert_buffers_agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Counts are the same; statistics and scales are but for the order of float32 sums."""
    assert actual.keys() == expected.keys()
    for name, buffer in actual.items():
        # Scales of the weights and numbers of batches need no sums; 1e-5 is a hundred roundings of the others.
        torch.testing.assert_close(
            buffer.double(),
            expected[name].double(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def count_operators(monkeypatch: pytest.MonkeyPatch, *names: str) -> Counter[str]:
    """Counts the calls of compiled operators from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str, operator: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return operator(*args)

        return call

    for name in names:
        monkeypatch.setattr(DECLARED[name], "overload", counting(name, DECLARED[name].overload))
    return calls
