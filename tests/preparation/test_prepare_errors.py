"""What ``prepare`` and loading refuse, and that nothing is changed then."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from example_architectures import SmallResNet
from example_models import EXAMPLES, train_briefly
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QATModuleWrapper,
    QuantizationScheme,
    convert,
    prepare,
)

IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "config", "inputs", "kwargs", "error", "message"),
    [
        ("resnet", None, (IMAGES,), None, TypeError, "model must be a torch.nn.Module, got str"),
        (SmallResNet(), "onnxruntime", (IMAGES,), None, TypeError, "config must be a QATConfig, got str"),
        (SmallResNet(), None, IMAGES, None, TypeError, "example_inputs must be a tuple of arguments, got Tensor"),
        (SmallResNet(), None, (), None, TypeError, "must fit the model's forward.*missing a required argument: 'x'"),
        (SmallResNet(), None, (IMAGES, IMAGES), None, TypeError, "must fit the model's forward.*too many positional"),
        (SmallResNet(), None, (IMAGES,), {"y": 1}, TypeError, "must fit the model's forward.*'y'"),
        (SmallResNet(), None, (IMAGES[:, :2],), None, ValueError, r"example_inputs must run .* got \[\(2, 2, 8, 8\)\]"),
        (SmallResNet(), None, ("image",), None, ValueError, r"example_inputs must run .* got \['str'\]"),
        (SmallResNet(), QATConfig(skip=("steam",)), (IMAGES,), None, ValueError, r"match none: \['steam'\]"),
        (SmallResNet(), QATConfig(overrides={nn.LSTM: QATConfig()}), (IMAGES,), None, ValueError, "match none"),
    ],
    ids=["model", "config", "tensor", "missing", "too many", "unknown", "shape", "type", "skip", "override"],
)  # fmt: skip
def test_bad_arguments_are_refused(
    model: Any, config: Any, inputs: Any, kwargs: Any, error: type[Exception], message: str
) -> None:
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        prepare(model, config, inputs, kwargs)
    if isinstance(model, nn.Module):
        assert type(model) is SmallResNet
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        prepare(SmallResNet(), None, (IMAGES,)),
        prepare(nn.Linear(3, 2), None, (torch.randn(2, 3),)),
        nn.Sequential(QATModuleWrapper(nn.Linear(3, 2))),
        nn.Sequential(nn.Linear(3, 2), FakeQuantizeLayer(QuantizationScheme())),
    ],
    ids=["model", "layer", "wrapper inside", "node inside"],
)
def test_a_prepared_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model is already prepared"):
        prepare(model, None, (IMAGES,))


def test_a_converted_model_is_refused() -> None:
    prepared = prepare(SmallResNet(), None, (IMAGES,))
    prepared(IMAGES)
    with pytest.raises(ValueError, match=r"model is already converted: .* is a "):
        prepare(convert(prepared), None, (IMAGES,))


def test_a_lazy_model_is_refused_and_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"none yet for 0.weight: run it once first"):
        prepare(model, QATConfig(), (torch.randn(2, 3),))
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    model(torch.randn(2, 3))
    assert isinstance(prepare(model, QATConfig(), (torch.randn(2, 3),))[0], QATModuleWrapper)


@pytest.mark.parametrize("name", ["branches at root", "branches inside", "attention"])
def test_control_flow_is_no_reason_to_refuse(name: str) -> None:
    example = EXAMPLES[name]
    prepared = prepare(example.make(), None, example.inputs())
    train_briefly(prepared, example.inputs())
    assert any(isinstance(module, QATModuleWrapper) for module in prepared.modules())


OTHERS = {
    "weight bits": QATConfig(weight_bits=4),
    "activation bits": QATConfig(activation_bits=4),
    "target": QATConfig(target="executorch"),
    "per tensor": QATConfig(per_channel_weights=False),
    "one layer": QATConfig(overrides={"head": QATConfig(weight_bits=5)}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_scheme_leaves_all_state_unchanged(other: QATConfig) -> None:
    prepared, source = (prepare(SmallResNet(), config, (IMAGES,)) for config in (QATConfig(), other))
    train_briefly(source, (IMAGES,))
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(RuntimeError, match=r"state_dict holds .* quantized as .*, expected"):
        prepared.load_state_dict(source.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


def test_a_learnable_state_loads_into_an_observed_model_and_back() -> None:
    observed, learnable = (prepare(SmallResNet(), QATConfig(learnable=flag), (IMAGES,)) for flag in (False, True))
    train_briefly(learnable, (IMAGES,))
    observed.load_state_dict(learnable.state_dict())
    with torch.no_grad():
        assert torch.equal(observed.eval()(IMAGES), learnable.eval()(IMAGES))
    learnable.load_state_dict(observed.state_dict())


def test_evaluation_before_any_data_is_the_float_models_with_one_warning() -> None:
    model = SmallResNet().eval()
    prepared = prepare(model, None, (IMAGES,))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(prepared(IMAGES), model(IMAGES))
        assert [("x_fake_quantize has seen no data" in str(each.message)) for each in caught] == [True] * gradients
