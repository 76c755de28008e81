"""Layers, batch normalization and dropouts are known by what they compute, whatever their class."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_layers import (
    BatchNormActivation,
    BatchNormReLU,
    CastingLinear,
    DropPath,
    FrozenBatchNorm,
    GhostBatchNorm,
    LowRankLinear,
    OwnLinear,
    Residual,
    SameConv2d,
    StandardizedConv2d,
    UpsamplingConv,
)
from example_architectures import TiedLanguageModel
from example_models import train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, preparation_report, prepare
from mlframework.quantization.int8.layers import Int8Convolution, Int8ConvTranspose2d, Int8Layer, Int8Linear
from mlframework.quantization.qat.given_weight import GivenWeightWrapper
from mlframework.quantization.qat.qat_module_wrapper import QATModuleWrapper
from placement_probes import Runs

pytestmark = pytest.mark.slow


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def rows() -> Tensor:
    return torch.randn(4, 8)


def tokens() -> Tensor:
    return torch.randint(20, (4, 6))


def same() -> nn.Module:
    return nn.Sequential(
        SameConv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), SameConv2d(8, 8, 3, groups=8)
    )


def computed() -> nn.Module:
    return nn.Sequential(StandardizedConv2d(3, 8, 3, padding=1), nn.ReLU(), StandardizedConv2d(8, 4, 3))


def inside_batch_norm(activation: nn.Module) -> nn.Module:
    norm = BatchNormActivation(8, activation)
    return nn.Sequential(SameConv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 8, 3))


def before_head(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 4, 3))


Made = tuple[Callable[[], nn.Module], Callable[[], Tensor], int]

# With the number of integer layers; nothing else computes.
LAYERS: dict[str, Made] = {
    "same padding": (same, images, 2),
    "computed weights": (computed, images, 2),
    "own linear": (lambda: nn.Sequential(OwnLinear(8, 16), nn.ReLU(), OwnLinear(16, 4)), rows, 2),
    "casts": (lambda: nn.Sequential(CastingLinear(8, 16), nn.ReLU(), CastingLinear(16, 4)), rows, 2),
    "tied": (TiedLanguageModel, tokens, 2),
    "low rank": (lambda: nn.Sequential(LowRankLinear(8, 16), nn.ReLU(), LowRankLinear(16, 4)), rows, 2),
    "upsampling": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), UpsamplingConv(8, 4)), images, 2),
    "batch norm with ReLU": (lambda: inside_batch_norm(nn.ReLU(inplace=True)), images, 2),
    "batch norm with SiLU": (lambda: inside_batch_norm(nn.SiLU(inplace=True)), images, 2),
    "batch norm with nothing": (lambda: inside_batch_norm(nn.Identity()), images, 2),
    "batch norm calls ReLU": (lambda: before_head(BatchNormReLU(8)), images, 2),
    "ghost batch norm": (lambda: before_head(GhostBatchNorm(8)), images, 2),
    "frozen batch norm": (lambda: before_head(FrozenBatchNorm(8)), images, 2),
    "drop path": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            Residual(SameConv2d(8, 8, 3, bias=False), BatchNormActivation(8, nn.ReLU()), DropPath(0.5)),
            nn.Conv2d(8, 4, 1),
        ),
        images,
        3,
    ),
}
EVERY = pytest.mark.parametrize(("make", "inputs", "layers"), LAYERS.values(), ids=LAYERS)


def trained(make: Callable[[], nn.Module], inputs: Callable[[], Tensor], config: QATConfig | None = None) -> nn.Module:
    prepared = prepare(make(), config, (inputs(),))
    train_briefly(prepared, (inputs(),), steps=3)
    return prepared.eval()


@EVERY
def test_everything_is_quantized(make: Callable[[], nn.Module], inputs: Callable[[], Tensor], layers: int) -> None:
    prepared = trained(make, inputs)
    assert not preparation_report(prepared).left_float
    converted = convert(prepared)
    assert sum(isinstance(module, Int8Layer) for module in converted.modules()) == layers
    assert not list(converted.parameters())
    floats = [name for name, buffer in converted.named_buffers() if buffer.is_floating_point()]
    assert all(name.endswith("scale") for name in floats)


@EVERY
def test_converted_equals_prepared(make: Callable[[], nn.Module], inputs: Callable[[], Tensor], layers: int) -> None:
    prepared = trained(make, inputs)
    x = torch.cat([inputs(), inputs()])[:7]
    with torch.no_grad():
        expected = prepared(x)
        assert torch.equal(convert(prepared)(x), expected)
        assert torch.equal(copy.deepcopy(prepared)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(prepared))(x), expected)
    assert repr(convert(prepared))


@EVERY
def test_simulation_agrees_with_integers(
    make: Callable[[], nn.Module], inputs: Callable[[], Tensor], layers: int
) -> None:
    prepared = trained(make, inputs)
    x = inputs()
    with torch.no_grad():
        integers = prepared(x)
    # Batch normalization in float32 may round a value at a boundary to the neighbouring code, which the layers after it
    # pass on.
    assert (prepared(x) - integers).abs().max() <= 0.05 * integers.abs().max()


@EVERY
def test_the_state_dict_keeps_every_name(
    make: Callable[[], nn.Module], inputs: Callable[[], Tensor], layers: int
) -> None:
    model = make()
    prepared = prepare(model, None, (inputs(),))
    added = set(prepared.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(prepared.state_dict())
    assert all("fake_quantize" in name or name.split(".")[0] in name for name in added)
    assert not any(name.endswith(("weight", "bias", "running_mean", "running_var")) for name in added)
    assert [id(parameter) for parameter in prepared.parameters()] == [id(parameter) for parameter in model.parameters()]


@EVERY
def test_with_every_node_switched_off_it_trains_as_the_model_does(
    make: Callable[[], nn.Module], inputs: Callable[[], Tensor], layers: int
) -> None:
    model = make()
    x = inputs()
    prepared = prepare(copy.deepcopy(model), None, (x,)).train()
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False
    for _ in range(2):
        outputs = []
        for each in (model, prepared):
            torch.manual_seed(3)
            outputs.append(each(x))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
    buffers = dict(prepared.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    own = dict(prepared.named_parameters())
    assert all(torch.equal(parameter.grad, own[name].grad) for name, parameter in model.named_parameters())


def test_the_codes_are_those_of_the_computed_weight() -> None:
    prepared = trained(computed, images)
    convolution = convert(prepared).get_submodule("0.conv2d")
    assert isinstance(convolution, Int8Convolution)
    first = prepared[0]
    values = first.weight.detach().double().flatten(1)
    values = (values - values.mean(1, keepdim=True)) / (values.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    values = values * first.gain.detach().double()[:, None]
    codes = (values / convolution.weight_scale.double()[:, None]).round().clamp(-127, 127)
    assert torch.equal(convolution.weight.flatten(1).double(), codes)


def test_evaluation_follows_the_computed_weight() -> None:
    prepared = trained(computed, images)
    x = images()
    with torch.no_grad():
        before = prepared(x)
        assert torch.equal(prepared(x), before)
        prepared[0].gain.mul_(0.5)
        after = prepared(x)
        assert not torch.equal(after, before)
        assert torch.equal(convert(prepared)(x), after)


def test_layer_types() -> None:
    assert isinstance(convert(trained(*LAYERS["own linear"][:2])).get_submodule("0.linear"), Int8Linear)
    assert isinstance(
        convert(trained(*LAYERS["upsampling"][:2])).get_submodule("2.conv_transpose2d"), Int8ConvTranspose2d
    )


@pytest.mark.parametrize("selector", ["0", SameConv2d, nn.Conv2d])
def test_the_configuration_selects_by_the_module_whose_code_it_is(selector: str | type[nn.Module]) -> None:
    report = preparation_report(prepare(same(), QATConfig(skip=(selector,)), (images(),)))
    (first, *_) = report.left_float
    assert first.detail.startswith("skipped by the configuration")
    prepared = prepare(same(), QATConfig(overrides={selector: QATConfig(weight_bits=4)}), (images(),))
    assert prepared.get_submodule("0.conv2d").weight_fake_quantize.scheme.bits == 4


def test_a_function_outside_of_any_layer_is_selected_by_type() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, model.conv.weight)

    model = Runs(run, conv=nn.Conv2d(3, 4, 1))
    assert preparation_report(prepare(model, None, (images(),))).quantized[-1].kind == "Conv2d"
    report = preparation_report(prepare(model, QATConfig(skip=(nn.Conv2d,)), (images(),)))
    assert not report.quantized


def test_a_parameter_that_is_read_twice_is_quantized_once() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        once = F.conv2d(x, model.conv.weight)
        return F.conv2d(F.relu(once), model.conv.weight)

    prepared = prepare(Runs(run, conv=nn.Conv2d(3, 3, 1)), None, (images(),))
    one, other = [module for module in prepared.modules() if isinstance(module, GivenWeightWrapper)]
    assert one.weight_fake_quantize is other.weight_fake_quantize


def test_a_tied_table_that_stays_float_stays_in_the_converted_model() -> None:
    prepared = prepare(TiedLanguageModel(), QATConfig(skip=(nn.Embedding,)), (tokens(),))
    train_briefly(prepared, (tokens(),))
    converted = convert(prepared.eval())
    assert [tuple(parameter.shape) for parameter in converted.parameters()] == [(20, 8)]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda model, x: model.conv.weight * x.mean(), "its weight depends on the input, or is random"),
        (lambda model, x: x.new_ones(4, 3, 1, 1), "its weight depends on the input, or is random"),
    ],
    ids=["depends on the input", "made of the input"],
)
def test_other_weights_stay_float(weight: Callable[[nn.Module, Tensor], Tensor], reason: str) -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, weight(model, x))

    with pytest.warns(UserWarning, match=reason):
        prepared = prepare(Runs(run, conv=nn.Conv2d(3, 4, 1)), None, (images(),))
    assert not any(isinstance(module, QATModuleWrapper) for module in prepared.modules())


def test_a_random_weight_stays_float() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, model.conv.weight + torch.randn_like(model.conv.weight))

    with pytest.warns(UserWarning, match="it draws random numbers"):
        report = preparation_report(prepare(Runs(run, conv=nn.Conv2d(3, 4, 1)), None, (images(),)))
    assert not report.quantized


def test_a_bias_that_depends_on_the_input_is_the_reason() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, model.fc.weight, x.mean(0))

    with pytest.warns(UserWarning, match="its bias depends on the input"):
        report = preparation_report(prepare(Runs(run, fc=nn.Linear(8, 8)), None, (rows(),)))
    assert [entry.detail for entry in report.left_float if entry.kind == "linear"] == ["its bias depends on the input"]


def test_running_statistics_are_those_of_the_module() -> None:
    """The fused kernel, too, updates the module's own buffers, once."""
    model = inside_batch_norm(nn.ReLU())
    prepared = prepare(model, None, (images(),)).train()
    for _ in range(3):
        prepared(images())
    norm = prepared[1]
    assert isinstance(norm, BatchNormActivation)
    assert norm.num_batches_tracked == 3
    assert not torch.equal(norm.running_mean, model[1].running_mean)


def test_an_identity_in_both_modes_is_no_dropout() -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    prepared = prepare(nn.Sequential(nn.Conv2d(3, 4, 1), Through(), nn.Conv2d(4, 4, 1)), None, (images(),))
    assert prepared[2]._dropouts == ()


def test_an_active_drop_path_takes_values_off_the_grid() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DropPath(0.5), nn.Conv2d(4, 4, 1))
    prepared = prepare(model, None, (images(),))
    assert prepared[2]._dropouts == (prepared[1],)
    assert not prepared[2]._input_is_on_grid()
    prepared(images())
    prepared[1].eval()
    assert prepared[2]._input_is_on_grid()
