"""Evaluation mode for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlframework.quantization import QATConfig, QATModuleWrapper, prepare
from mlframework.quantization.graph.modes import in_evaluation


def mixed() -> nn.Module:
    """A model in training, with a part in evaluation that has a part in training."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2))))
    model[1].eval()
    model[1][1].train()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("make", [mixed, lambda: mixed().train(), lambda: mixed().eval()])
def test_every_module_is_back_in_its_mode(make: type[nn.Module]) -> None:
    model = make()
    before = modes(model)
    with in_evaluation(model):
        assert not any(modes(model).values())
    assert modes(model) == before


def test_after_an_error_too() -> None:
    model = mixed()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), in_evaluation(model):
        raise ZeroDivisionError
    assert modes(model) == before


def test_several_models_may_share_modules() -> None:
    shared = nn.Dropout()
    first, second = nn.Sequential(shared).train(), nn.Sequential(shared, nn.Dropout())
    second.training = False
    before = modes(first), modes(second)
    with in_evaluation(first, second):
        assert not any((*modes(first).values(), *modes(second).values()))
    assert (modes(first), modes(second)) == before


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode whatever the model is in."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def test_a_module_that_decides_for_itself_is_left_at_it() -> None:
    model = nn.Sequential(Frozen(2), nn.Dropout())
    model.train()
    with in_evaluation(model):
        pass
    assert modes(model) == {"": True, "0": False, "1": True}
    model = nn.Sequential(Frozen(2))  # no one has told it anything yet
    with in_evaluation(model):
        assert not model[0].training
    assert modes(model) == {"": True, "0": True}


def test_a_wrapped_layer_is_back_in_its_mode_as_well() -> None:
    model = prepare(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), QATConfig(), (torch.randn(2, 3),))
    wrappers = [module for module in model.modules() if isinstance(module, QATModuleWrapper)]
    with in_evaluation(model.train()):
        assert not any(wrapper.layer.training for wrapper in wrappers)
    assert all(wrapper.layer.training for wrapper in wrappers)


def test_it_may_be_nested() -> None:
    model = mixed()
    before = modes(model)
    with in_evaluation(model):
        with in_evaluation(model):
            pass
        assert not any(modes(model).values())
    assert modes(model) == before
