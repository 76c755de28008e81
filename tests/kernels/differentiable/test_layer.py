"""Layers on codes in training: outputs and gradients against autograd of the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import half_of_all
from example_codes import UNSIGNED, random_codes
from example_operators import assert_same, observer
from mlframework.quantization import QuantizationScheme, arithmetic, kernels
from mlframework.quantization.kernels import ConvolutionGeometry
from mlframework.quantization.kernels.differentiable.layer import Codes, Computation, WeightState, layer_on_codes
from mlframework.quantization.kernels.triton_gpu.availability import is_interpreter

# The shape of the codes, that of the weight, and the geometry.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], ConvolutionGeometry | None]] = {
    "linear": ((3, 7, 33), (21, 33), None),
    "conv1d": ((3, 5, 19), (20, 5, 4), ConvolutionGeometry((2,), (3,), (2,))),
    "conv2d": ((2, 7, 9, 8), (12, 7, 3, 2), ConvolutionGeometry((2, 1), (1, 1), (1, 2))),
    "depthwise": ((2, 7, 9, 8), (7, 1, 3, 3), ConvolutionGeometry((1, 1), (1, 1), (1, 1), 7)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
AXES = pytest.mark.parametrize("axis", [None, 0], ids=["per tensor", "per channel"])
STATES: list[dict[str, Any]] = [{"observes": True}, {"averages": None}, {}]
# Each layer with each state and each axis, and each state with each axis; all of them in the long tests.
UNDER_A_COMPILER = pytest.mark.parametrize(
    ("name", "axis", "state"),
    [
        pytest.param(name, axis, state, marks=[] if (one + two + three) % 2 == 0 else pytest.mark.long)
        for one, name in enumerate(CASES)
        for two, axis in enumerate((None, 0))
        for three, state in enumerate(STATES)
    ],
    ids=str,
)
both_paths = pytest.mark.usefixtures("_path")


class Layer:
    """A layer's arguments, anew for each call with the same seed."""

    def __init__(self, case: Any, axis: int | None, *, with_bias: bool = True, **state: Any) -> None:
        torch.manual_seed(0)
        shape, weight_shape, self.geometry = case
        outputs = weight_shape[0]
        self.scheme = QuantizationScheme(narrow_range=True, channel_axis=axis)
        self.codes = Codes(random_codes(shape, UNSIGNED), torch.tensor([[0.037], [3.0]]))
        self.input = arithmetic.dequantize_codes(self.codes.codes, *self.codes.grid, None).requires_grad_()
        self.weight = torch.randn(weight_shape, requires_grad=True)
        self.bias = torch.randn(outputs, requires_grad=True) if with_bias else None
        minimum, maximum, batches, _, zero_point = observer(outputs if axis == 0 else 1)
        scale = torch.rand(zero_point.shape) * 0.01 + 0.005  # some weights saturate
        averages = minimum, maximum, batches
        defaults: dict[str, Any] = {"averages": averages, "momentum": 1.0, "observes": False, "mask": True}
        self.state = WeightState(self.scheme, scale, zero_point, **(defaults | state))
        self.gradient = torch.randn(self.expected().shape)

    def __call__(self, *, again: bool = False) -> tuple[Tensor, Computation | None]:
        own_weight = self.weight.detach()
        arguments = (self.input, self.weight, self.bias, self.codes, own_weight, self.state, self.geometry)
        return layer_on_codes(*arguments, again=again)

    def expected(self, *leaves: Tensor) -> Tensor:
        """In float64: of the input's values, the weight and the bias, rounded straight through."""
        input, weight, *bias = leaves or self.leaves()
        scale = self.state.scale.double()
        step = arithmetic.along_axis(scale, weight.dim(), self.scheme.channel_axis)
        rounded = weight + ((weight / step).round() * step - weight).detach()
        rounded = rounded.clamp(self.scheme.quant_min * step, self.scheme.quant_max * step)
        summand = None
        if bias:
            unit = scale * float(self.codes.grid[0])
            summand = bias[0] + ((bias[0] / unit).round() * unit - bias[0]).detach()
        if self.geometry is None:
            return F.linear(input, rounded, summand)
        convolution = F.conv1d if weight.dim() == 3 else F.conv2d
        return convolution(input, rounded, summand, *self.geometry)

    def leaves(self) -> list[Tensor]:
        scale, zero_point = self.codes.grid.double()
        values = (self.codes.codes.double() - zero_point) * scale
        each = (values, self.weight, *(() if self.bias is None else (self.bias,)))
        return [leaf.detach().double().requires_grad_() for leaf in each]


