"""Smoothing leaves the float function as it is, bit for bit, and takes outliers out of activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from example_models import all_equal, results
from mlframework.quantization import (
    FakeQuantizeLayer,
    MinMaxObserver,
    QATConfig,
    calibrate,
    convert,
    prepare,
    smooth_activations,
)

BATCHES = [torch.randn(16, 7, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Block(nn.Module):
    """Normalization before attention's projections and before the feed-forward layers, as in GPT-2 and ViT."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(12), norm(12)
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        with torch.no_grad():
            for norm_layer in (self.norm1, self.norm2):
                norm_layer.weight[3] = 40.0
                norm_layer.weight[7] = 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = self.query(h) @ self.key(h).transpose(1, 2) / 12**0.5
        x = x + self.out(scores.softmax(-1) @ self.value(h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def noise(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        expected = reference(BATCHES[1])
        return float((model.eval()(BATCHES[1]) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_float_function_stays_and_the_quantized_one_gets_closer(norm: type[nn.Module]) -> None:
    torch.manual_seed(1)
    model = Block(norm).eval()
    state = copy.deepcopy(model.state_dict())
    prepared = prepare(model, QATConfig(activation_observer=MinMaxObserver), (BATCHES[0],))
    calibrate(prepared, BATCHES)
    before = noise(prepared, model)
    report = smooth_activations(prepared, BATCHES)
    assert report.changed == ["norm1", "norm2"]
    assert noise(prepared, model) < 0.8 * before
    with torch.no_grad():
        assert torch.equal(prepared(BATCHES[1]), convert(prepared)(BATCHES[1]))
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False
    with torch.no_grad():
        assert all_equal(results(model, BATCHES[1]), results(prepared, BATCHES[1]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_factors_are_the_papers(alpha: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)).eval()
    prepared = prepare(model, QATConfig(), (BATCHES[0],))
    smooth_activations(prepared, BATCHES, alpha)
    with torch.no_grad():
        extents = torch.cat([model[0](batch) for batch in BATCHES]).abs().amax((0, 1)).double()
        expected = extents**alpha / model[1].weight.abs().amax(0).double() ** (1 - alpha)
        actual = model[0].weight.double() / prepared.state_dict()["0.weight"].double()
        assert torch.equal(actual, 2 ** (actual.log2().round()))
        ratio = (actual / expected).log2().abs()
    assert float(ratio.max()) <= 0.5 + 1e-5  # rounded to the nearest power of two


class Residual(nn.Module):
    """Normalization after a sum, whose result the next sum reads, too, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_a_normalization_that_a_sum_reads_is_left_alone() -> None:
    prepared = prepare(Residual(), QATConfig(), (BATCHES[0],))
    assert not smooth_activations(prepared, BATCHES).changed


@pytest.mark.parametrize("alpha", [-0.1, 1.5, True, "half"])
def test_alpha_is_checked(alpha: object) -> None:
    prepared = prepare(Residual(), QATConfig(), (BATCHES[0],))
    with pytest.raises(ValueError, match="alpha must be a number from 0 to 1"):
        smooth_activations(prepared, BATCHES, alpha)  # type: ignore[arg-type]


def test_it_is_a_method_of_calibrate() -> None:
    prepared, other = (prepare(Block().eval(), QATConfig(), (BATCHES[0],)) for _ in range(2))
    other.load_state_dict(prepared.state_dict())
    calibrate(prepared, BATCHES, method=("smooth_activations", "equalize", "correct_bias"))
    smooth_activations(other, BATCHES)
    assert torch.equal(prepared.state_dict()["norm1.weight"], other.state_dict()["norm1.weight"])
