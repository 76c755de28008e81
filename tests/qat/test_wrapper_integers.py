"""In evaluation without gradients the wrapper computes on integers: exactly, and on what its tensors hold now."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from example_engines import ENGINES
from example_layers import EVERY_LAYER, EVERY_PRODUCT, LayerExample, nodes_of, wrapped
from example_models import make_batch_norms_awkward
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QATModuleWrapper,
    QuantizationScheme,
    convert,
    dequantize,
    kernels,
    quantize,
)
from mlframework.quantization.conversion.between_floats import between_floats

EVERY_GRID = pytest.mark.parametrize(
    "config",
    [
        pytest.param(QATConfig(target=target, weight_bits=bits, activation_bits=bits), id=f"{target}-{bits}")
        for target, bits in (*((target, 8) for target in ENGINES), ("onnxruntime", 4))
    ],
)


def by_hand(wrapper: QATModuleWrapper, *inputs: Tensor) -> Tensor:
    """Quantize, the integer layer made now, dequantize."""
    layer, output = wrapper.to_integer(), wrapper.output_fake_quantize
    if isinstance(wrapper.layer, nn.Embedding):
        return dequantize(quantize(layer(*inputs), output.parameters_on_grid), output.parameters_on_grid)
    codes = layer(quantize(*inputs, wrapper.input_source.parameters_on_grid))
    return codes if output is None else dequantize(codes, output.parameters_on_grid)


@torch.no_grad()
def assert_integers(wrapper: QATModuleWrapper, *inputs: Tensor) -> None:
    assert torch.equal(wrapper(*inputs), by_hand(wrapper, *inputs))


def with_batch_norm(example: LayerExample, config: QATConfig, activation: nn.Module | None = None) -> QATModuleWrapper:
    assert example.batch_norm is not None
    batch_norm = example.batch_norm()
    make_batch_norms_awkward(batch_norm)
    return wrapped(example, config, batch_norm=batch_norm, activation=activation)


@EVERY_GRID
@EVERY_LAYER
def test_evaluation_is_the_integer_layer(example: LayerExample, config: QATConfig) -> None:
    assert_integers(wrapped(example, config), *example.inputs())


@EVERY_GRID
@EVERY_PRODUCT
def test_evaluation_folds_batch_norm_and_activation(example: LayerExample, config: QATConfig) -> None:
    wrapper = with_batch_norm(example, config, nn.ReLU6())
    assert wrapper.computes_integers is False  # gradients are on
    assert_integers(wrapper, *example.inputs())


@EVERY_PRODUCT
def test_a_float_output_is_the_rescaled_accumulator(example: LayerExample) -> None:
    wrapper = wrapped(example)
    wrapper.output_fake_quantize = None
    assert_integers(wrapper, *example.inputs())


@EVERY_GRID
@EVERY_PRODUCT
@pytest.mark.parametrize("activation", [None, nn.Hardtanh(-0.7, 0.4)], ids=["layer", "chain"])
def test_simulation_is_within_one_step_of_the_integers(
    example: LayerExample, config: QATConfig, activation: nn.Module | None
) -> None:
    """The bias is rounded to the accumulator's steps and float sums round too: the nearest code may be the next."""
    inputs = example.inputs()
    wrapper = wrapped(example, config) if activation is None else with_batch_norm(example, config, activation)
    parameters = wrapper.output_fake_quantize.parameters_on_grid
    with torch.no_grad():
        integers = quantize(wrapper(*inputs), parameters)
    simulated = quantize(wrapper(*inputs).detach(), parameters)
    assert (integers.int() - simulated.int()).abs().max() <= 1


@EVERY_GRID
@EVERY_PRODUCT
def test_what_is_traced_for_compilation_gives_the_same_integers(
    example: LayerExample, config: QATConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = example.inputs()
    wrappers = [wrapped(example, config), with_batch_norm(example, config, nn.ReLU())]
    without_output = wrapped(example, config, activation=nn.ReLU())
    without_output.output_fake_quantize = None
    with torch.no_grad():
        expected = [wrapper(*inputs) for wrapper in (*wrappers, without_output)]
        monkeypatch.setattr(kernels, "is_traced", lambda: True)
        for wrapper, output in zip((*wrappers, without_output), expected, strict=True):
            assert torch.equal(wrapper(*inputs), output)


CHANGES: dict[str, Callable[[QATModuleWrapper], object]] = {
    "weight in place": lambda wrapper: wrapper.weight.mul_(-0.5),
    "weight replaced": lambda wrapper: setattr(wrapper, "weight", nn.Parameter(wrapper.weight * -0.5)),
    "bias in place": lambda wrapper: wrapper.layer.bias.add_(0.7),
    "weight scale": lambda wrapper: wrapper.weight_fake_quantize.scale.mul_(1.5),
    "input scale": lambda wrapper: wrapper.input_fake_quantize.scale.mul_(3),
    "input zero point": lambda wrapper: wrapper.input_fake_quantize.zero_point.add_(9),
    "output scale": lambda wrapper: wrapper.output_fake_quantize.scale.mul_(2),
    "output zero point": lambda wrapper: wrapper.output_fake_quantize.zero_point.add_(60),
    "running mean": lambda wrapper: wrapper.following[0].running_mean.add_(1),
    "running variance": lambda wrapper: wrapper.following[0].running_var.mul_(7),
    "gamma": lambda wrapper: wrapper.following[0].weight.mul_(-1),
    "beta": lambda wrapper: wrapper.following[0].bias.sub_(0.6),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_at_the_next_call(change: Callable[[QATModuleWrapper], object]) -> None:
    wrapper = QATModuleWrapper(nn.Conv2d(3, 4, 3), batch_norm=nn.BatchNorm2d(4))
    inputs = torch.randn(5, 3, 6, 6)
    wrapper(inputs)
    for module in (wrapper, *wrapper.following):
        module.eval()
    with torch.no_grad():
        before = wrapper(inputs)
        change(wrapper)
        assert not torch.equal(wrapper(inputs), before)
        assert_integers(wrapper, inputs)


def test_a_change_through_data_is_seen_after_eval() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(5, 4)
    wrapper(inputs)
    with torch.no_grad():
        wrapper.eval()(inputs)
        wrapper.weight.data.mul_(-1)
        assert_integers(wrapper.eval(), inputs)


@EVERY_PRODUCT
def test_a_loaded_state_is_seen_at_the_next_call(example: LayerExample) -> None:
    one, other = (with_batch_norm(example, QATConfig()) for _ in range(2))
    inputs = example.inputs()
    with torch.no_grad():
        one(*inputs)
        one.load_state_dict(other.state_dict())
        one.following[0].load_state_dict(other.following[0].state_dict())
        assert torch.equal(one(*inputs), other(*inputs))


def test_a_training_step_is_seen_at_the_next_call() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3), QATConfig(learnable=True))
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.05)
    inputs = torch.randn(16, 4)
    for _ in range(3):
        optimizer.zero_grad()
        wrapper.train()(inputs).square().mean().backward()
        optimizer.step()
        assert_integers(wrapper.eval(), inputs)