@both_paths
@pytest.mark.parametrize("with_bias", [True, False])
@AXES
@EVERY_CASE
def test_output_and_gradients_are_those_of_the_formula(case: Any, axis: int | None, with_bias: bool) -> None:
    layer = Layer(case, axis, with_bias=with_bias)
    leaves = layer.leaves()
    expected = layer.expected(*leaves)
    output, _ = layer()
    # A sum in integers, rounded once, times a product of two scales: three roundings.
    assert torch.allclose(output.double(), expected, rtol=1e-6, atol=1e-12)
    output.backward(layer.gradient)
    expected.backward(layer.gradient.double())
    own = (layer.input, layer.weight, *(() if layer.bias is None else (layer.bias,)))
    for one, other in zip(own, leaves, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        # Sums in float32, relative to the largest.
        assert (one.grad.double() - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()
    saturated = (
        layer.weight.detach() / arithmetic.along_axis(layer.state.scale, layer.weight.dim(), axis)
    ).abs() > 127.5
    assert saturated.any()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[saturated].any()


@both_paths
@AXES
@EVERY_CASE
def test_an_observed_weight_has_a_scale_of_its_own(case: Any, axis: int | None) -> None:
    layer = Layer(case, axis, observes=True)
    before = layer.state.scale.clone()
    layer()
    rows = layer.weight.detach().flatten(1) if axis == 0 else layer.weight.detach().reshape(1, -1)
    assert torch.equal(layer.state.scale, rows.abs().amax(dim=1) / 127)
    assert not torch.equal(layer.state.scale, before)


@both_paths
@EVERY_CASE
def test_a_weight_that_a_node_has_observed(case: Any) -> None:
    """Without averages of its own the layer computes the same; its mask is the node's grid."""
    results = []
    for state in ({}, {"averages": None}):
        layer = Layer(case, 0, **state)
        output, _ = layer()
        output.backward(layer.gradient)
        results.append([output.detach(), layer.input.grad, layer.weight.grad])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@both_paths
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_of_the_weight_are_clipped(mask: bool) -> None:
    layer = Layer(CASES["conv2d"], 0, mask=mask)
    layer()[0].backward(layer.gradient)
    clipped = Layer(CASES["conv2d"], 0, mask=mask, gradient_clip=0.5)
    clipped()[0].backward(clipped.gradient)
    assert layer.weight.grad is not None
    assert_same(clipped.weight.grad, layer.weight.grad.clamp(-0.5, 0.5))
    assert_same(clipped.input.grad, layer.input.grad)


@both_paths
@EVERY_CASE
@pytest.mark.parametrize("learns", ["input", "weight", "bias"])
def test_gradients_that_nobody_asks_for_are_not_computed(learns: str, case: Any) -> None:
    whole, layer = Layer(case, 0), Layer(case, 0)
    whole()[0].backward(whole.gradient)
    for name in ("input", "weight", "bias"):
        getattr(layer, name).requires_grad_(name == learns)
    layer()[0].backward(layer.gradient)
    for name in ("input", "weight", "bias"):
        gradient = getattr(layer, name).grad
        if name != learns:
            assert gradient is None
        else:
            assert_same(gradient, getattr(whole, name).grad)


@both_paths
@AXES
@EVERY_CASE
def test_an_output_is_computed_again(case: Any, axis: int | None) -> None:
    """As it was, though state and weight have moved on."""
    layer = Layer(case, axis, observes=True)
    output, computation = layer(again=True)
    layer.state.scale.mul_(2)
    assert computation is not None
    assert_same(computation(), output.detach())
    assert layer()[1] is None


@both_paths
@EVERY_CASE
def test_nan_poisons(case: Any) -> None:
    """In the input: everything. In the weight: its channel."""
    layer = Layer(case, 0)
    layer.codes = layer.codes._replace(grid=torch.tensor([[torch.nan], [3.0]]))
    assert layer()[0].isnan().all()
    layer = Layer(case, 0)
    clean = layer()[0].detach().movedim(-1 if layer.geometry is None else 1, 0)
    layer.weight.data[2].view(-1)[0] = torch.nan
    output = layer()[0].detach().movedim(-1 if layer.geometry is None else 1, 0)
    assert output[2].isnan().all()
    others = torch.arange(len(clean)) != 2
    assert torch.equal(output[others], clean[others])


@both_paths
def test_a_gradient_of_the_gradient_is_refused() -> None:
    layer = Layer(CASES["linear"], 0)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(layer()[0].sum(), layer.input, create_graph=True)


@both_paths
def test_under_autocast_the_gradients_are_of_lower_precision() -> None:
    layer, whole = Layer(CASES["conv2d"], 0), Layer(CASES["conv2d"], 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer()
    expected, _ = whole()
    assert torch.equal(output, expected), "integers have no lower precision"
    output.backward(layer.gradient)
    expected.backward(whole.gradient)
    for one, other in ((layer.input.grad, whole.input.grad), (layer.weight.grad, whole.weight.grad)):
        assert one is not None
        assert other is not None
        assert one.dtype is torch.float32
        assert not torch.equal(one, other)
        assert (one - other).abs().max() <= 0.02 * other.abs().max()  # of 8 bits, in sums of which some cancel


@pytest.mark.interpreter
@pytest.mark.skipif(not is_interpreter(), reason="needs Triton's interpreter")
@half_of_all(under_autocast={"": False, "autocast": True}, case=CASES)
def test_kernels_for_gpus_return_the_dtype_of_a_float_layer(case: Any, under_autocast: bool) -> None:
    """Autocast's, else that of the input; rounded once, and computed again the same."""
    whole, layer = Layer(case, 0), Layer(case, 0)
    expected, _ = whole()
    expected.backward(whole.gradient)
    if not under_autocast:
        layer.input = layer.input.detach().half().requires_grad_()
    with kernels.interpreted_kernels():
        with torch.autocast("cpu", dtype=torch.float16, enabled=under_autocast):
            output, computation = layer(again=True)
        assert computation is not None
        assert_same(output.detach(), expected.detach().half())
        assert_same(computation(), output.detach())
        output.backward(layer.gradient.half())
    for own, other in ((layer.input, whole.input), (layer.weight, whole.weight), (layer.bias, whole.bias)):
        assert own is not None
        assert own.grad is not None
        assert other is not None
        assert other.grad is not None
        assert own.grad.dtype is own.dtype
        assert (own.grad.float() - other.grad).abs().max() <= 0.01 * other.grad.abs().max()  # of 11 bits, in sums


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
@UNDER_A_COMPILER
def test_under_a_compiler(name: str, axis: int | None, state: dict[str, Any]) -> None:
    case = CASES[name]
    torch.compiler.reset()
    results = []
    for compiles in (False, True):
        layer = Layer(case, axis, **state)
        state_of_weight, geometry = layer.state, layer.geometry

        def step(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            codes: Tensor,
            grid: Tensor,
            state: WeightState = state_of_weight,
            geometry: ConvolutionGeometry | None = geometry,
        ) -> Tensor:
            output, _ = layer_on_codes(
                input, weight, bias, Codes(codes, grid), weight.detach(), state, geometry, again=False
            )
            return output * 1.5

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
        output = run(layer.input, layer.weight, layer.bias, *layer.codes)
        output.backward(layer.gradient)
        gradients = layer.input.grad, layer.weight.grad, layer.bias.grad
        averages = layer.state.averages or ()
        results.append([output.detach(), *gradients, layer.state.scale, *averages])
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
