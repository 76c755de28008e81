"""How autograd functions are called: as PyTorch does, but for what is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlframework.quantization.kernels.differentiable.function import call, refuse_gradient_of_gradient


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        refuse_gradient_of_gradient()
        return gradient * 2


def test_it_is_called_with_a_gradient() -> None:
    input = torch.randn(3, requires_grad=True)
    output = call(_Twice, input)
    assert torch.equal(output, input * 2)
    output.sum().backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.full((3,), 2.0))
    with torch.no_grad():
        assert not call(_Twice, input).requires_grad


def test_a_backward_that_is_recorded_is_refused_with_a_way_out() -> None:
    input = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph must be False[\s\S]*reference_kernels"):
        torch.autograd.grad(call(_Twice, input).sum(), input, create_graph=True)
