"""Statistics re-estimated are what the quantized model normalizes, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from example_architectures import SmallResNet
from mlframework.quantization import QATConfig, QATSchedule, calibrate, convert, prepare, reestimate_batch_norm

BATCHES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def prepared_resnet(bits: int = 4) -> nn.Module:
    prepared = prepare(SmallResNet(), QATConfig(weight_bits=bits), (BATCHES[0],))
    calibrate(prepared, BATCHES)
    return prepared


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_statistics_are_averages_of_what_each_batch_brings() -> None:
    prepared = prepared_resnet()
    first = prepared.bn
    inputs: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    assert reestimate_batch_norm(prepared, BATCHES) == len(batch_norms(prepared))
    assert len(inputs) == len(BATCHES)
    mean = torch.stack([each.mean((0, 2, 3)) for each in inputs]).mean(0)
    variance = torch.stack([each.var((0, 2, 3)) for each in inputs]).mean(0)
    # Sums of 384 values in float32.
    torch.testing.assert_close(first.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var.double(), variance, rtol=1e-4, atol=1e-6)


def test_nothing_but_statistics_changes() -> None:
    prepared = prepared_resnet()
    prepared.bn.eval()
    before = copy.deepcopy(prepared.state_dict())
    modes = [module.training for module in prepared.modules()]
    momenta = [layer.momentum for layer in batch_norms(prepared)]
    random = torch.get_rng_state()
    reestimate_batch_norm(prepared, BATCHES)
    changed = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}
    assert [module.training for module in prepared.modules()] == modes
    assert [layer.momentum for layer in batch_norms(prepared)] == momenta
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_and_conversion_agree_afterwards() -> None:
    prepared = prepared_resnet()
    calibrate(prepared, BATCHES, method="reestimate_batch_norm")
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(prepared(BATCHES[0]), convert(prepared)(BATCHES[0]))


def test_without_batch_norm_it_is_refused() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), QATConfig(), (torch.randn(2, 5),))
    with pytest.raises(ValueError, match="must have batch normalization with running statistics, got none"):
        reestimate_batch_norm(prepared, [torch.randn(4, 5)])


def test_frozen_layers_keep_their_statistics() -> None:
    prepared = prepared_resnet()
    QATSchedule(prepared, freeze_batch_norm_from=0)
    before = copy.deepcopy(prepared.state_dict())
    assert reestimate_batch_norm(prepared, BATCHES) == 0
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


def test_an_interruption_leaves_the_statistics() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallResNet()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x)
            return result

    prepared = prepare(Stops(), QATConfig(), (BATCHES[0],))
    calibrate(prepared, BATCHES)
    before = copy.deepcopy(prepared.state_dict())
    calls: Iterator[int] = iter(range(2))

    def stop(module: nn.Module, args: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    prepared.net.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(prepared, BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert all(layer.momentum is not None for layer in batch_norms(prepared))
