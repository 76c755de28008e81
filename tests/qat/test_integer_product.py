"""Layers in training: on codes as in float64 on the same grids, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_engines import ENGINES
from example_layers import LAYERS
from example_steps import (
    assert_gradients_agree,
    assert_steps_agree,
    count_operators,
    float64_step,
    needs_integer_layers,
    reference_step,
    step_of,
)
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QATModuleWrapper,
    QuantizationScheme,
    StraightThroughEstimator,
    kernels,
)

pytestmark = needs_integer_layers

ON_CODES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(33, 21), (19, 33)),
    "linear without bias": (lambda: nn.Linear(33, 21, bias=False), (19, 33)),
    "linear of tokens": (lambda: nn.Linear(33, 21), (3, 5, 33)),
    "linear of a vector": (lambda: nn.Linear(33, 21), (33,)),
    "conv1d": (lambda: nn.Conv1d(5, 19, 3, stride=2, padding=1), (4, 5, 17)),
    "conv2d": (lambda: nn.Conv2d(5, 19, 3, padding=(1, 2)), (3, 5, 9, 8)),
    "strided": (lambda: nn.Conv2d(17, 8, (2, 3), stride=(2, 1), dilation=(1, 2), bias=False), (3, 17, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(20, 35, 1), (3, 20, 5, 7)),
    "depthwise": (lambda: nn.Conv2d(18, 18, 3, padding=1, groups=18), (3, 18, 7, 6)),
    "depthwise conv1d": (lambda: nn.Conv1d(18, 18, 5, groups=18, dilation=2), (3, 18, 17)),
}
EVERY_LAYER_ON_CODES = pytest.mark.parametrize("name", ON_CODES)

CONFIGS: dict[str, QATConfig] = {
    **{target: QATConfig(target=target) for target in ENGINES},
    "per tensor": QATConfig(per_channel_weights=False),
    "4 bits": QATConfig(weight_bits=4, activation_bits=4),
    "learnable": QATConfig(learnable=True),
    "identity": QATConfig(estimator=StraightThroughEstimator(saturated="identity")),
    "gradient clip": QATConfig(estimator=StraightThroughEstimator(gradient_clip=0.5)),
    "identity, clip": QATConfig(estimator=StraightThroughEstimator(saturated="identity", gradient_clip=0.5)),
}


# What computes a layer on codes: the first where the weight's node is one that follows the newest weight.
ON_INTEGERS = ("train_layer", "weighted_product")


def seen(layer: nn.Module, shape: tuple[int, ...], config: QATConfig | None = None, **options: Any) -> QATModuleWrapper:
    """A wrapper without output node that has seen data. What it is tried on goes beyond that, so that some saturates,
    and its weight has grown since its scale was set, for the same reason."""
    wrapper = QATModuleWrapper(layer, config, **options)
    wrapper(torch.randn(shape))
    wrapper.output_fake_quantize = None
    for node in (wrapper.input_fake_quantize, wrapper.weight_fake_quantize):
        assert node is not None
        node.observer.enabled = False
        if node.learnable and not node.scheme.symmetric:
            with torch.no_grad():
                node.zero_point.add_(0.4)
    with torch.no_grad():
        layer.weight.mul_(1.2)  # type: ignore[operator]
    return wrapper


def wrapper_of(name: str, config: QATConfig | None = None) -> tuple[QATModuleWrapper, Tensor]:
    make, shape = ON_CODES[name]
    wrapper = seen(make(), shape, config)
    return wrapper, away_from_ties(wrapper, torch.randn(shape) * 1.3)


def away_from_ties(wrapper: QATModuleWrapper, input: Tensor) -> Tensor:
    """Values near these that float32 and float64 round to the same code."""
    node = wrapper.input_fake_quantize
    assert node is not None
    scale = node.scale.detach()
    return ((input / scale).round() + 0.6 * (torch.rand_like(input) - 0.5)) * scale


@pytest.mark.parametrize("truth", [reference_step, float64_step])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@EVERY_LAYER_ON_CODES
def test_a_step_is_that_of_the_users_own_layer(
    name: str, config: QATConfig, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, input = wrapper_of(name, config)
    calls = count_operators(monkeypatch, *ON_INTEGERS)
    actual = step_of(wrapper, input)
    assert calls.total() == 1
    assert_steps_agree(actual, truth(wrapper, input))
    assert calls.total() == 1, "the truth is computed otherwise"


@pytest.mark.parametrize("name", ["conv2d", "strided", "pointwise", "depthwise"])
def test_memory_formats_of_inputs_and_weights(name: str) -> None:
    wrapper, input = wrapper_of(name)
    expected = float64_step(wrapper, input)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        wrapper.to(memory_format=memory_format)
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = step_of(wrapper, input.contiguous(memory_format=layout))
            assert_steps_agree(actual, expected)
            assert actual.output.is_contiguous(memory_format=layout), "as the layer itself gives it"


@EVERY_LAYER_ON_CODES
def test_training_computes_the_integers_of_evaluation(name: str) -> None:
    wrapper, input = wrapper_of(name)
    trained = wrapper(input)
    with torch.no_grad():
        assert torch.equal(wrapper.eval()(input), trained)


@pytest.mark.parametrize("target", ENGINES)
def test_the_bias_is_rounded_on_either_path(target: str) -> None:
    wrapper, input = wrapper_of("conv2d", QATConfig(target=target, weight_bits=2, activation_bits=2))
    with torch.no_grad():
        exact = wrapper.eval()(input)
    wrapper.train()
    with kernels.reference_kernels():
        simulated = wrapper(input)
    # Grids of two bits: what is not rounded would stand out by far more than the sums' float32 rounding.
    torch.testing.assert_close(simulated, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wrapper(input), exact, rtol=0, atol=0)


def test_a_weight_that_is_part_of_another_tensor() -> None:
    """Its elements do not fill a block of memory, as a mask of them does."""
    wrapper, input = wrapper_of("linear")
    for weight in (torch.randn(42, 33)[::2], torch.randn(21, 66)[:, ::2], torch.randn(33, 21).t()):
        results = []
        for dtype in (torch.float32, torch.float64):
            model = copy.deepcopy(wrapper).to(dtype)
            model.weight = nn.Parameter(weight.to(dtype) if dtype is torch.float64 else weight)
            output = model(input.to(dtype))
            (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape)).sum().backward()
            results.append((output.detach(), model.weight.grad))
        torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=1e-5)
        assert_gradients_agree(results[0][1], results[1][1])


def test_frozen_parameters_and_inputs_get_no_gradient() -> None:
    wrapper, input = wrapper_of("conv2d")
    expected = float64_step(wrapper, input)
    for frozen in ("weight", "bias", "input"):
        parameters = {"weight": wrapper.weight, "bias": wrapper.bias, "input": input.clone().requires_grad_()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name != frozen)
            parameter.grad = None
        weights = torch.randn(expected.output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        (wrapper(parameters["input"]) * weights.float()).sum().backward()
        for name, parameter in parameters.items():
            assert (parameter.grad is None) == (name == frozen)
            if parameter.grad is not None:
                other = expected.gradients[name]
                assert other is not None
                assert_gradients_agree(parameter.grad, other)


@EVERY_LAYER_ON_CODES
def test_no_float_activation_is_saved(name: str) -> None:
    wrapper, input = wrapper_of(name)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapper(input.requires_grad_())
    weight = wrapper.weight.untyped_storage().data_ptr()
    floats = [t for t in saved if t.is_floating_point() and t.untyped_storage().data_ptr() != weight]
    channels = wrapper.weight.shape[0]
    assert all(tensor.numel() <= channels for tensor in floats), "scales and zero points alone"
    assert any(tensor.dtype is torch.uint8 and tensor.shape == input.shape for tensor in saved), "the input's codes"


FALLS_BACK: dict[str, Callable[[QATModuleWrapper], Any]] = {
    "forward hook": lambda wrapper: wrapper.layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda wrapper: wrapper.layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda wrapper: wrapper.layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda wrapper: wrapper.layer.register_full_backward_pre_hook(lambda *_: None),
    "own forward": lambda wrapper: setattr(wrapper.layer, "forward", wrapper.layer.forward),
    "hook on the input's node": lambda wrapper: wrapper.input_fake_quantize.register_forward_hook(
        lambda module, args, output: output + 0.01
    ),
    "hook on the weight's node": lambda wrapper: wrapper.weight_fake_quantize.register_forward_hook(
        lambda module, args, output: output + 0.01
    ),
    "calibrating": lambda wrapper: setattr(wrapper.input_fake_quantize, "calibrating", True),
    "input's node off": lambda wrapper: setattr(wrapper.input_fake_quantize, "fake_quantize_enabled", False),
    "weight's node off": lambda wrapper: setattr(wrapper.weight_fake_quantize, "fake_quantize_enabled", False),
    "no input node": lambda wrapper: setattr(wrapper, "input_fake_quantize", None),
    "no weight node": lambda wrapper: setattr(wrapper, "weight_fake_quantize", None),
}


@pytest.mark.parametrize("change", FALLS_BACK.values(), ids=FALLS_BACK)
def test_it_falls_back(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, input = wrapper_of("conv2d")
    input.requires_grad_()
    change(wrapper)
    calls = count_operators(monkeypatch, *ON_INTEGERS)
    wrapper(input)
    assert not calls
    # A deep copy of a hook or of a bound forward is the original's; so both steps run on the wrapper itself.
    weights = torch.randn(4)
    results = []
    for reference in (False, True):
        wrapper.zero_grad()
        with kernels.reference_kernels() if reference else torch.enable_grad():
            output = wrapper(input)
        (output[:, :4] * weights[:, None, None]).sum().backward()
        results.append((output.detach(), wrapper.weight.grad.clone(), wrapper.bias.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["same padding", "reflected", "grouped", "conv3d", "transposed"])
def test_other_layers_run_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = LAYERS[name]
    wrapper, input = seen(example.make(), example.shape), torch.randn(example.shape)
    calls = count_operators(monkeypatch, *ON_INTEGERS)
    assert_steps_agree(step_of(wrapper, input), reference_step(wrapper, input))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_run_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, input = wrapper_of("conv2d")
    calls = count_operators(monkeypatch, *ON_INTEGERS)
    assert wrapper.to(dtype)(input.to(dtype)).dtype is dtype
    assert not calls


@pytest.mark.parametrize("name", ["conv1d", "conv2d"])
def test_an_input_without_batch_runs_as_it_is(name: str) -> None:
    wrapper, input = wrapper_of(name)
    assert_steps_agree(step_of(wrapper, input[0]), reference_step(wrapper, input[0]))


@EVERY_LAYER_ON_CODES
def test_an_empty_batch(name: str) -> None:
    wrapper, input = wrapper_of(name)
    if input.dim() == 1:
        return
    actual, expected = step_of(wrapper, input[:0]), reference_step(wrapper, input[:0])
    assert actual.output.shape == expected.output.shape
    for key, gradient in actual.gradients.items():
        other = expected.gradients[key]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_nan_reaches_the_output(where: str) -> None:
    wrapper, input = wrapper_of("conv2d")
    with torch.no_grad():
        tensor = input if where == "input" else getattr(wrapper, where)
        tensor.view(-1)[0] = torch.nan
    output = wrapper(input)
    with kernels.reference_kernels():
        expected = wrapper(input)
    # One NaN spoils whatever is computed with its scale: the whole output, or that of a channel.
    assert bool(output.isnan()[expected.isnan()].all())
    assert bool(expected.isnan().any())
    assert bool(output[:, 1:].isnan().any()) == (where == "input")


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    wrapper, input = wrapper_of("conv2d")
    with pytest.raises(RuntimeError, match="codes must have 5 channels, got 4"):
        wrapper(input[:, :4])
    with pytest.raises(RuntimeError, match="must fit into the padded input"):
        QATModuleWrapper(nn.Conv2d(5, 4, 7))(input[:, :, :2])


def test_a_second_derivative_is_refused() -> None:
    wrapper, input = wrapper_of("linear")
    # Of a sum, whose own gradient asks for none: the error must come all the same.
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(wrapper(input.requires_grad_()).sum(), input, create_graph=True)


def test_a_frozen_zero_point_is_rounded_all_the_same() -> None:
    wrapper, input = wrapper_of("linear", QATConfig.for_target("openvino", learnable=True))
    node = wrapper.input_fake_quantize
    assert node is not None
    with torch.no_grad():
        node.zero_point.add_(0.6)
    outputs = []
    for frozen in (False, True):
        node.zero_point.requires_grad_(not frozen)
        outputs.append(wrapper(input).detach())
    assert torch.equal(*outputs)


def test_a_bias_that_does_not_fit_raises_the_scale_of_its_channel_as_in_evaluation() -> None:
    wrapper, input = wrapper_of("conv2d")
    with torch.no_grad():
        wrapper.bias[2] = 1e9
    trained = wrapper(input)
    trained.sum().backward()
    assert wrapper.bias.grad is not None
    with torch.no_grad():
        assert torch.equal(wrapper.eval()(input), trained)
    assert trained[:, 2].mean().item() == pytest.approx(1e9, rel=1e-6)


@pytest.mark.parametrize("momentum", [1.0, 0.3])
def test_a_weight_is_observed_as_by_the_reference(momentum: float) -> None:
    counts = []
    for reference in (False, True):
        torch.manual_seed(0)
        wrapper, input = wrapper_of("conv2d")
        node = wrapper.weight_fake_quantize
        assert node is not None
        node.observer.statistics.momentum = momentum
        wrapper.bias.data.fill_(1e9)
        with kernels.reference_kernels() if reference else torch.enable_grad():
            wrapper(input)
        counts.append((int(node.observer.batches), node.scale.clone()))
    assert counts[0][0] == counts[1][0]
    assert torch.equal(counts[0][1], counts[1][1])


def test_a_bias_that_is_a_view_is_taken() -> None:
    layer = nn.Linear(16, 8)
    layer.bias = nn.Parameter(torch.randn(8, 2)[:, 0])
    wrapper, input = seen(layer, (4, 16)), torch.randn(4, 16)
    assert_steps_agree(step_of(wrapper, input), reference_step(wrapper, input))


def test_weights_on_grids_along_another_axis_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 8)
    wrapper, input = seen(layer, (4, 8)), torch.randn(4, 8)
    scheme = QuantizationScheme(narrow_range=True, channel_axis=1)
    wrapper.weight_fake_quantize = FakeQuantizeLayer(scheme, num_channels=8)
    wrapper(input)
    calls = count_operators(monkeypatch, *ON_INTEGERS)
    assert_steps_agree(step_of(wrapper, input), reference_step(wrapper, input))
    assert not calls


def test_a_weight_that_changed_before_backward_is_an_error() -> None:
    wrapper, input = wrapper_of("linear")
    loss = wrapper(input).sum()
    with torch.no_grad():
        wrapper.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_backward_passes_add_up() -> None:
    wrapper, input = wrapper_of("conv2d")
    loss = wrapper(input).square().sum()
    loss.backward(retain_graph=True)
    once = wrapper.weight.grad.clone()
    loss.backward()
    assert torch.equal(wrapper.weight.grad, 2 * once)


@EVERY_LAYER_ON_CODES
def test_bfloat16_autocast_multiplies_gradients_in_bfloat16(name: str) -> None:
    wrapper, input = wrapper_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        actual = step_of(wrapper, input)
        expected = reference_step(wrapper, input)
    exact = float64_step(wrapper, input)
    assert actual.output.dtype is expected.output.dtype is torch.bfloat16
    # Eight bits of precision in the output and in each factor of a gradient.
    torch.testing.assert_close(actual.output.double(), exact.output, rtol=1e-2, atol=1e-2)
    for key, gradient in actual.gradients.items():
        other = exact.gradients[key]
        if gradient is not None and other is not None:
            assert gradient.dtype is torch.float32
            assert_gradients_agree(gradient, other, rtol=2e-2, name=key)


def test_a_weight_that_is_not_finite_is_not_trained_in_silence() -> None:
    """Its range is not followed, so that others might saturate on the grid of an older weight."""
    wrapper, input = wrapper_of("conv2d")
    node = wrapper.weight_fake_quantize
    assert node is not None
    node.observer.enabled = True
    with torch.no_grad():
        wrapper.weight[0, 0, 0, 0] = torch.inf
        wrapper.weight[0, 0, 0, 1] = 50
    output = wrapper(input)
    assert bool(output[:, 0].isnan().all())
    assert not bool(output[:, 1:].isnan().any())


def test_a_geometry_in_lists_is_taken() -> None:
    wrapper, input = wrapper_of("conv2d")
    expected = wrapper(input)
    for name in ("stride", "padding", "dilation"):
        setattr(wrapper.layer, name, list(getattr(wrapper.layer, name)))
    assert torch.equal(wrapper(input), expected)
    with torch.no_grad():
        assert torch.equal(wrapper.eval()(input), expected)
