"""Which parameters train, and on what: frozen layers, parameters in several places, batches in parts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from example_models import EXAMPLES, train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATModuleWrapper, convert, prepare

pytestmark = pytest.mark.slow

LEARNABLE = pytest.mark.parametrize("learnable", [False, True])
BITS = pytest.mark.parametrize("bits", [8, 4])


def loss_of(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean()


def evaluated(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(*inputs)
        return output


def frozen(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Freezes the parts of these names, and returns all that they hold, scales included."""
    held = {}
    for name in names:
        part = model.get_submodule(name).requires_grad_(False).eval()
        held.update({f"{name}.{key}": tensor.detach().clone() for key, tensor in part.state_dict().items()})
    return held


@LEARNABLE
@BITS
@pytest.mark.parametrize(
    ("name", "parts"), [("resnet", ["stem", "bn", "block"]), ("transformer", ["norm1", "qkv", "projection"])]
)
def test_frozen_layers_stay_bit_for_bit_as_they_are(name: str, parts: list[str], bits: int, learnable: bool) -> None:
    inputs = EXAMPLES[name].inputs(8)
    config = QATConfig(weight_bits=bits, activation_bits=bits, learnable=learnable)
    prepared = prepare(EXAMPLES[name].make(), config, inputs)
    train_briefly(prepared, inputs)
    prepared.zero_grad()
    free = copy.deepcopy(prepared)
    prepared.train()
    evaluated(prepared, inputs)  # sets the scales of the weights to those that the last step made
    prepared.train()
    held = frozen(prepared, parts)
    free.train()
    for part in parts:
        free.get_submodule(part).eval()

    loss_of(prepared(*inputs)).backward()
    loss_of(free(*inputs)).backward()
    gradients = {key: parameter.grad for key, parameter in free.named_parameters()}
    for key, parameter in prepared.named_parameters():
        if key.startswith(tuple(f"{part}." for part in parts)):
            assert parameter.grad is None, key
        elif parameter.requires_grad:  # sums of floats in another order
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-8, msg=key)

    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, weight_decay=0.1)
    before = evaluated(prepared, inputs)
    prepared.train()
    for part in parts:
        prepared.get_submodule(part).eval()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(prepared(*inputs)).backward()
        optimizer.step()
    state = prepared.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in held.items())
    output = evaluated(prepared, inputs)
    assert not torch.equal(output, before)
    assert torch.equal(evaluated(convert(prepared), inputs), output)


@LEARNABLE
def test_a_network_frozen_before_it_is_prepared_trains_its_head_alone(learnable: bool) -> None:
    inputs = EXAMPLES["resnet"].inputs(8)
    network = EXAMPLES["resnet"].make().requires_grad_(False)
    network.get_submodule("head").requires_grad_(True)
    weights = {key: tensor.detach().clone() for key, tensor in network.named_parameters()}
    prepared = prepare(network, QATConfig(learnable=learnable), inputs)
    train_briefly(prepared, inputs, steps=3)
    for key, tensor in network.named_parameters():
        assert torch.equal(tensor, weights[key]) != key.startswith("head."), key
        assert (tensor.grad is None) != key.startswith("head."), key
    assert torch.equal(evaluated(convert(prepared), inputs), evaluated(prepared, inputs))


