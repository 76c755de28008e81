"""Fake quantization and its gradients: against autograd of the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from example_codes import SIGNED, layouts
from example_operators import assert_same, with_specials
from mlframework.quantization import arithmetic, kernels
from mlframework.quantization.kernels.differentiable.fake_quantize import Options, fake_quantize_with_codes
from mlframework.quantization.kernels.operators.fake_quantization import gradient_scale

SHAPE = (4, 6, 5)
AXES = pytest.mark.parametrize("axis", [None, 1], ids=["per tensor", "per channel"])
both_paths = pytest.mark.usefixtures("_path")


def options_of(axis: int | None, *, pass_saturated: bool = False, gradient_clip: float | None = None) -> Options:
    return Options(-8, 7, axis, pass_saturated, gradient_clip)


def leaves(axis: int | None, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values of which some saturate, scale, and a zero point between two codes."""
    channels = 1 if axis is None else SHAPE[axis]
    scale, zero_point = torch.rand(channels) + 0.5, torch.randn(channels) * 2
    return (torch.randn(SHAPE) * 6).requires_grad_(), scale.requires_grad_(learns), zero_point.requires_grad_(learns)


def values_of(input: Tensor, scale: Tensor, zero_point: Tensor, options: Options) -> Tensor:
    return fake_quantize_with_codes(input, scale, zero_point, options, None)[0]


def straight_through(values: Tensor) -> Tensor:
    return values + (values.round() - values).detach()


def simulated(input: Tensor, scale: Tensor, zero_point: Tensor, options: Options) -> Tensor:
    """The formula, in the dtype of its arguments; what saturates in the zero point passes its gradient, too."""
    step = arithmetic.along_axis(scale, input.dim(), options.axis)
    code = zero_point + (zero_point.round().clamp(options.lowest, options.highest) - zero_point).detach()
    offset = arithmetic.along_axis(code, input.dim(), options.axis)
    codes = (straight_through(input / step) + offset).clamp(options.lowest, options.highest)
    return (codes - offset) * step


@both_paths
@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("gradient_clip", [None, 0.5])
@AXES
def test_gradients_are_those_of_the_formula(axis: int | None, gradient_clip: float | None, learns: bool) -> None:
    options = options_of(axis, gradient_clip=gradient_clip)
    own = leaves(axis, learns)
    others = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in own]
    gradient = torch.randn(SHAPE)
    values = values_of(*own, options)
    expected = simulated(*others, options)
    assert torch.allclose(values.double(), expected, rtol=1e-6)  # of one float32 product
    values.backward(gradient)
    passed = gradient if gradient_clip is None else gradient.clamp(-gradient_clip, gradient_clip)
    expected.backward(passed.double())
    assert others[0].grad is not None
    assert torch.equal(own[0].grad, others[0].grad.float())
    # Scale and zero point learn at a pace of their own.
    pace = gradient_scale(own[0], own[1], options.highest)
    for one, other in zip(own[1:], others[1:], strict=True):
        if not learns:
            assert one.grad is None
            continue
        assert other.grad is not None
        # Sums of float32 quotients; digits are relative to their terms.
        assert torch.allclose(one.grad.double(), other.grad * pace, rtol=1e-4, atol=1e-4)


@both_paths
@AXES
def test_all_may_pass(axis: int | None) -> None:
    for gradient_clip in (None, 0.5):
        input, scale, zero_point = leaves(axis, False)
        options = options_of(axis, pass_saturated=True, gradient_clip=gradient_clip)
        gradient = torch.randn(SHAPE)
        values_of(input, scale, zero_point, options).backward(gradient)
        assert_same(input.grad, gradient if gradient_clip is None else gradient.clamp(-0.5, 0.5))


