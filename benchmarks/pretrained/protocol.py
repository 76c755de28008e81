"""What the bench knows of a network: the float model, its data in three parts, how it is trained and judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .metrics import signal_to_noise

Inputs = tuple[Tensor, ...]
Model = Callable[..., Any]

SIGNAL_TO_NOISE = "signal to noise, dB"


class Batch(NamedTuple):
    """Positional arguments of a network, and the labels of the task where it has some."""

    inputs: Inputs
    targets: Tensor | None = None


class Study(ABC):
    """A float network with training, calibration and test data that have no sample in common.

    Everything is the same for the same seed, on every call. Of every metric more is better; each is ``1``, infinite or
    the task's own figure for the float model itself.

    Args:
        seed: of the split and of the float network, where there is one for each (the digits).

    Attributes:
        name: as the command line knows it.
        title: as a table shows it.
        metrics: the keys of what :meth:`evaluate` returns; the first is the headline.
        learning_rate: of Adam, for fine-tuning the float weights under quantization of few bits.
        training_seconds: how long every method may train, in seconds of processor time.
        trained_widths: those at which methods that train are run: where post-training quantization loses something.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    learning_rate: ClassVar[float]
    training_seconds: ClassVar[float]
    trained_widths: ClassVar[tuple[str, ...]] = ("W4A8", "W4A4")

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh copy of the float network, in evaluation mode."""

    @abstractmethod
    def calibration_batches(self) -> list[Inputs]:
        """A few batches for post-training quantization, without labels."""

    @abstractmethod
    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Batches to train on, without end."""

    @abstractmethod
    def test_batches(self) -> list[Batch]:
        """What the network is judged on."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        """A scalar to minimize: the distance to the float network's outputs, or the task's loss without a teacher.

        Raises:
            ValueError: without a teacher, where the data have no labels.
        """

    @abstractmethod
    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The metrics but the signal-to-noise ratio, from the outputs for :meth:`test_batches` and the float ones."""

    def logits(self, outputs: Any) -> Tensor:
        """Of a network's outputs, the tensor whose signal-to-noise ratio counts."""
        assert isinstance(outputs, Tensor)
        return outputs

    @property
    def example_inputs(self) -> Inputs:
        """Arguments of one call, for a batch of two."""
        return tuple(input[:2] for input in self.calibration_batches()[0])

    @cached_property
    def float_outputs(self) -> list[Any]:
        """What the float network makes of the test batches."""
        return self.outputs(self.model())

    def outputs(self, model: Model) -> list[Any]:
        """What a model (or any callable) makes of the test batches, in the mode that it is in, without gradients."""
        with torch.no_grad():
            return [model(*batch.inputs) for batch in self.test_batches()]

    def evaluate(self, model: Model) -> dict[str, float]:
        """The metrics of a model or of any callable that takes the network's arguments."""
        outputs = self.outputs(model)
        ratio = signal_to_noise(map(self.logits, self.float_outputs), map(self.logits, outputs))
        return {**self.score(outputs, self.float_outputs), SIGNAL_TO_NOISE: ratio}
