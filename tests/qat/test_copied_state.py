"""Whatever copies or averages a model's buffers copies what its nodes have seen."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    QATConfig,
    QATModuleWrapper,
    QuantizationScheme,
    convert,
    prepare,
)

pytestmark = pytest.mark.slow

INPUTS = torch.randn(16, 6)
CONFIGS = pytest.mark.parametrize(
    "config", [QATConfig(), QATConfig(learnable=True), QATConfig(activation_observer=HistogramObserver)]
)


def prepared_model(config: QATConfig) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    return prepare(model, config, (INPUTS,))


def trained_model(config: QATConfig) -> nn.Module:
    model = prepared_model(config)
    for _ in range(3):
        model(INPUTS).square().mean().backward()
    return model


def assert_evaluates_the_same(copied: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        expected = model.eval()(INPUTS)
        assert torch.equal(copied.eval()(INPUTS), expected)
        assert torch.equal(convert(copied)(INPUTS), expected)


def by_tensor(target: nn.Module, source: nn.Module) -> None:
    for name, value in target.state_dict().items():
        value.copy_(source.state_dict()[name])


def by_data(target: nn.Module, source: nn.Module) -> None:
    for mine, other in zip(target.parameters(), source.parameters(), strict=True):
        mine.data.copy_(other.data)
    for mine, other in zip(target.buffers(), source.buffers(), strict=True):
        mine.data.copy_(other.data)


def by_average(target: nn.Module, source: nn.Module) -> None:
    for mine, other in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        mine.copy_(0.0 * torch.nan_to_num(mine.float()) + 1.0 * other)


def by_pytorch(target: nn.Module, source: nn.Module) -> None:
    set_model_state_dict(target, get_model_state_dict(source))


@pytest.mark.parametrize("copies", [by_tensor, by_data, by_average, by_pytorch])
@CONFIGS
def test_a_copy_made_before_the_first_batch(config: QATConfig, copies: Callable[..., None]) -> None:
    model = prepared_model(config)
    copied = copy.deepcopy(model).eval()
    for _ in range(3):
        model(INPUTS)
    copies(copied, model)
    assert_evaluates_the_same(copied, model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@CONFIGS
def test_a_checkpoint_loaded_in_place(config: QATConfig, tmp_path: Path) -> None:
    model, fresh = trained_model(config), prepared_model(config)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    dcp.load(fresh.state_dict(), checkpoint_id=tmp_path)
    assert_evaluates_the_same(fresh, model)


@pytest.mark.parametrize("copies", [by_tensor, by_data])
@CONFIGS
def test_training_goes_on_from_a_copy(config: QATConfig, copies: Callable[..., None]) -> None:
    model, copied = trained_model(config), prepared_model(config)
    copies(copied, model)
    copied.train()
    assert torch.equal(copied(INPUTS), model(INPUTS))
    assert torch.equal(copied(INPUTS), model(INPUTS))


def test_a_reset_copied_over_takes_the_data_away() -> None:
    model = trained_model(QATConfig()).eval()
    by_tensor(model, prepared_model(QATConfig()))
    with pytest.raises(RuntimeError, match="seen no data"):
        convert(model)
    with pytest.warns(UserWarning, match="seen no data"):
        model(INPUTS)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.999), get_ema_multi_avg_fn(0.5)])
@CONFIGS
def test_an_average_of_models_evaluates_and_loads(config: QATConfig, average: Callable[..., None] | None) -> None:
    model = prepared_model(config)
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(20):
        model(INPUTS).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    averaged.eval()
    with torch.no_grad():
        assert torch.equal(convert(averaged.module)(INPUTS), averaged(INPUTS))
    assert_evaluates_the_same(_loaded(averaged.module, config), averaged.module)


def states_of(model: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    """The state after each of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        optimizer.step()
        states.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("decay", [None, 0.9])
@CONFIGS
def test_an_average_from_before_the_first_batch_is_of_what_data_has_shown(
    config: QATConfig, decay: float | None
) -> None:
    """Not of the scale and the zero point that a node is constructed with."""
    model = prepared_model(config)
    averaged = AveragedModel(
        model, use_buffers=True, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay)
    )
    averaged.update_parameters(model)
    states = []
    for _ in range(12):
        states += states_of(model, 1)
        averaged.update_parameters(model)
    weights = [1.0 if decay is None else decay ** (len(states) - 1 - index) for index in range(len(states))]
    averaged.eval()
    with torch.no_grad():
        expected = averaged(INPUTS)
        assert torch.equal(convert(averaged.module)(INPUTS), expected)
    for name, module in averaged.module.named_modules():
        if isinstance(module, FakeQuantizeLayer) and module.reduces_over_ranks:
            for part in ("scale", "zero_point"):
                values = [weight * state[f"{name}.{part}"] for weight, state in zip(weights, states, strict=True)]
                # Float32 rounding, and of zero points magnified by taking the initial one out.
                torch.testing.assert_close(getattr(module, part), sum(values) / sum(weights), rtol=1e-4, atol=1e-2)
    averaged.update_parameters(model)  # goes on from there
    assert all(bool((module.initialized == 1).all()) for module in nodes_of(averaged))
    update_bn([INPUTS, 2 * INPUTS], averaged)
    averaged.eval()
    with torch.no_grad():
        assert torch.isfinite(averaged(INPUTS)).all()
        assert torch.equal(convert(averaged.module)(INPUTS), averaged(INPUTS))


