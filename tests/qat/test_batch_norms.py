"""What is batch normalization in evaluation is recognized, and what only looks like it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_layers import BatchNormActivation, BatchNormReLU, FrozenBatchNorm, GhostBatchNorm
from mlframework.quantization.qat.batch_norms import Normalization, evaluation_form, plain_batch_norm


class DoublesEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 2 * self.eps)


class AddsABit(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01


class ByTheBatch(nn.BatchNorm2d):
    """Never uses its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Returns(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@pytest.mark.parametrize(
    ("make", "activation", "trains_plainly"),
    [
        (lambda: nn.BatchNorm1d(4), None, True),
        (lambda: BatchNormActivation(4, nn.ReLU6()), nn.ReLU6, True),
        (lambda: BatchNormActivation(4, nn.Hardswish()), nn.Hardswish, True),
        (lambda: BatchNormActivation(4, nn.Identity()), None, True),
        (lambda: BatchNormReLU(4), nn.ReLU, True),
        (lambda: GhostBatchNorm(4), nn.ReLU6, False),
        (lambda: FrozenBatchNorm(4), None, False),
        (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), None, False),
    ],
)
def test_forms(make: Callable[[], nn.Module], activation: type[nn.Module] | None, trains_plainly: bool) -> None:
    module = make()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seed = torch.random.get_rng_state()
    form = evaluation_form(module)
    assert form is not None
    assert type(form.activation) is (activation or type(None))
    assert form.trains_plainly is trains_plainly
    assert form.name is None or form.activation is module.get_submodule(form.name)
    # Trying it leaves no trace.
    assert module.training
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


class ClampsHigh(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(0, 50)


@pytest.mark.parametrize("channels", [1, 2, 64])
def test_a_clip_far_out_shows(channels: int) -> None:
    assert evaluation_form(ClampsHigh(channels)) is None
    form = evaluation_form(GhostBatchNorm(channels))
    assert form is not None
    assert type(form.activation) is nn.ReLU6


@pytest.mark.parametrize("kind", [DoublesEps, AddsABit, ByTheBatch, Returns])
def test_others(kind: type[nn.BatchNorm2d]) -> None:
    assert evaluation_form(kind(4)) is None
    assert plain_batch_norm(kind(4)) is None


def test_other_layers() -> None:
    for module in (nn.Conv2d(3, 3, 1), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.ReLU(), nn.Identity()):
        assert evaluation_form(module) is None


def test_a_normalization_is_its_modules() -> None:
    module = BatchNormActivation(4, nn.ReLU())
    part = Normalization(module)
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(part(x).relu(), module(x))
    assert module.num_batches_tracked == 2
    assert plain_batch_norm(part) is module
    assert part.running_mean is module.running_mean
    assert not part.state_dict()
    assert not list(part.parameters())
    with pytest.raises(AttributeError, match="nonsense"):
        _ = part.nonsense
