"""The networks that are trained and run on a GPU, at the sizes that people use, and tiny ones for a rehearsal."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from workloads import TrainingStep, Workload

import zoo
from mlframework.quantization import QATConfig, calibrate, convert, prepare
from zoo.data import Batch, pictures, text
from zoo.resnet import Bottleneck, ResNet

# Of the batch, what serves as an example and for calibration, on the CPU.
EXAMPLES = 2
EXAMPLE_TOKENS = 64


def vectors(size: int, seed: int, length: int, classes: int) -> Batch:
    """Values (N, length) of a normal distribution; labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        (torch.randn(size, length, generator=generator),), torch.randint(classes, (size,), generator=generator)
    )


def _gpt(vocabulary: int, context: int, width: int, layers: int, batch: int) -> Workload:
    network = zoo.Network(
        partial(zoo.GPT, vocabulary=vocabulary, context=context, width=width, layers=layers, heads=width // 64),
        partial(text, length=context, vocabulary=vocabulary),
    )
    description = f"{batch} texts of {context} tokens, {layers} layers of width {width}, vocabulary of {vocabulary:,}"
    return Workload(network, batch, "GPT", description, torch.contiguous_format)


def _mlp(width: int, hidden: int, batch: int) -> Workload:
    network = zoo.Network(
        partial(zoo.MLP, inputs=width, hidden=(width,) * hidden, classes=width, batch_norm=False),
        partial(vectors, length=width, classes=width),
    )
    description = f"{batch:,} vectors, {hidden + 1} layers of {width:,} by {width:,}"
    return Workload(network, batch, "MLP", description, torch.contiguous_format)


def _resnet50(network: zoo.Network, batch: int, image_size: int) -> Workload:
    return Workload(network, batch, "ResNet-50", f"{batch} images of {image_size}x{image_size}, channels-last")


WORKLOADS = {
    "resnet50": _resnet50(zoo.FULL_SIZE["resnet50"], 64, 224),
    "gpt": _gpt(vocabulary=50_304, context=1024, width=768, layers=12, batch=8),
    "gpt_bytes": _gpt(vocabulary=256, context=1024, width=768, layers=12, batch=8),
    "mlp": _mlp(width=4096, hidden=4, batch=4096),
}

_tiny_resnet50 = partial(ResNet, [4, 4], [1, 1], classes=10, small_images=True, block=Bottleneck)
REHEARSED = {
    "resnet50": _resnet50(zoo.Network(_tiny_resnet50, partial(pictures, image_size=8, classes=10)), 4, 8),
    "gpt": _gpt(vocabulary=64, context=16, width=64, layers=1, batch=4),
    "gpt_bytes": _gpt(vocabulary=32, context=16, width=64, layers=1, batch=4),
    "mlp": _mlp(width=32, hidden=1, batch=16),
}


def workload_of(name: str, rehearses: bool) -> Workload:
    """The workload of that name."""
    return (REHEARSED if rehearses else WORKLOADS)[name]


def example_of(workload: Workload) -> tuple[Tensor, ...]:
    """A small batch on the CPU, where tracing and calibration take seconds."""
    inputs = workload.network.example_inputs(EXAMPLES)
    return tuple(x if x.is_floating_point() else x[:, :EXAMPLE_TOKENS] for x in inputs)


def prepared_of(workload: Workload, model: nn.Module, recompute: bool = False) -> nn.Module:
    """The model prepared with the default configuration, where it is (a CPU)."""
    return prepare(model, QATConfig(), example_of(workload), recompute=recompute)


def converted_of(workload: Workload, device: torch.device) -> nn.Module:
    """The network converted to integers, with ranges of a small batch, on the device; what stays float is bfloat16."""
    example = example_of(workload)
    prepared = prepare(workload.model().eval(), QATConfig(), example)
    calibrate(prepared, [example])
    return convert(prepared).to(device, torch.bfloat16)


class AutocastStep(TrainingStep):
    """A training step of a model, moved to the device, under autocast.

    Args:
        workload: the batch.
        model: on any device.
        device: where it trains.
        dtype: of autocast; None trains in float32.
    """

    def __init__(
        self, workload: Workload, model: nn.Module, device: torch.device, dtype: torch.dtype | None = torch.bfloat16
    ) -> None:
        inputs, targets = workload.data()
        super().__init__(model.to(device), tuple(x.to(device) for x in inputs), targets.to(device))
        self.dtype = dtype

    def forward(self) -> Tensor:
        with torch.autocast(self.targets.device.type, self.dtype, enabled=self.dtype is not None):
            return super().forward()
