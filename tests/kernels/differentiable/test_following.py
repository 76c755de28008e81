"""What follows a layer in training, in one step: against autograd of the same steps one by one, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_codes import SIGNED, UNSIGNED, random_codes
from example_operators import RELU6, UNBOUNDED, assert_same, rows_of, with_specials
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.kernels import ConvolutionGeometry
from mlframework.quantization.kernels.differentiable.following import (
    Grid,
    clip_and_quantize,
    look_up_and_quantize,
    normalize_and_quantize,
)
from mlframework.quantization.kernels.differentiable.layer import Codes, Computation
from mlframework.quantization.kernels.operators.normalization import batch_statistics
from mlframework.quantization.kernels.operators.training_layers import weighted_product

pytestmark = pytest.mark.usefixtures("_path")

SHAPE, CHANNELS, EPSILON = (3, 5, 4, 6), 5, 1e-5
SCHEME = QuantizationScheme(signed=False, symmetric=False)
CLIPS = pytest.mark.parametrize("clip", [UNBOUNDED, (0.0, math.inf), RELU6, (-0.7, 0.4)], ids=str)
GRADIENT_CLIPS = pytest.mark.parametrize("gradient_clip", [None, 0.5])
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own


def grid_of(*, codes: bool = True, gradient_clip: float | None = None) -> Grid:
    return Grid(torch.tensor([0.011]), torch.tensor([99.0]), SCHEME, codes, gradient_clip)


def fake_quantized(values: Tensor, grid: Grid) -> Tensor:
    """The formula, straight through where it does not saturate."""
    scale, zero_point = grid.scale.to(values.dtype), float(grid.zero_point)
    steps = values / scale
    codes = (steps + (steps.round() - steps).detach() + zero_point).clamp(SCHEME.quant_min, SCHEME.quant_max)
    return (codes - zero_point) * scale


def clipped(values: Tensor, clip: tuple[float, float]) -> Tensor:
    return F.hardtanh(values, *clip)  # like ReLU6, it passes nothing at its ends


def passed(gradient: Tensor, gradient_clip: float | None) -> Tensor:
    return (gradient if gradient_clip is None else gradient.clamp(-gradient_clip, gradient_clip)).double()


def assert_refused(values: Tensor, leaf: Tensor) -> None:
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(values.sum(), leaf, create_graph=True)


# A clip


@pytest.mark.parametrize("adds", [False, True])
@GRADIENT_CLIPS
@CLIPS
def test_clip_and_quantize(clip: tuple[float, float], gradient_clip: float | None, adds: bool) -> None:
    grid = grid_of(gradient_clip=gradient_clip)
    leaves = [torch.randn(SHAPE, requires_grad=True) for _ in range(1 + adds)]
    # A sum is rounded to float32 before it is quantized.
    summed = sum(leaf.detach() for leaf in leaves).double().requires_grad_()
    expected = fake_quantized(clipped(summed, clip), grid)
    result = clip_and_quantize(leaves[0], leaves[1] if adds else None, clip, grid, True)
    assert torch.allclose(result.values.double(), expected, rtol=1e-6)
    assert result.codes is not None
    assert result.codes.dtype is UNSIGNED
    assert torch.equal((result.codes.float() - 99) * grid.scale, result.values)
    assert_same(result.grid, torch.tensor([[0.011], [99.0]]))
    ends = clipped(summed, clip).detach()
    assert_same(result.extremes, torch.stack([-ends.min(), ends.max()]).float().reshape(2, 1))
    gradient = torch.randn(SHAPE)
    result.values.backward(gradient)
    expected.backward(passed(gradient, gradient_clip))
    for leaf in leaves:
        assert_same(leaf.grad, summed.grad.float())


def learned_grid(gradient_clip: float | None = None) -> Grid:
    grid = grid_of(gradient_clip=gradient_clip)
    return grid._replace(scale=grid.scale.requires_grad_(), zero_point=grid.zero_point.requires_grad_())


def gradients_of_the_grid(values: Tensor, gradient: Tensor) -> tuple[float, float]:
    """LSQ, equations 3 and 4, and LSQ+, section 3.2, for values that are clipped already, in float64."""
    scale, zero_point, numbers = 0.011, 99, values.detach().double()
    codes = (numbers / float(torch.tensor(scale))).round() + zero_point
    inside = (codes >= SCHEME.quant_min) & (codes <= SCHEME.quant_max)
    slopes = codes.clamp(SCHEME.quant_min, SCHEME.quant_max) - zero_point
    slopes = slopes - torch.where(inside, numbers / float(torch.tensor(scale)), 0.0)
    pace = 1 / math.sqrt(values.numel() * SCHEME.quant_max)
    return (
        pace * float((gradient.double() * slopes).sum()),
        -pace * scale * float((gradient.double() * ~inside).sum()),
    )


@pytest.mark.parametrize("adds", [False, True])
@GRADIENT_CLIPS
@CLIPS
def test_a_clip_onto_a_learned_grid(clip: tuple[float, float], gradient_clip: float | None, adds: bool) -> None:
    grid, fixed = learned_grid(gradient_clip), grid_of(gradient_clip=gradient_clip)
    leaves = [(torch.randn(SHAPE) * 1.5).requires_grad_() for _ in range(1 + adds)]
    addend = leaves[1] if adds else None
    gradient = torch.randn(SHAPE)
    result, known = (clip_and_quantize(leaves[0], addend, clip, each, False) for each in (grid, fixed))
    assert_same(result.values, known.values)
    expected = torch.autograd.grad(known.values, leaves, gradient)
    result.values.backward(gradient)
    for leaf, other in zip(leaves, expected, strict=True):
        assert_same(leaf.grad, other)
    values = sum(leaf.detach() for leaf in leaves).clamp(*clip)
    to_scale, to_zero_point = gradients_of_the_grid(values, passed(gradient, gradient_clip))
    assert grid.scale.grad.item() == pytest.approx(to_scale, rel=1e-4, abs=1e-5)
    assert grid.zero_point.grad.item() == pytest.approx(to_zero_point, rel=1e-4, abs=1e-7)


@CLIPS
def test_a_sum_onto_a_learned_grid_keeps_codes(clip: tuple[float, float]) -> None:
    """A byte of each operand in the place of its values, which have gradients of the very same bits."""
    codes = [random_codes(SHAPE, UNSIGNED), random_codes(SHAPE, SIGNED)]
    grids = [torch.tensor([[0.013], [77.0]]), torch.tensor([[0.017], [-3.0]])]
    kept = [Codes(*pair) for pair in zip(codes, grids, strict=True)]
    gradient, gradients = torch.randn(SHAPE), []
    for operands in ((None, None), (kept[0], None), (None, kept[1]), (kept[0], kept[1])):
        leaves = [
            ((each.float() - grid[1]) * grid[0]).requires_grad_() for each, grid in zip(codes, grids, strict=True)
        ]
        grid = learned_grid()
        values = clip_and_quantize(leaves[0], leaves[1], clip, grid, False, operands).values
        saved: Any = values.grad_fn
        full = [each.dtype for each in saved.saved_tensors if each is not None and each.shape == SHAPE]
        assert full.count(torch.float32) == operands.count(None)
        values.backward(gradient)
        gradients.append([each.grad for each in (*leaves, grid.scale, grid.zero_point)])
    for others in gradients[1:]:
        for own, other in zip(gradients[0], others, strict=True):
            assert_same(own, other)


def test_what_is_not_asked_for_is_not_there() -> None:
    input, addend = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    result = clip_and_quantize(input, addend, RELU6, grid_of(codes=False), False)
    assert result[1:] == (None, None, None)
    result.values.sum().backward()  # type: ignore[no-untyped-call]
    assert addend.grad is None


def test_a_bit_is_saved_of_each_value() -> None:
    input = torch.randn(SHAPE, requires_grad=True)
    # Until PyTorch 2.13 a function does not outlive what it has computed.
    values = clip_and_quantize(input, input, RELU6, grid_of(), True).values
    function: Any = values.grad_fn
    (mask,) = function.saved_tensors
    assert mask.dtype is UNSIGNED
    assert mask.numel() == (input.numel() + 7) // 8


def test_nan_of_a_clip_stays() -> None:
    input = with_specials(torch.randn(SHAPE)).requires_grad_()
    result = clip_and_quantize(input, None, RELU6, grid_of(), True)
    assert torch.equal(result.values.isnan(), input.isnan())
    assert result.grid is not None
    assert result.grid[0].isnan()
    result.values.backward(torch.full(SHAPE, torch.nan))
    assert input.grad is not None
    assert not input.grad[input.isnan()].any(), "nothing passes, not even NaN"


# Batch normalization


def normalized(input: Tensor, weight: Tensor | None, bias: Tensor | None, clip: Any, grid: Grid, **again: Any) -> Any:
    statistics = batch_statistics(input.detach(), None, None, 0.1, EPSILON)
    options = {"computation": None, "addend": None, "is_frozen": False} | again
    return normalize_and_quantize(input, weight, bias, statistics, clip, grid, **options)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("affine", ["neither", "both"])
@GRADIENT_CLIPS
@CLIPS
def test_normalization_onto_a_learned_grid(
    clip: tuple[float, float], gradient_clip: float | None, affine: str, is_frozen: bool
) -> None:
    grid, fixed = learned_grid(gradient_clip), grid_of(gradient_clip=gradient_clip)
    input = rows_of(torch.randn(SHAPE) * 2 + 1).requires_grad_()
    parameters = [torch.randn(CHANNELS, requires_grad=True) for _ in range(2)] if affine == "both" else [None, None]
    result, known = (normalized(input, *parameters, clip, each, is_frozen=is_frozen) for each in (grid, fixed))
    assert_same(result.values, known.values)
    gradient = rows_of(torch.randn(SHAPE))
    leaves = [leaf for leaf in (input, *parameters) if leaf is not None]
    expected = torch.autograd.grad(known.values, leaves, gradient)
    result.values.backward(gradient)
    for leaf, other in zip(leaves, expected, strict=True):
        assert_same(leaf.grad, other)
    mean, inverse = batch_statistics(input.detach(), None, None, 0.1, EPSILON)
    weight, bias = (
        torch.full((CHANNELS,), value) if each is None else each.detach()
        for each, value in zip(parameters, (1.0, 0.0), strict=True)
    )
    along = (1, -1, *[1] * (len(SHAPE) - 2))
    factor = inverse * weight  # in float32, as the forward computes it
    values = (input.detach() * factor.reshape(along) + (bias - mean * factor).reshape(along)).clamp(*clip)
    to_scale, to_zero_point = gradients_of_the_grid(values, passed(gradient, gradient_clip))
    assert grid.scale.grad.item() == pytest.approx(to_scale, rel=1e-3, abs=1e-4)
    assert grid.zero_point.grad.item() == pytest.approx(to_zero_point, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("affine", ["neither", "weight", "bias", "both"])
@GRADIENT_CLIPS
@CLIPS
def test_normalize_and_quantize(clip: tuple[float, float], gradient_clip: float | None, affine: str) -> None:
    grid = grid_of(gradient_clip=gradient_clip)
    input = rows_of(torch.randn(SHAPE) * 2 + 1).requires_grad_()
    weight = torch.randn(CHANNELS, requires_grad=True) if affine in ("weight", "both") else None
    bias = torch.randn(CHANNELS, requires_grad=True) if affine in ("bias", "both") else None
    leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (input, weight, bias)]
    unclipped = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPSILON)
    exact = clipped(unclipped, clip)
    result = normalized(input, weight, bias, clip, grid)
    # Half a step, and what float32 makes of the normalization.
    saturated = exact.clamp(-99 * 0.011, 156 * 0.011)
    assert (result.values.double() - saturated).abs().max() <= 0.0055 + 1e-5
    assert_same(result.grid, torch.tensor([[0.011], [99.0]]))
    gradient = torch.randn(SHAPE)
    result.values.backward(gradient)
    codes = exact / 0.011 + 99
    inside = (codes > -0.5) & (codes < 255.5) & (unclipped > clip[0]) & (unclipped < clip[1])
    unclipped.backward(passed(gradient, gradient_clip) * inside)
    for one, other in zip((input, weight, bias), leaves, strict=True):
        if one is not None and other is not None:
            assert one.grad is not None
            assert other.grad is not None
            # Sums in float64 of what float32 normalized, relative to the largest.
            assert (one.grad.double() - other.grad).abs().max() <= 3e-5 * other.grad.abs().max() + 1e-6


@pytest.mark.parametrize("adds", [False, True])
def test_an_input_that_is_computed_again_has_the_same_gradients(adds: bool) -> None:
    geometry = ConvolutionGeometry((1, 1), (1, 1), (1, 1))
    scheme = QuantizationScheme(narrow_range=True, channel_axis=0)
    layer = (
        random_codes((3, 4, 4, 6), UNSIGNED),
        torch.tensor([[0.037], [3.0]]),
        torch.randn(CHANNELS, 4, 3, 3),
        torch.full((CHANNELS,), 0.02),
        torch.randn(CHANNELS),
        scheme,
        geometry,
    )
    output = weighted_product(*layer)
    addend = torch.randn_like(output) if adds else None
    gradient = torch.randn(SHAPE)
    results = []
    for again in ({}, {"computation": Computation(*layer), "addend": addend}):
        input = (output if addend is None else output + addend).detach().requires_grad_()
        weight, bias = torch.linspace(-1, 1, CHANNELS).requires_grad_(), torch.ones(CHANNELS, requires_grad=True)
        result = normalized(input, weight, bias, RELU6, grid_of(), **again)
        function: Any = result.values.grad_fn
        kept = [saved.data_ptr() for saved in function.saved_tensors if saved is not None]
        assert (input.data_ptr() in kept) is not bool(again)
        result.values.backward(gradient)
        results.append([result.values.detach(), result.codes, input.grad, weight.grad, bias.grad])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_nan_of_a_normalized_value_stays() -> None:
    input = rows_of(torch.randn(SHAPE))
    input[0, 2, 1, 1] = torch.nan
    result = normalized(input.requires_grad_(), None, None, RELU6, grid_of())
    assert torch.equal(result.values.isnan().any(dim=0).any(dim=-1).any(dim=-1), torch.arange(CHANNELS) == 2)
    assert result.grid[0].isnan()
    assert torch.equal(result.extremes, torch.full((2, 1), -torch.inf))


# A table


@GRADIENT_CLIPS
def test_look_up_and_quantize(gradient_clip: float | None) -> None:
    codes, table, slopes = random_codes(SHAPE, SIGNED), random_codes((256,), UNSIGNED), torch.randn(256)
    grid = torch.tensor([[0.02], [7.0]])
    input = torch.randn(SHAPE, requires_grad=True)
    values, results = look_up_and_quantize(input, codes, table, slopes, grid, gradient_clip)
    places = codes.long() + 128
    assert_same(results, table[places])
    assert_same(values.detach(), (table[places].float() - 7) * 0.02)
    gradient = torch.randn(SHAPE)
    values.backward(gradient)
    assert_same(input.grad, passed(gradient, gradient_clip).float() * slopes[places])


def test_nan_of_a_grid_poisons_what_is_looked_up() -> None:
    grid = torch.tensor([[torch.nan], [7.0]])
    codes, input = random_codes(SHAPE, SIGNED), torch.randn(SHAPE, requires_grad=True)
    values, _ = look_up_and_quantize(input, codes, random_codes((256,), UNSIGNED), torch.ones(256), grid, None)
    assert values.isnan().all()


def test_where_a_function_is_flat_no_gradient_passes() -> None:
    codes, input = random_codes(SHAPE, SIGNED), torch.randn(SHAPE, requires_grad=True)
    slopes = (torch.arange(256) > 128).float()
    values, _ = look_up_and_quantize(input, codes, random_codes((256,), UNSIGNED), slopes, torch.ones(2, 1), None)
    values.backward(torch.full(SHAPE, torch.inf))
    assert input.grad is not None
    assert torch.equal(input.grad == torch.inf, codes > 0)
    assert not input.grad[codes <= 0].any()


# All of them

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda input: clip_and_quantize(input, None, RELU6, grid_of(), True).values,
    "sum": lambda input: clip_and_quantize(input, input * 0.5, RELU6, grid_of(codes=False), False).values,
    "normalize": lambda input: normalized(input, torch.ones(CHANNELS), None, RELU6, grid_of()).values,
    "look up": lambda input: look_up_and_quantize(
        input,
        arithmetic.quantize_to(input.detach(), torch.tensor([0.02]), torch.zeros(1), -128, 127, SIGNED, None),
        torch.arange(256).flip(0).to(UNSIGNED),
        torch.linspace(-1, 1, 256),
        torch.tensor([[0.02], [7.0]]),
        None,
    )[0],
}
EVERY_STEP = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@EVERY_STEP
def test_a_gradient_of_the_gradient_is_refused(step: Callable[[Tensor], Tensor]) -> None:
    input = rows_of(torch.randn(SHAPE)).requires_grad_()
    assert_refused(step(input), input)


@pytest.mark.slow
@compiles
@EVERY_STEP
def test_under_a_compiler(step: Callable[[Tensor], Tensor]) -> None:
    if kernels.active_path() != "native":
        pytest.skip("compilers trace references as any other function")
    torch.compiler.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        input = rows_of(torch.randn(SHAPE)).requires_grad_()
        output = run(input)
        output.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([output.detach(), input.grad])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
