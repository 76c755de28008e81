"""A clone trains the model's parameters and has everything else to itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from example_architectures import SmallResNet, small_cnn
from mlframework.quantization.graph.clone import clone_sharing_parameters


class CountsItself(nn.Linear):
    """Registers a method of its own as a hook."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_forward_hook(self.count)

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def record(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_parameters_are_shared_and_buffers_are_not() -> None:
    model = SmallResNet()
    clone = clone_sharing_parameters(model)
    assert type(clone) is SmallResNet
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in clone.named_parameters())
    assert len(list(clone.parameters())) == len(parameters)
    before = model.bn.running_mean.clone()
    clone(torch.randn(4, 3, 8, 8))
    assert torch.equal(model.bn.running_mean, before)
    assert not torch.equal(clone.bn.running_mean, before)


def test_modules_are_copies_with_their_modes() -> None:
    model = small_cnn()
    model[1].eval()
    clone = clone_sharing_parameters(model)
    assert {id(module) for module in model.modules()}.isdisjoint(id(module) for module in clone.modules())
    assert [module.training for module in clone.modules()] == [module.training for module in model.modules()]


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    clone = clone_sharing_parameters(model)
    assert clone[0].weight is clone[1].weight is model[0].weight


def test_modules_used_twice_stay_one() -> None:
    layer = nn.Linear(3, 3)
    clone = clone_sharing_parameters(nn.Sequential(layer, nn.ReLU(), layer))
    assert clone[0] is clone[2]
    assert clone[0] is not layer


def test_a_recorder_goes_on_recording() -> None:
    model, recorder = nn.Sequential(nn.Linear(3, 2)), Recorder()
    model.register_forward_hook(recorder)
    model[0].register_forward_hook(recorder.record)
    clone_sharing_parameters(model)(torch.randn(1, 3))
    assert len(recorder.seen) == 2


def test_a_modules_own_hook_belongs_to_the_copy() -> None:
    model = nn.Sequential(CountsItself())
    clone = clone_sharing_parameters(model)
    clone(torch.randn(1, 3))
    assert (model[0].calls, clone[0].calls) == (0, 1)


def test_tensors_with_a_graph_are_copied_without_it() -> None:
    model = nn.Linear(3, 2)
    model.derived, model.several = model.weight * 2, [model.weight * 3]
    clone = clone_sharing_parameters(model)
    for original, copied in ((model.derived, clone.derived), (model.several[0], clone.several[0])):
        assert torch.equal(copied, original)
        assert copied.is_leaf
        assert copied.data_ptr() != original.data_ptr()
        assert original.grad_fn is not None


def test_gradients_of_both_add_up() -> None:
    model = nn.Linear(3, 2)
    clone = clone_sharing_parameters(model)
    inputs = torch.randn(4, 3)
    (alone,) = torch.autograd.grad(model(inputs).sum(), model.weight)
    (model(inputs).sum() + clone(inputs).sum()).backward()
    assert torch.equal(clone.weight.grad, 2 * alone)


def test_a_hook_that_is_called_with_its_module_gets_the_copy() -> None:
    class Loads:
        def __init__(self) -> None:
            self.seen: list[nn.Module] = []

        def record(self, module: nn.Module, *args: Any) -> None:
            self.seen.append(module)

    loads, model = Loads(), nn.Sequential(nn.Linear(3, 2))
    model[0].register_load_state_dict_pre_hook(loads.record)
    clone = clone_sharing_parameters(model)
    state = model.state_dict()
    del model
    clone.load_state_dict(state)
    assert loads.seen == [clone[0]]
