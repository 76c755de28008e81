"""Weights and biases that are computed for every forward: it is the computed tensor that is quantized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from combinations import half_of_all
from mlframework.quantization import QATConfig, QATModuleWrapper, convert, prepare, quantize
from mlframework.quantization.parameters import QuantizationParameters
from mlframework.quantization.qat.fake_quantize_layer import FakeQuantizeLayer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")]


class LowRank(nn.Module):
    """An adapter: a matrix of low rank added to the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()))
        self.up = nn.Parameter(torch.randn(weight.shape[0], 2) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


class Way(NamedTuple):
    """``put`` on a layer, ``remove`` from it again; ``keys`` are what the weight is computed from."""

    put: Callable[[nn.Module], object]
    remove: Callable[[nn.Module], object]
    keys: set[str]


def _pruned_twice_and_bias(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "bias", 0.5)


def _low_rank_and_bias(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))  # type: ignore[arg-type]
    parametrize.register_parametrization(layer, "bias", Doubled())


def _remove_parametrizations(layer: nn.Module) -> None:
    for name in list(layer.parametrizations):  # type: ignore[arg-type]
        parametrize.remove_parametrizations(layer, name)


def _remove_pruning(layer: nn.Module) -> None:
    for name in [name for name, _ in layer.named_parameters() if name.endswith("_orig")]:
        prune.remove(layer, name.removesuffix("_orig"))