@pytest.mark.skipif(kernels.active_path() != "native", reason="needs compiled kernels")
def test_a_bit_is_saved_of_each_value() -> None:
    input, scale, zero_point = leaves(None, False)
    # Until PyTorch 2.13 a function does not outlive what it has computed.
    values = values_of(input, scale, zero_point, options_of(None))
    function: Any = values.grad_fn
    (mask,) = function.saved_tensors
    assert mask.dtype is torch.uint8
    assert mask.numel() == (input.numel() + 7) // 8
    values = values_of(input, scale, zero_point, options_of(None, pass_saturated=True))
    function = values.grad_fn
    assert not function.saved_tensors


@both_paths
@pytest.mark.parametrize("pass_saturated", [False, True])
@pytest.mark.parametrize("learned", ["neither", "scale", "zero_point"])
def test_what_does_not_learn_may_change_before_backward(learned: str, pass_saturated: bool) -> None:
    gradients = []
    for changes in (False, True):
        torch.manual_seed(0)
        input, scale, zero_point = leaves(None, False)
        scale.requires_grad_(learned == "scale")
        zero_point.requires_grad_(learned == "zero_point")
        values = values_of(input, scale, zero_point, options_of(None, pass_saturated=pass_saturated))
        if changes:
            for state in (scale, zero_point):
                if not state.requires_grad:
                    state.mul_(3)
        values.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([input.grad, scale.grad, zero_point.grad])
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other)


@both_paths
def test_nan_stays() -> None:
    input = with_specials(torch.randn(SHAPE)).requires_grad_()
    values, codes, grid = fake_quantize_with_codes(input, torch.ones(1), torch.zeros(1), options_of(None), SIGNED)
    assert torch.equal(values.isnan(), input.isnan())
    if kernels.active_path() == "reference":
        assert codes is grid is None, "nobody would compute with them"
    else:
        assert grid is not None
        assert torch.equal(grid.isnan(), torch.tensor([[True], [False]]))
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert input.grad is not None
    assert torch.equal(input.grad.isfinite(), torch.ones(SHAPE, dtype=torch.bool))
    assert not input.grad[input.isnan()].any()


@both_paths
@pytest.mark.parametrize("learns", [False, True])
def test_a_gradient_of_the_gradient(learns: bool) -> None:
    """What came in passes once more where the gradient passed."""
    input, scale, zero_point = leaves(1, learns)
    gradient = torch.randn(SHAPE, requires_grad=True)
    values = values_of(input, scale, zero_point, options_of(1))
    (first,) = torch.autograd.grad(values, input, gradient, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), gradient)
    assert torch.equal(second, 2 * first.detach())


@both_paths
def test_it_takes_transforms() -> None:
    input, scale, zero_point = leaves(None, False)

    def total(row: Tensor) -> Tensor:
        return values_of(row, scale, zero_point, options_of(None)).square().sum()

    mapped = torch.func.vmap(torch.func.grad(total))(input.detach())
    total(input).backward()  # type: ignore[no-untyped-call]
    assert_same(mapped, input.grad)


@both_paths
def test_any_layout_and_half_precision() -> None:
    options = options_of(1)
    _, scale, zero_point = leaves(1, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in layouts(torch.randn(SHAPE).to(dtype) * 6).values():
            input = layout.detach().requires_grad_()
            values = values_of(input, scale, zero_point, options)
            assert values.dtype is dtype
            expected = simulated(layout.float(), scale, zero_point, options).to(dtype)
            assert_same(values.detach(), expected)
            values.sum().backward()  # type: ignore[no-untyped-call]
            assert input.grad is not None
            assert input.grad.dtype is dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("pass_saturated", [False, True])
@AXES
def test_under_a_compiler(axis: int | None, pass_saturated: bool, learns: bool) -> None:
    torch.compiler.reset()
    options = options_of(axis, pass_saturated=pass_saturated)

    def step(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return fake_quantize_with_codes(input * 1.5, scale, zero_point, options, None)[0].square()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        own = leaves(axis, learns)
        output = run(*own)
        output.sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in own)])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
