"""What ``prepare`` gives is the user's model with nodes in it, and what it was given is as it was."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from example_architectures import BranchesAtRoot, SmallResNet, small_cnn
from example_models import EVERY_EXAMPLE, EXAMPLES, SOME_EXAMPLES, Example, all_equal, results, train_briefly
from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATModuleWrapper, convert, prepare

IMAGES = torch.randn(2, 3, 8, 8)


def prepared_from(example: Example, config: QATConfig | None = None) -> tuple[nn.Module, nn.Module]:
    model = example.make()
    return model, prepare(model, config, example.inputs())


@functools.cache
def prepared_once(example: Example) -> tuple[nn.Module, nn.Module]:
    """For tests that leave it as it is."""
    return prepared_from(example)


def disable(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False


@EVERY_EXAMPLE
def test_the_model_passed_in_is_not_changed(example: Example) -> None:
    model, inputs = example.make(), example.inputs()
    model.train()
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state, given = copy.deepcopy(model.state_dict()), copy.deepcopy(inputs)
    random = torch.random.get_rng_state()
    prepared = prepare(model, QATConfig(), inputs)
    assert torch.equal(torch.random.get_rng_state(), random)
    prepared(*inputs)
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(map(torch.equal, inputs, given))


@EVERY_EXAMPLE
def test_parameters_are_shared_and_buffers_are_not(example: Example) -> None:
    model, prepared = prepared_once(example)
    theirs = dict(prepared.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in model.named_parameters())
    assert {id(parameter) for parameter in prepared.parameters()} == {id(parameter) for parameter in model.parameters()}
    mine = {id(buffer) for buffer in model.buffers()}
    assert mine.isdisjoint(id(buffer) for buffer in prepared.buffers())


@EVERY_EXAMPLE
def test_names_and_state_dict_keys_stay(example: Example) -> None:
    model, prepared = prepared_once(example)
    opaque = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    assert {name for name, _ in model.named_modules()} <= {name for name, _ in prepared.named_modules()}
    added = set(prepared.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(prepared.state_dict())
    assert all("fake_quantize" in key or "_call." in key for key in added)
    assert not any(key.startswith(opaque) for key in added if opaque)


@EVERY_EXAMPLE
def test_with_every_node_off_it_is_the_float_model_bit_for_bit(example: Example) -> None:
    model, prepared = prepared_from(example)
    disable(prepared)
    inputs = example.inputs()
    for mode, gradients in itertools.product((True, False), repeat=2):
        model.train(mode)
        prepared.train(mode)
        with torch.set_grad_enabled(gradients):
            torch.manual_seed(1)
            expected = results(model, *copy.deepcopy(inputs))
            torch.manual_seed(1)
            assert all_equal(results(prepared, *copy.deepcopy(inputs)), expected)


@EVERY_EXAMPLE
def test_every_example_trains(example: Example) -> None:
    model, prepared = prepared_from(example, QATConfig(learnable=True))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_briefly(prepared, example.inputs(8), steps=2)
    changed = [not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
    assert sum(changed) >= 0.6 * len(changed)


@SOME_EXAMPLES
def test_copies_compute_the_same(example: Example) -> None:
    model, prepared = prepared_from(example)
    train_briefly(prepared, example.inputs(8))
    prepared.eval()
    inputs, others = example.inputs(), [copy.deepcopy(prepared)]
    if "<lambda>" not in example.make.__qualname__:
        others.append(pickle.loads(pickle.dumps(prepared)))
    with torch.no_grad():
        expected = results(prepared, *inputs)
        for other in others:
            assert all_equal(results(other, *inputs), expected)
            assert all_equal(results(convert(other), *inputs), expected)
            assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())


@SOME_EXAMPLES
def test_a_checkpoint_of_the_prepared_model_loads(example: Example) -> None:
    _, first = prepared_from(example)
    _, second = prepared_from(example)
    train_briefly(first, example.inputs(8))
    second.load_state_dict(first.state_dict())
    inputs = example.inputs()
    with torch.no_grad():
        assert all_equal(results(first.eval(), *inputs), results(second.eval(), *inputs))


@SOME_EXAMPLES
def test_a_float_checkpoint_loads(example: Example) -> None:
    checkpoint = example.make().state_dict()
    _, prepared = prepared_from(example)
    outcome = prepared.load_state_dict(checkpoint, strict=False)
    assert not outcome.unexpected_keys
    assert all("fake_quantize" in key or "_call." in key for key in outcome.missing_keys)
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in checkpoint.items())


def test_class_attributes_and_methods_stay() -> None:
    model = SmallResNet()
    model.note = ["mine"]
    prepared = prepare(model, QATConfig(), (IMAGES,))
    assert isinstance(prepared, SmallResNet)
    assert type(prepared).__name__ == "SmallResNet"
    assert prepared.note == ["mine"]
    assert prepared.features()[:7] == model.features()
    assert prepared.block.conv1.kernel_size == (3, 3)
    assert isinstance(prepare(BranchesAtRoot(), None, (IMAGES,)), BranchesAtRoot)


@pytest.mark.parametrize("model", [SmallResNet(), BranchesAtRoot()], ids=["traced", "not traced"])
def test_train_and_eval_reach_every_module(model: nn.Module) -> None:
    prepared = prepare(model.eval(), QATConfig(), (IMAGES,))
    assert not any(module.training for module in prepared.modules())
    for mode in (True, False):
        prepared.train(mode)
        assert all(module.training is mode for module in prepared.modules())
        layers = [module.layer for module in prepared.modules() if isinstance(module, QATModuleWrapper)]
        assert all(layer.training is mode for layer in layers)


def hooked(model: nn.Module, calls: list[str], *names: str) -> None:
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(f"{name} before"))
        module.register_forward_hook(lambda module, args, output, name=name: calls.append(f"{name} after"))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_hooks_of_root_container_layer_and_activation_fire(mode: bool) -> None:
    model, calls = SmallResNet(), []
    hooked(model, calls, "", "stem", "bn", "block", "block.conv2", "average")
    prepared = prepare(model, QATConfig(), (IMAGES,))
    prepared(IMAGES)
    calls.clear()
    with torch.no_grad():
        prepared.train(mode)(IMAGES)
    expected = [" before"]
    for name in ("stem", "bn"):
        expected += [f"{name} before", f"{name} after"]
    expected += ["block before", "block.conv2 before", "block.conv2 after", "block after"]
    assert calls == [*expected, "average before", "average after", " after"]


def test_backward_hooks_of_root_and_container_fire() -> None:
    model, calls = SmallResNet(), []
    for name in ("", "block", "head"):
        model.get_submodule(name).register_full_backward_hook(lambda *args, name=name: calls.append(name))
    prepare(model, QATConfig(), (IMAGES,))(IMAGES.clone().requires_grad_()).sum().backward()
    assert calls == ["head", "block", ""]


def test_a_hook_of_the_root_changes_the_result() -> None:
    model = small_cnn()
    model.register_forward_hook(lambda module, args, output: output * 0)
    assert not prepare(model, QATConfig(), (IMAGES,))(IMAGES).any()


def test_arguments_left_out_may_be_passed_later() -> None:
    model = EXAMPLES["many results"].make().eval()
    inputs, offset = torch.randn(2, 5), torch.randn(2, 6)
    prepared = prepare(model, QATConfig(), (), {"x": inputs, "factor": 3.0})
    disable(prepared)
    assert all_equal(results(prepared, inputs, factor=2.0), results(model, inputs, factor=2.0))
    assert all_equal(results(prepared, inputs, offset=offset), results(model, inputs, offset=offset))
    assert all_equal(results(prepared, inputs, offset, factor=2.0), results(model, inputs, offset, factor=2.0))


def test_a_forward_bound_to_the_instance_is_respected() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def twice(self: nn.Module, x: Tensor) -> Tensor:
        return self[1](self[0](self[0](x)))

    model.forward = twice.__get__(model)  # type: ignore[method-assign]
    prepared, inputs = prepare(model, QATConfig(), (torch.randn(2, 3),)), torch.randn(2, 3)
    disable(prepared)
    assert torch.equal(prepared(inputs), model(inputs))


def test_a_layer_called_with_more_inside_what_is_not_traced_can_be_skipped() -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            size = (18, 18) if x.sum() < 1e6 else (17, 17)
            return self.up(x, output_size=size)

    with pytest.raises(TypeError, match="output_size"):  # a quantized layer takes its input alone
        prepare(Upsampling(), QATConfig(), (IMAGES,))(IMAGES)
    assert prepare(Upsampling(), QATConfig(skip=("up",)), (IMAGES,))(IMAGES).shape[-1] == 18


def test_a_view_inside_what_is_not_traced_works_on_integers() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(len(x), -1) if x.sum() < 1e6 else x

    prepared = prepare(Viewing(), QATConfig(), (IMAGES,))
    prepared(IMAGES)
    with torch.no_grad():
        result = prepared.eval()(IMAGES)
        assert prepared.conv.computes_integers
        assert torch.equal(result, convert(prepared)(IMAGES))


def test_parameters_that_do_not_train_stay_that_way() -> None:
    model = small_cnn()
    model[0].requires_grad_(False)
    prepared = prepare(model, QATConfig(), (IMAGES,))
    train_briefly(prepared, (IMAGES,), steps=1)
    assert not prepared[0].weight.requires_grad
    assert prepared[0].weight.grad is None


def results_of(model: nn.Module, *inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return results(model, *inputs)


def test_both_models_see_every_update() -> None:
    model = small_cnn().eval()
    prepared = prepare(model, QATConfig(), (IMAGES,))
    before = results_of(model, IMAGES)
    train_briefly(prepared, (IMAGES,), steps=1)
    assert not all_equal(results_of(model, IMAGES), before)


def test_examples_and_random_state_stay_where_the_forward_changes_them() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            x += 1
            return self.layer(x + torch.rand(1)) + offset.mul_(2)

    model, x, offset = Changes(), torch.ones(4, 3), torch.ones(4, 2)
    random = torch.random.get_rng_state()
    prepare(model, None, (x,), {"offset": offset})
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(x, torch.ones(4, 3))
    assert torch.equal(offset, torch.ones(4, 2))


@pytest.mark.parametrize(
    "change",
    [nn.utils.spectral_norm, functools.partial(prune.l1_unstructured, name="weight", amount=0.3)],
    ids=["spectral norm", "pruning"],
)
def test_weights_that_a_hook_computed_with_gradients_are_no_obstacle(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(change(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3)
    model(inputs)
    prepared = prepare(model, None, (inputs,))
    train_briefly(prepared, (inputs,))
    converted = convert(prepared)
    with torch.no_grad():
        assert torch.equal(converted(inputs), prepared.eval()(inputs))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "by a module"])
def test_a_change_through_a_view_is_what_the_float_model_computes(inplace: bool) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if inplace:
                self.relu(y[:, :2])
            else:
                y[:, :2].add_(1)
            return self.last(y)

    model = Changes().eval()
    prepared = prepare(model, None, (IMAGES,))
    disable(prepared)
    assert torch.equal(prepared(IMAGES), model(IMAGES))
    assert all(isinstance(layer, QATModuleWrapper) for layer in (prepared.first, prepared.last))
