"""``torch.func``: calls with given parameters and buffers, gradients as functions, batches of samples and of models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from example_models import EXAMPLES, train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, prepare
from mlframework.quantization.kernels import reference_kernels

# PyTorch has no rule for a batch of some operation, and computes it one by one.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:There is a performance drop")]

State = dict[str, Tensor]

CONFIGS = {"observed": QATConfig(), "learned": QATConfig(learnable=True), "4 bits": QATConfig(weight_bits=4)}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EVERY_NETWORK = pytest.mark.parametrize("name", ["resnet", "transformer", "tied"])


def prepared_network(name: str, config: QATConfig) -> tuple[nn.Module, Tensor]:
    """A network and inputs for it, after steps the last of which has moved the weights away from what their observers
    saw."""
    inputs = EXAMPLES[name].inputs(6)
    prepared = prepare(EXAMPLES[name].make(), config, inputs)
    train_briefly(prepared, inputs)
    return prepared, inputs[0]


def trained_further(prepared: nn.Module, inputs: Tensor) -> nn.Module:
    other = copy.deepcopy(prepared)
    train_briefly(other, (inputs,), learning_rate=0.2)
    return other


def state_of(model: nn.Module) -> State:
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, tensor in model.named_parameters():
        parameters[name].requires_grad_(tensor.requires_grad)
    return {**parameters, **{name: tensor.clone() for name, tensor in model.named_buffers()}}


def loss_of(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean()


def gradients(model: nn.Module, inputs: Tensor) -> State:
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss_of(model(inputs)), list(trained.values())), strict=True))


@EVERY_NETWORK
@EVERY_CONFIG
def test_a_call_with_another_models_state_is_a_call_of_that_model(name: str, config: QATConfig) -> None:
    prepared, inputs = prepared_network(name, config)
    other = trained_further(prepared, inputs)
    own = state_of(prepared)
    for training in (True, False):
        prepared.train(training)
        other.train(training)
        state = state_of(other)
        loss = loss_of(functional_call(prepared, state, (inputs,)))
        actual = torch.autograd.grad(loss, [tensor for tensor in state.values() if tensor.requires_grad])
        expected = gradients(other, inputs)
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected.values()))
        assert all(torch.equal(tensor, state[key]) for key, tensor in other.named_buffers()), (
            "updates go to those given"
        )
    with torch.no_grad():
        assert torch.equal(functional_call(prepared, state_of(other), (inputs,)), other(inputs))
    assert all(torch.equal(tensor, own[key]) for key, tensor in state_of(prepared).items()), "and not to its own"
    with torch.no_grad():
        assert torch.equal(prepared(inputs), functional_call(prepared, own, (inputs,)))


@pytest.mark.parametrize("copied", [False, True])
def test_a_known_weight_with_other_buffers_has_its_range_set_there(copied: bool) -> None:
    prepared, inputs = prepared_network("mlp", QATConfig())
    before = state_of(prepared.eval())  # scales of the weights before the last step
    with torch.no_grad():
        expected = prepared(inputs)
        prepared = copy.deepcopy(prepared) if copied else prepared
        assert torch.equal(functional_call(prepared, before, (inputs,)), expected)


@EVERY_NETWORK
@EVERY_CONFIG
def test_an_ensemble_is_its_members_in_a_loop(name: str, config: QATConfig) -> None:
    prepared, inputs = prepared_network(name, config)
    members = [prepared.eval(), trained_further(prepared, inputs).eval()]
    parameters, buffers = stack_module_state(members)  # with scales of the weights before the last step
    base = copy.deepcopy(prepared).to("meta")

    def call(own: State, own_buffers: State) -> Tensor:
        output: Tensor = functional_call(base, (own, own_buffers), (inputs,))
        return output

    with torch.no_grad():
        outputs = vmap(call)(parameters, buffers)
        for output, member in zip(outputs, members, strict=True):
            assert torch.equal(output, member(inputs)), "on the same integers"
    with reference_kernels():  # which are what is batched
        outputs = vmap(call)(parameters, buffers)
        for output, member in zip(outputs, members, strict=True):
            # Sums of floats in another order; a step of a grid would be a hundredth and more.
            assert (output - member(inputs)).abs().max() <= 1e-4 * output.abs().max()


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("config", [CONFIGS["learned"], CONFIGS["4 bits"]], ids=["learned", "4 bits"])
def test_gradients_of_samples_are_those_of_a_loop(name: str, config: QATConfig) -> None:
    prepared, inputs = prepared_network(name, config)
    state = {key: tensor.detach() for key, tensor in state_of(prepared.eval()).items()}
    trained = {key: state.pop(key) for key, tensor in prepared.named_parameters() if tensor.requires_grad}

    def loss(parameters: State, input: Tensor) -> Tensor:
        return loss_of(functional_call(prepared, {**parameters, **state}, (input[None],)))

    with reference_kernels():
        actual = vmap(grad(loss), (None, 0))(trained, inputs)
        for index in range(len(inputs)):
            for key, gradient in gradients(prepared, inputs[index : index + 1]).items():
                # Sums of floats in another order.
                assert (actual[key][index] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@EVERY_NETWORK
def test_a_batch_of_samples_evaluates_on_integers(name: str) -> None:
    prepared, inputs = prepared_network(name, QATConfig())
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(vmap(lambda input: prepared(input[None])[0])(inputs), prepared(inputs))


def test_a_function_trains_with_buffers_that_it_is_given() -> None:
    prepared, inputs = prepared_network("resnet", QATConfig())
    other = copy.deepcopy(prepared)
    own = {key: tensor.clone() for key, tensor in prepared.named_buffers()}
    parameters = {key: tensor.detach() for key, tensor in prepared.named_parameters()}

    def loss(parameters: State, buffers: State) -> tuple[Tensor, State]:
        return loss_of(functional_call(prepared, (parameters, buffers), (inputs,))), buffers

    buffers = {key: tensor.clone() for key, tensor in own.items()}
    with reference_kernels():
        actual, updated = grad(loss, has_aux=True)(parameters, buffers)
        expected = gradients(other, inputs)
    assert all(torch.equal(actual[key], gradient) for key, gradient in expected.items())
    assert all(torch.equal(updated[key], tensor) for key, tensor in other.named_buffers())
    assert all(torch.equal(tensor, own[key]) for key, tensor in prepared.named_buffers())


def test_observing_what_a_transform_batches_is_refused_by_name() -> None:
    prepared, inputs = prepared_network("transformer", QATConfig())
    state = state_of(prepared)
    with pytest.raises(RuntimeError, match=r"norm1_fake_quantize observes a tensor that torch\.func transforms"):
        vmap(lambda input: prepared(input[None]))(inputs)
    assert all(torch.equal(tensor, state[key]) for key, tensor in state_of(prepared).items())
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.observer.enabled = False
    with reference_kernels():
        outputs = vmap(lambda input: prepared(input[None])[0])(inputs)
        assert (outputs - prepared(inputs)).abs().max() <= 1e-4 * outputs.abs().max()  # sums in another order
