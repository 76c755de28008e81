"""Every kind of layer that can be quantized, with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, QATConfig, QATModuleWrapper


class LayerExample(NamedTuple):
    """``batch_norm`` makes one that folds into the layer."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_norm: Callable[[], nn.Module] | None = None

    def inputs(self, requires_grad: bool = False) -> tuple[Tensor]:
        if not self.shape:
            return (torch.randint(10, (3, 4)),)
        return ((torch.randn(self.shape) + 0.3).requires_grad_(requires_grad),)


LAYERS = {
    "linear": LayerExample(lambda: nn.Linear(6, 5), (7, 6), lambda: nn.BatchNorm1d(5)),
    "linear without bias": LayerExample(lambda: nn.Linear(6, 5, bias=False), (7, 6), lambda: nn.BatchNorm1d(5)),
    "conv1d": LayerExample(lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (4, 3, 9), lambda: nn.BatchNorm1d(5)),
    "conv2d": LayerExample(lambda: nn.Conv2d(3, 5, 3, padding=(1, 2)), (4, 3, 7, 6), lambda: nn.BatchNorm2d(5)),
    "same padding": LayerExample(
        lambda: nn.Conv2d(3, 5, (3, 5), padding="same", dilation=2), (4, 3, 7, 6), lambda: nn.BatchNorm2d(5)
    ),
    "reflected": LayerExample(
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (4, 3, 7, 6), lambda: nn.BatchNorm2d(5)
    ),
    "grouped": LayerExample(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 6, 5), lambda: nn.BatchNorm2d(6)),
    "depthwise": LayerExample(
        lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 4, 6, 5), lambda: nn.BatchNorm2d(4)
    ),
    "conv3d": LayerExample(lambda: nn.Conv3d(2, 4, 2, padding=1), (3, 2, 4, 3, 4), lambda: nn.BatchNorm3d(4)),
    "transposed": LayerExample(
        lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1),
        (3, 4, 4, 5),
        lambda: nn.BatchNorm2d(5),
    ),
    "embedding": LayerExample(lambda: nn.Embedding(10, 4), ()),
}
EVERY_LAYER = pytest.mark.parametrize("example", LAYERS.values(), ids=LAYERS)
EVERY_PRODUCT = pytest.mark.parametrize(
    "example",
    [example for example in LAYERS.values() if example.shape],
    ids=[name for name in LAYERS if LAYERS[name].shape],
)


def nodes_of(wrapper: QATModuleWrapper) -> list[FakeQuantizeLayer]:
    return [module for module in wrapper.modules() if isinstance(module, FakeQuantizeLayer)]


def wrapped(example: LayerExample, config: QATConfig | None = None, **following: Any) -> QATModuleWrapper:
    """A wrapper that has seen data, in evaluation mode."""
    wrapper = QATModuleWrapper(example.make(), config, **following)
    for _ in range(2):
        wrapper(*example.inputs())
    for module in wrapper.following:
        module.eval()
    return wrapper.eval()
