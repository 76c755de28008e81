"""A training step reads nothing back from the device, which a GPU would have to be waited for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlframework.quantization import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QATConfig,
    kernels,
    prepare,
)
from mlframework.quantization.kernels.triton_gpu.availability import is_interpreter

# What PyTorch's operators read of a tensor, and the copy of a Python number to the device, which waits as well.
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "bincount", "lift_fresh"}

CONFIGS = {
    "by default": QATConfig(),
    "with learned scales": QATConfig(learnable=True),
    "affine, learned": QATConfig.for_target("openvino", learnable=True),
    "with the extremes of everything": QATConfig(activation_observer=MinMaxObserver),
    "with percentiles": QATConfig(activation_observer=PercentileObserver),
    "with histograms": QATConfig(activation_observer=HistogramObserver),
    "updated now and then": QATConfig(activation_observer=functools.partial(MovingAverageObserver, update_every=3)),
}


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._opname not in READS, f"{func} is called"
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """Every kind of layer and what follows one: batch normalization, a sum, a function from a table, an average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.activation = nn.GELU()
        self.head = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        values = self.stem(input)
        values = torch.relu(values + self.block(values))
        return self.head(self.activation(self.depthwise(values)).mean((2, 3)))


@contextlib.contextmanager
def running(path: str) -> Iterator[None]:
    """With the kernels of a CPU, the references, or the kernels for a GPU in Triton's interpreter."""
    with contextlib.ExitStack() as stack:
        if path == "reference":
            stack.enter_context(kernels.reference_kernels())
        elif path == "triton":
            stack.enter_context(kernels.interpreted_kernels())
            stack.enter_context(np.errstate(all="ignore"))  # of the interpreter's infinities
        yield


def assert_steps_read_nothing(config: QATConfig, path: str, steps: int) -> None:
    images = torch.randn(2, 3, 6, 6)
    model = prepare(Network(), config, example_inputs=(images,)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with running(path):
        for _ in range(2):  # the first batch sets the ranges
            step()
        with NoReads():
            for _ in range(steps):
                step()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_training_step_reads_nothing(config: QATConfig, path: str) -> None:
    assert_steps_read_nothing(config, path, 4)


@pytest.mark.interpreter
@pytest.mark.skipif(not is_interpreter(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", [pytest.param("by default", marks=pytest.mark.long), "with learned scales"])
def test_kernels_for_a_gpu_read_nothing(name: str) -> None:
    assert_steps_read_nothing(CONFIGS[name], "triton", 1)


def test_reads_are_noticed() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        torch.ones(1).item()