def test_the_integer_layer_is_made_once() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(5, 4)
    wrapper(inputs)
    with torch.no_grad():
        wrapper.eval()(inputs)
        made = wrapper._integer_layer()
        wrapper(inputs)
        assert wrapper._integer_layer() is made


def test_inference_mode_computes_the_same() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(5, 4)
    wrapper(inputs)
    with torch.no_grad():
        expected = wrapper.eval()(inputs)
    with torch.inference_mode():
        assert torch.equal(wrapper(inputs), expected)


@EVERY_LAYER
def test_evaluation_before_any_data_is_in_float(example: LayerExample) -> None:
    layer = example.make()
    wrapper, inputs = QATModuleWrapper(layer).eval(), example.inputs()
    with pytest.warns(UserWarning, match="seen no data"):
        output = wrapper(*inputs)
    if not isinstance(layer, nn.Embedding):  # whose table needs no data
        assert torch.equal(output, layer(*inputs))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            wrapper(*inputs)
    with pytest.raises(RuntimeError, match="seen no data"):
        convert(wrapper)


def test_an_input_of_unknown_grid_is_refused() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    wrapper.input_fake_quantize = None
    with pytest.raises(RuntimeError, match="input_fake_quantize is None"):
        wrapper.to_integer()


def test_a_weight_without_grid_is_refused() -> None:
    wrapper = wrapped(LayerExample(lambda: nn.Linear(4, 3), (5, 4)))
    wrapper.weight_fake_quantize = None
    with pytest.raises(RuntimeError, match="weight_fake_quantize is None"):
        wrapper.to_integer()


def test_the_grid_may_come_from_a_node_before() -> None:
    source, wrapper = FakeQuantizeLayer(QuantizationScheme()), QATModuleWrapper(nn.Linear(4, 3))
    wrapper.input_fake_quantize = None
    wrapper.take_input_from(source)
    inputs = torch.randn(5, 4)
    wrapper(source(inputs))
    source.eval()
    with torch.no_grad():
        assert torch.equal(wrapper.eval()(source(inputs)), by_hand(wrapper, source(inputs)))


@EVERY_LAYER
def test_one_node_switched_off_ends_the_integers(example: LayerExample) -> None:
    wrapper = wrapped(example)
    with torch.no_grad():
        assert wrapper.computes_integers or isinstance(wrapper.layer, nn.Embedding)
        for node in nodes_of(wrapper):
            node.fake_quantize_enabled = False
            assert not wrapper.computes_integers
            node.fake_quantize_enabled = True
    assert not wrapper.computes_integers
    assert not wrapper.train().computes_integers


def test_an_activation_in_training_mode_does_not_end_the_integers() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3), activation=nn.ReLU())
    wrapper(torch.randn(5, 4))
    with torch.no_grad():
        assert wrapper.eval().computes_integers


def test_a_fused_optimizer_step_in_evaluation_mode_is_seen() -> None:
    """A fused step changes a parameter without a trace in its version."""
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(5, 4)
    wrapper(inputs)
    wrapper.eval()
    with torch.no_grad():
        wrapper(inputs)
    wrapper(inputs).sum().backward()
    torch.optim.SGD(wrapper.layer.parameters(), lr=1.0, fused=True).step()
    with torch.no_grad():
        assert torch.equal(wrapper(inputs), between_floats(wrapper)(inputs))


def test_a_float_checkpoint_brings_the_range_of_its_weight() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    wrapper.load_state_dict({"weight": torch.full((3, 4), 12.7), "bias": torch.zeros(3)}, strict=False)
    assert torch.equal(wrapper.weight_fake_quantize.scale, torch.full((3,), 12.7) / 127)


def test_a_changed_epsilon_of_the_batch_norm_is_seen() -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3), batch_norm=nn.BatchNorm1d(3))
    inputs = torch.randn(8, 4)
    wrapper(inputs)
    (batch_norm,) = wrapper.following
    batch_norm.eval()
    wrapper.eval()
    with torch.no_grad():
        before = wrapper(inputs)
        batch_norm.eps = 10.0
        assert not torch.equal(wrapper(inputs), before)
        assert torch.equal(wrapper(inputs), between_floats(wrapper)(inputs))
