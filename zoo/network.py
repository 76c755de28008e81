"""What the zoo knows of a network: how to make it, what to feed it, how to train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Batch

# Apart from the seeds of the examples, so that no network is tried on what it was trained with.
_FIRST_TRAINING_SEED = 1_000_000


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        constructor: makes it, with fresh weights from the global random state.
        batch_of: makes a batch from a size and a seed.
        fully_integer: whether every layer of it is to run on integers.
    """

    constructor: Callable[[], nn.Module]
    batch_of: Callable[[int, int], Batch]
    fully_integer: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """The network with weights from a seed, in training mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.constructor()

    def batch(self, size: int, seed: int = 0) -> Batch:
        """Inputs and targets, the same ones for the same arguments."""
        return self.batch_of(size, seed)

    def example_inputs(self, size: int, seed: int = 0) -> tuple[Tensor, ...]:
        """The positional arguments of a call."""
        return self.batch(size, seed).inputs


def logits_of(output: Any) -> Tensor:
    """A network's result as a tensor: classes along axis 1 or, for text, along the last."""
    return output if isinstance(output, Tensor) else output.logits


def loss_of(output: Any, targets: Tensor) -> Tensor:
    """The cross-entropy of a network's result."""
    logits = logits_of(output)
    if logits.dim() == 3:
        logits = logits.transpose(1, 2)
    return F.cross_entropy(logits, targets)


def train_steps(
    model: nn.Module, network: Network, steps: int, seed: int = 0, batch_size: int = 32, learning_rate: float = 3e-3
) -> list[float]:
    """Takes steps of AdamW over fresh batches, in training mode; returns the loss of every step.

    The model may be the network itself, a prepared one or a compiled one. The same seed gives the same steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            inputs, targets = network.batch(batch_size, _FIRST_TRAINING_SEED * (seed + 1) + step)
            loss = loss_of(model(*inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses
