"""The figures for logs, against what they are defined by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from example_models import small_cnn
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    calibrate,
    explain,
    log_quantization,
    prepare,
    quantization_metrics,
)


def prepared_cnn() -> tuple[nn.Module, Tensor]:
    images = torch.randn(8, 3, 8, 8)
    prepared = prepare(small_cnn(), QATConfig(), (images,))
    calibrate(prepared, [images])
    return prepared, images


def test_scales_are_those_of_the_nodes() -> None:
    prepared, _ = prepared_cnn()
    scales = {
        f"quantization/scale/{name.removesuffix('_fake_quantize')}": float(node.scale.median())
        for name, node in prepared.named_modules()
        if isinstance(node, FakeQuantizeLayer)
    }
    assert quantization_metrics(prepared) == scales


def test_noise_is_what_explain_finds() -> None:
    network = small_cnn().eval()
    images = torch.randn(8, 3, 8, 8)
    prepared = prepare(network, QATConfig(weight_bits=4), (images,))
    calibrate(prepared, [images])
    metrics = quantization_metrics(prepared, images)
    explanation = explain(network, prepared, [images])
    assert explanation.layers
    for layer in explanation.layers:
        name = layer.name.removesuffix("_fake_quantize")
        assert metrics[f"quantization/snr/{name}"] == layer.snr
        assert metrics[f"quantization/clipped_share/{name}"] == layer.own.clipped_share


def test_the_clipped_share_counts_values_outside_of_the_grid() -> None:
    """Inputs 1 to 8 on a grid up to 4: half of them are outside."""
    prepared = prepare(nn.Sequential(nn.Linear(1, 1)), QATConfig(), (torch.ones(1, 1),))
    calibrate(prepared, [torch.tensor([[0.0], [4.0]])])
    metrics = quantization_metrics(prepared, torch.arange(1.0, 9.0)[:, None])
    assert metrics["quantization/clipped_share/input_1"] == 0.5


def test_figures_leave_the_model_as_it_was() -> None:
    prepared, images = prepared_cnn()
    prepared.train()
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in prepared.modules()]
    random = torch.get_rng_state()
    quantization_metrics(prepared, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
    assert hooks == [len(module._forward_hooks) for module in prepared.modules()]
    assert all(module.training for module in prepared.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_before_any_data_there_are_the_scales_of_weights() -> None:
    images = torch.randn(8, 3, 8, 8)
    prepared = prepare(small_cnn(), QATConfig(), (images,))
    metrics = quantization_metrics(prepared, images)
    assert metrics
    assert all(tag.startswith("quantization/scale/") and tag.endswith("weight") for tag in metrics)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a prepared model, got Sequential"):
        quantization_metrics(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    from torch.utils.tensorboard import SummaryWriter

    prepared, images = prepared_cnn()
    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        log_quantization(prepared, writer, 5, batch=images)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    metrics = quantization_metrics(prepared, images)
    assert set(events.Tags()["scalars"]) == metrics.keys()
    for tag, value in metrics.items():
        (event,) = events.Scalars(tag)
        assert event.step == 5
        assert event.value == torch.tensor(value).item()  # events are float32
