"""The networks that ``training_step.py`` trains, and what one step is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import zoo
from zoo.data import pictures, text

# So small that the same batch a thousand times over neither learns much nor drifts into denormal gradients.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Workload:
    """A network, its batch size, both in words, and how its weights and images lie in memory."""

    network: zoo.Network
    batch: int
    title: str
    description: str
    memory_format: torch.memory_format = torch.channels_last

    def model(self) -> nn.Module:
        """The float network in training mode."""
        return self.network.make().to(memory_format=self.memory_format)

    def data(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs and targets."""
        inputs, targets = self.network.batch(self.batch)
        return tuple(x.contiguous(memory_format=self.memory_format) for x in inputs), targets


_imagenet = partial(pictures, image_size=96, classes=1000)
_text = partial(text, length=128, vocabulary=256)

WORKLOADS = {
    "resnet20": Workload(zoo.FULL_SIZE["resnet20"], 64, "ResNet-20", "64 images of 32x32"),
    "resnet18": Workload(zoo.FULL_SIZE["resnet18_cifar"], 64, "ResNet-18", "64 images of 32x32, its 3x3 stem"),
    "mobilenet_v2": Workload(
        replace(zoo.FULL_SIZE["mobilenet_v2"], batch_of=_imagenet),
        batch=16,
        title="MobileNetV2",
        description="16 images of 96x96, 1000 classes",
    ),
    "mlp": Workload(
        zoo.Network(
            partial(zoo.MLP, inputs=3 * 16 * 16, hidden=(1024, 1024), batch_norm=False),
            partial(pictures, image_size=16, classes=10),
        ),
        batch=512,
        title="MLP",
        description="512 images of 16x16, two hidden layers of 1024 with ReLU",
        memory_format=torch.contiguous_format,
    ),
    "gpt": Workload(
        replace(zoo.FULL_SIZE["gpt"], batch_of=_text),
        batch=8,
        title="GPT",
        description="8 texts of 128 tokens, 6 layers of width 384",
        memory_format=torch.contiguous_format,
    ),
}


class TrainingStep:
    """Forward, cross-entropy, backward, SGD with momentum, gradients dropped; on the same batch every time."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> None:
        self.model = model
        self.inputs = inputs
        self.targets = targets
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def forward(self) -> Tensor:
        """The loss, and with it all that is kept for backward."""
        return zoo.loss_of(self.model(*self.inputs), self.targets)

    def finish(self, loss: Tensor) -> None:
        """What follows on the forward."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.finish(self.forward())


def reason(error: Exception) -> str:
    """An error as one cell of a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