class Alike(nn.Module):
    """Two layers whose weights have one shape: embedding and output, or two linear layers."""

    def __init__(self, first: nn.Module, outputs: int) -> None:
        super().__init__()
        self.first, self.hidden, self.second = first, nn.Linear(8, 8), nn.Linear(8, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(torch.relu(self.hidden(self.first(input))))  # type: ignore[no-any-return]


@LEARNABLE
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["embedding", "linear"])
def test_a_weight_in_two_layers_is_one_parameter(name: str, when: str, learnable: bool) -> None:
    """Tied before the model is prepared, or afterwards as ``transformers`` ties weights again."""
    is_text, places = name == "embedding", ("first", "second")
    network = Alike(nn.Embedding(20, 8), 20) if is_text else Alike(nn.Linear(8, 8), 8)
    inputs = (torch.randint(20, (4, 6)) if is_text else torch.randn(16, 8),)
    if when == "before":
        network.second.weight = network.first.weight
    prepared = prepare(network, QATConfig(learnable=learnable), inputs)
    if when == "after":
        prepared.second.weight = prepared.first.weight

    def tied(model: nn.Module) -> Tensor:
        one, other = (model.get_submodule(place) for place in places)
        assert isinstance(one, QATModuleWrapper)
        assert one.weight is other.weight is other.layer.weight
        assert f"{places[0]}.weight" in dict(model.named_parameters())
        assert f"{places[1]}.weight" not in dict(model.named_parameters())
        return one.weight

    # Each place has a part in the gradient.
    weight = tied(prepared)
    prepared(*inputs)
    parts = []
    for place in (*places, None):
        other = copy.deepcopy(prepared)
        for untied in places:
            if place is not None:
                layer = other.get_submodule(untied)
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=untied == place)
        loss_of(other(*inputs)).backward()
        parts.append(other.get_submodule(place or places[0]).weight.grad)
    # Sums of floats in another order.
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-4, atol=1e-7)

    before = weight.detach().clone()
    train_briefly(prepared, inputs)
    assert not torch.equal(tied(prepared), before)
    output = evaluated(prepared, inputs)
    assert torch.equal(evaluated(convert(prepared), inputs), output)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    for copied in (copy.deepcopy(prepared), torch.load(file, weights_only=False)):
        tied(copied)
        assert torch.equal(evaluated(copied, inputs), output)
    with torch.no_grad():
        copied.get_submodule(places[0]).weight.zero_()
    copied.load_state_dict(prepared.state_dict())
    tied(copied)
    assert torch.equal(evaluated(copied, inputs), output)


@LEARNABLE
@BITS
def test_gradients_of_parts_of_a_batch_add_up(bits: int, learnable: bool) -> None:
    """With observers off and batch normalization in evaluation, as without quantization. The gradient of a learned
    scale has a factor of one over the root of how many values share it, so that of an activation is larger by the root
    of the number of parts."""
    inputs = EXAMPLES["resnet"].inputs(16)
    config = QATConfig(weight_bits=bits, activation_bits=bits, learnable=learnable)
    prepared = prepare(EXAMPLES["resnet"].make(), config, inputs)
    train_briefly(prepared, inputs)
    nodes = {name: module for name, module in prepared.named_modules() if isinstance(module, FakeQuantizeLayer)}
    for module in prepared.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        if isinstance(module, FakeQuantizeLayer):
            module.observer.enabled = False
    in_parts = copy.deepcopy(prepared)
    prepared.zero_grad()
    loss_of(prepared(*inputs)).backward()
    in_parts.zero_grad()
    for part in inputs[0].split(4):
        (loss_of(in_parts(part)) / 4).backward()
    for (name, whole), parts in zip(prepared.named_parameters(), in_parts.parameters(), strict=True):
        if whole.requires_grad:
            node = nodes.get(name.rpartition(".")[0])
            factor = 2.0 if node is not None and node.reduces_over_ranks else 1.0
            # Sums of floats in another order.
            torch.testing.assert_close(parts.grad, factor * whole.grad, rtol=1e-4, atol=1e-6, msg=name)


@LEARNABLE
def test_every_part_of_a_batch_is_observed_once(learnable: bool) -> None:
    """As batch normalization counts it; what is learned takes its start from the first."""
    inputs = EXAMPLES["resnet"].inputs(16)
    prepared = prepare(EXAMPLES["resnet"].make(), QATConfig(learnable=learnable), inputs)
    for part in inputs[0].split(4):
        loss_of(prepared(part)).backward()
    counts = {
        name: int(module.observer.batches)
        for name, module in prepared.named_modules()
        if isinstance(module, FakeQuantizeLayer) and module.reduces_over_ranks
    }
    assert set(counts.values()) == {1 if learnable else 4}
    assert prepared.get_submodule("bn").num_batches_tracked == 4