def test_an_average_of_parameters_alone_lacks_what_it_has_of_the_time_before_data() -> None:
    """It does not tell how much that is. Of weights, it has as much of the first ones."""
    model = prepared_model(QATConfig(learnable=True))
    averaged = AveragedModel(model, use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    states = []
    for _ in range(30):
        states += states_of(model, 1)
        averaged.update_parameters(model)
    averaged.eval()
    with torch.no_grad():
        assert torch.equal(convert(averaged.module)(INPUTS), averaged(INPUTS))
    for name, node in averaged.module.named_modules():
        if isinstance(node, FakeQuantizeLayer) and node.reduces_over_ranks:  # a weight's has its scale from the start
            scales = [state[f"{name}.scale"] for state in states]
            average = sum(0.1 * 0.9**age * scale for age, scale in enumerate(reversed(scales)))
            torch.testing.assert_close(node.scale.data, average, rtol=1e-4, atol=0)  # float32 rounding, of 30 steps


def nodes_of(model: nn.Module) -> list[FakeQuantizeLayer]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_averages_weights_are_quantized_on_their_own_range(bits: int, use_buffers: bool) -> None:
    """Not on the newest model's, nor on the average of its scales."""
    model = prepared_model(QATConfig(weight_bits=bits))
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for step in range(4):
        states_of(model, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + step)
        averaged.update_parameters(model)
    averaged.eval()
    with torch.no_grad():
        assert torch.equal(convert(averaged.module)(INPUTS), averaged(INPUTS))
    for layer in averaged.module.modules():
        if isinstance(layer, QATModuleWrapper):
            largest = layer.weight.detach().abs().amax(1)
            statistics = layer.weight_fake_quantize.observer.statistics
            if bits < 8:  # a share of the largest magnitude, which is kept as the minimum
                assert torch.equal(-statistics.minimum, largest)
            else:
                assert torch.equal(layer.weight_fake_quantize.scale, largest / 127)


@CONFIGS
def test_batch_statistics_of_an_average_are_those_of_its_quantized_activations(config: QATConfig) -> None:
    model = prepared_model(config)
    averaged = AveragedModel(model)
    for _ in range(3):
        states_of(model, 1)
        averaged.update_parameters(model)
    before = {name: value.clone() for name, value in averaged.module.named_parameters()}
    seen: list[torch.Tensor] = []
    batches = [INPUTS[:8], INPUTS[8:], 2 * INPUTS[:8]]
    reference = copy.deepcopy(averaged.module)
    update_bn([(batch,) for batch in batches], averaged)
    batch_norm = reference.get_submodule("1")
    batch_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    updated = averaged.module.get_submodule("1")
    means = torch.stack([values.mean(0) for values in seen])
    variances = torch.stack([values.var(0) for values in seen])
    # Sums of floats in another order.
    torch.testing.assert_close(updated.running_mean, means.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(updated.running_var, variances.mean(0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in averaged.module.named_parameters())
    averaged.eval()
    with torch.no_grad():
        assert torch.equal(convert(averaged.module)(INPUTS), averaged(INPUTS))


def test_a_state_with_the_old_flag_loads() -> None:
    model, fresh = trained_model(QATConfig()), prepared_model(QATConfig())
    state = {
        name: value.to(torch.uint8) if "initialized" in name else value for name, value in model.state_dict().items()
    }
    fresh.load_state_dict(state)
    assert_evaluates_the_same(fresh, model)


@CONFIGS
def test_pickles_and_copies(config: QATConfig) -> None:
    model = trained_model(config)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert_evaluates_the_same(copied, model)


def _loaded(model: nn.Module, config: QATConfig) -> nn.Module:
    fresh = prepared_model(config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_the_mean_of_many_alike_is_one_of_them() -> None:
    """A share of 1 that is rounded says nothing of data that were missing."""
    node = FakeQuantizeLayer(QuantizationScheme())
    node(torch.randn(64) * 1e-3)
    state = {name: tensor.clone() for name, tensor in node.state_dict().items()}
    mean = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name in ("scale", "initialized")}
    for name, tensor in mean.items():
        for _ in range(40):
            tensor += state[name] * (1 / 40)
    assert 0 < 1 - mean["initialized"].item() < 1e-5
    node.load_state_dict({**state, **mean})
    assert node.eval().is_initialized
    torch.testing.assert_close(node.scale, state["scale"], rtol=1e-5, atol=0)