WAYS = {
    "prune": Way(lambda layer: prune.l1_unstructured(layer, "weight", 0.3), _remove_pruning, {"weight_orig"}),
    "prune twice, and the bias": Way(_pruned_twice_and_bias, _remove_pruning, {"weight_mask", "bias_orig"}),
    "weight norm": Way(nn.utils.weight_norm, nn.utils.remove_weight_norm, {"weight_g", "weight_v"}),
    "spectral norm": Way(nn.utils.spectral_norm, nn.utils.remove_spectral_norm, {"weight_orig", "weight_u"}),
    "parametrized weight norm": Way(
        parametrizations.weight_norm,
        _remove_parametrizations,
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
    ),
    "parametrized spectral norm": Way(
        parametrizations.spectral_norm, _remove_parametrizations, {"parametrizations.weight.original"}
    ),
    "orthogonal": Way(parametrizations.orthogonal, _remove_parametrizations, {"parametrizations.weight.original"}),
    "adapter": Way(
        lambda layer: parametrize.register_parametrization(layer, "weight", LowRank(layer.weight)),  # type: ignore[arg-type]
        _remove_parametrizations,
        {"parametrizations.weight.original", "parametrizations.weight.0.down"},
    ),
    "adapter, and the bias": Way(_low_rank_and_bias, _remove_parametrizations, {"parametrizations.bias.original"}),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
WHEN = pytest.mark.parametrize("when", ["before", "after"])
EVERY_WAY_ONCE = half_of_all(way=WAYS, when={when: when for when in ("before", "after")})


class Network(nn.Module):
    """Has a batch normalization, a layer that is called twice, and one whose output is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        values = torch.relu(self.bn(self.conv(input)))
        values = torch.relu(self.twice(torch.relu(self.twice(values))))
        return self.fc(values.mean((2, 3)))


LAYERS = ("conv", "twice", "fc")


def put_on(model: nn.Module, way: Way) -> None:
    for name in LAYERS:
        way.put(model.get_submodule(name))


def computed_network(way: Way, when: str, inputs: Tensor) -> nn.Module:
    """Prepared, with computed parameters, in training mode."""
    network = Network()
    if when == "before":
        put_on(network, way)
    prepared = prepare(network, QATConfig(), (inputs,))
    if when == "after":
        put_on(prepared, way)
    return prepared


def codes_on_own_range(weight: Tensor) -> Tensor:
    """Of a weight, per output channel, on the scale of its own largest magnitude."""
    flat = weight.detach().flatten(1)
    scheme = QATConfig().weight_scheme
    scheme = type(scheme)(scheme.bits, scheme.signed, scheme.symmetric, scheme.narrow_range, 0)
    scale = flat.abs().amax(1) / 127
    return quantize(weight.detach(), QuantizationParameters(scale, torch.zeros_like(scale), scheme))


@EVERY_WAY
@WHEN
def test_the_computed_weight_is_trained_evaluated_and_converted(way: Way, when: str) -> None:
    inputs = torch.randn(8, 3, 10, 10)
    prepared = computed_network(way, when, inputs)
    for name in LAYERS:
        layer = prepared.get_submodule(name)
        assert isinstance(layer, QATModuleWrapper)
        assert {f"{name}.{key}" for key in way.keys} <= set(prepared.state_dict())
        assert f"{name}.weight" not in prepared.state_dict()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(inputs).square().mean().backward()
        assert all(parameter.grad is not None for parameter in prepared.parameters())
        optimizer.step()
    converted = convert(prepared)  # in training mode, which takes no step of a power iteration either
    prepared.eval()
    with torch.no_grad():
        output = prepared(inputs)
        assert torch.equal(converted(inputs), output)
        assert torch.equal(convert(prepared)(inputs), output)
        assert torch.equal(prepared(inputs), output)
        for name in ("twice", "fc"):  # into which no batch normalization is folded
            layer = prepared.get_submodule(name)
            codes = codes_on_own_range(layer.weight)  # type: ignore[arg-type]
            assert torch.equal(converted.get_submodule(name).weight, codes)
    state = converted.state_dict()
    assert not [key for key, value in state.items() if value.is_floating_point() and value.numel() > 8]


@EVERY_WAY_ONCE
def test_switched_off_it_is_the_network_bit_for_bit(way: Way, when: str) -> None:
    """In training too, where a spectral norm takes one step of its power iteration a call."""
    inputs = torch.randn(8, 3, 10, 10)
    torch.manual_seed(1)
    prepared = computed_network(way, when, inputs)
    torch.manual_seed(1)
    network = Network()
    put_on(network, way)
    if when == "before":
        prepared = prepare(network, QATConfig(), (inputs,))
    else:
        network.load_state_dict(prepared.state_dict(), strict=False)
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False
    for training in (True, True, False):
        assert torch.equal(prepared.train(training)(inputs), network.train(training)(inputs))


def evaluated_network(way: Way, when: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation after one batch, with inputs and what it makes of them."""
    inputs = torch.randn(8, 3, 10, 10)
    prepared = computed_network(way, when, inputs)
    prepared(inputs)
    prepared.eval()
    with torch.no_grad():
        return prepared, inputs, prepared(inputs)


@EVERY_WAY_ONCE
def test_it_is_taken_off_again(way: Way, when: str) -> None:
    prepared, inputs, expected = evaluated_network(way, when)
    for name in LAYERS:
        way.remove(prepared.get_submodule(name))
        assert isinstance(dict(prepared.named_parameters())[f"{name}.weight"], nn.Parameter)
        assert type(prepared.get_submodule(name)) is QATModuleWrapper
    with torch.no_grad():
        assert torch.equal(prepared(inputs), expected)
    prepared.train()(inputs).sum().backward()
    assert prepared.conv.weight.grad is not None


@EVERY_WAY_ONCE
def test_copies_compute_the_same(way: Way, when: str) -> None:
    prepared, inputs, expected = evaluated_network(way, when)
    with torch.no_grad():
        copied = copy.deepcopy(prepared)
        assert torch.equal(copied(inputs), expected)
        for parameter in copied.fc.parameters():
            parameter.mul_(0.5)
        assert torch.equal(prepared(inputs), expected)
        if not parametrize.is_parametrized(prepared.fc):  # which PyTorch does not pickle
            assert torch.equal(pickle.loads(pickle.dumps(prepared))(inputs), expected)
        fresh = computed_network(way, when, inputs)
        fresh.load_state_dict(prepared.state_dict())
        assert torch.equal(fresh.eval()(inputs), expected)
    assert "fc" in repr(prepared)


@EVERY_WAY
def test_preparing_leaves_the_model_as_it_is(way: Way) -> None:
    inputs = torch.randn(8, 3, 10, 10)
    network = Network()
    put_on(network, way)
    network(inputs)
    state = copy.deepcopy(network.state_dict())
    kind, weight = type(network.fc), network.fc.__dict__.get("weight")
    prepare(network, QATConfig(), (inputs,))
    assert type(network.fc) is kind
    assert network.fc.__dict__.get("weight") is weight
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    way.remove(network.fc)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_parameter_that_is_a_plain_tensor_at_the_call(kind: str) -> None:
    """As FullyShardedDataParallel leaves it: a view of its flat parameter, which gets the gradient."""
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(6, 4)
    flat = nn.Parameter(getattr(wrapper, kind).detach().reshape(-1) * 2)
    shape = getattr(wrapper, kind).shape
    delattr(wrapper, kind)
    setattr(wrapper, kind, flat.view(shape))
    wrapper(inputs).square().sum().backward()
    assert flat.grad is not None
    assert flat.grad.count_nonzero() > 0
    with torch.no_grad():
        before = wrapper.eval()(inputs)
        flat.mul_(-1)
        assert not torch.equal(wrapper(inputs), before)
    assert torch.equal(wrapper.to_integer().weight, codes_on_own_range(wrapper.weight))


@pytest.mark.parametrize("put", [lambda layer: prune.l1_unstructured(layer, "weight", 0.3), _low_rank_and_bias])
def test_what_is_put_on_the_layer_inside_moves_to_the_wrapper(put: Any) -> None:
    wrapper = QATModuleWrapper(nn.Linear(4, 3))
    inputs = torch.randn(6, 4)
    put(wrapper.layer)
    for _ in range(2):
        wrapper(inputs)
    wrapper.eval()
    with torch.no_grad():
        wrapper(inputs)
    assert torch.equal(wrapper.to_integer().weight, codes_on_own_range(wrapper.weight))


@EVERY_WAY
def test_a_layer_that_no_data_reached_stays_float_with_its_computed_weight(way: Way) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, input: Tensor) -> Tensor:
            if input.sum() > 1e6:  # code that no trace follows
                return self.idle(input)  # type: ignore[no-any-return]
            return self.used(input)  # type: ignore[no-any-return]

    network = Idle()
    way.put(network.idle)
    prepared = prepare(network, QATConfig(), (torch.randn(2, 3),))
    prepared(torch.randn(2, 3))
    with pytest.warns(UserWarning, match="no data reached idle"):
        converted = convert(prepared)
    inputs = torch.randn(2, 3)
    assert torch.equal(converted.idle(inputs), network.idle.eval()(inputs))
