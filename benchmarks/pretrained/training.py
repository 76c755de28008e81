"""Training with the float network as the teacher, within a budget that is the same for every library."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .methods import Task

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def learning_rate(task: Task) -> float:
    """Of weights, in any library: a fifth at eight bits, where little is to be repaired and much can be lost."""
    return task.study.learning_rate * (0.2 if task.width == (8, 8) else 1.0)


def scale_learning_rate(task: Task) -> float:
    """Of learned scales, in any library: a scale halves with every bit of the activations, and Adam's steps do not."""
    return learning_rate(task) * min(1.0, 2.0 ** (4 - task.width.activation_bits))


def distill(
    model: nn.Module,
    task: Task,
    parameters: Groups | None = None,
    after_step: Callable[[int, float], object] = lambda step, progress: None,
) -> int:
    """Trains in place with Adam, whose learning rate falls to zero along a cosine, and returns the number of steps.

    The model trains in the mode that it is in. The budget is of processor time, so that what else the machine does
    costs no method a step.

    Args:
        model: as its library makes it for training.
        task: the network, the teacher, the batches and the loss; the seed of the batches and of whatever draws; and
            the budget, the teacher's passes included.
        parameters: what the optimizer trains; all parameters of the model where not given.
        after_step: is called with the number of steps taken and the part of the budget that is spent.
    """
    study = task.study
    teacher = study.model()
    optimizer = torch.optim.Adam(model.parameters() if parameters is None else parameters, lr=learning_rate(task))
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = study.train_batches(task.seed)
    steps, progress, started = 0, 0.0, time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        while progress < 1:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            batch = next(batches)
            with torch.no_grad():
                goal = teacher(*batch.inputs)
            loss = study.loss(model(*batch.inputs), batch, goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            progress = (time.process_time() - started) / task.seconds
            after_step(steps, progress)
    return steps
