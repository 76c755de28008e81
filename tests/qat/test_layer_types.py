"""Which layers are known, what stands in their way, and what folds into them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from mlframework.quantization.qat.layer_types import LAYER_TYPES, clip_of, layer_type_of, obstacle_of, takes_batch_norm


@pytest.mark.parametrize("kind", LAYER_TYPES, ids=lambda kind: kind.__name__)
def test_subclasses_count_unless_they_compute_otherwise(kind: type[nn.Module]) -> None:
    plain = type("Plain", (kind,), {})
    other = type("Other", (kind,), {"forward": lambda self, input: input})
    size = 3 if "Conv" in kind.__name__ else 1
    arguments: tuple[Any, ...] = (2, 4, size) if size == 3 else (2, 4)
    assert layer_type_of(plain(*arguments)) is LAYER_TYPES[kind]
    assert layer_type_of(other(*arguments)) is None
    assert obstacle_of(plain(*arguments)) is None


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda kind: kind.__name__)
def test_convolutions_that_compute_otherwise_in_their_helper_are_unknown(kind: type[nn.Module]) -> None:
    standardized = type("Standardized", (kind,), {"_conv_forward": lambda self, input, weight, bias: input})
    assert layer_type_of(standardized(2, 4, 3)) is None


@pytest.mark.parametrize("layer", [nn.Bilinear(2, 2, 2), nn.ConvTranspose1d(2, 2, 3), nn.LSTM(2, 2), nn.ReLU()])
def test_other_layers_are_unknown(layer: nn.Module) -> None:
    assert layer_type_of(layer) is None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(2, 2, 3, groups=2), "groups"),
        (nn.Embedding(3, 2, max_norm=2.0), "max_norm"),
    ],
)
def test_obstacles(layer: nn.Module, reason: str) -> None:
    assert reason in str(obstacle_of(layer))


def test_a_computed_weight_is_no_obstacle() -> None:
    assert obstacle_of(parametrizations.spectral_norm(nn.Linear(2, 2))) is None


@pytest.mark.parametrize(
    ("activation", "clip"),
    [
        (None, (-math.inf, math.inf)),
        (nn.ReLU(), (0.0, math.inf)),
        (nn.ReLU6(), (0.0, 6.0)),
        (nn.Hardtanh(-2, 3), (-2.0, 3.0)),
        (nn.LeakyReLU(), None),
        (nn.SiLU(), None),
    ],
    ids=str,
)
def test_what_activations_clip_to(activation: nn.Module | None, clip: tuple[float, float] | None) -> None:
    assert clip_of(activation) == clip


def test_batch_norm_folds_into_layers_of_its_dimensions() -> None:
    assert takes_batch_norm(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert takes_batch_norm(nn.ConvTranspose2d(2, 3, 1), nn.BatchNorm2d(3, affine=False))
    assert not takes_batch_norm(nn.Conv2d(2, 3, 1), nn.BatchNorm1d(3))
    assert not takes_batch_norm(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert takes_batch_norm(nn.Conv2d(2, 3, 1), nn.SyncBatchNorm(3))
    assert not takes_batch_norm(nn.ReLU(), nn.BatchNorm1d(3))
