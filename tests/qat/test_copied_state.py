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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlframework.quantization import HistogramObserver, QATConfig, convert, prepare

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
