"""Runs of a prepared model over batches: in evaluation, with its nodes on or off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..graph.example_run import copies, random_state_kept
from ..graph.modes import in_evaluation
from ..preparation.batches import arguments_of, iterated
from ..preparation.report import PreparationReport
from ..qat.fake_quantize_layer import FakeQuantizeLayer


def nodes_of(model: nn.Module) -> list[FakeQuantizeLayer]:
    """The fake-quantize nodes of a prepared model.

    Raises:
        ValueError: there are none.
    """
    nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    if not nodes:
        if isinstance(getattr(model, "preparation_report", None), PreparationReport):
            raise ValueError("model holds nothing to calibrate: prepare() found no layer to quantize in it")
        raise ValueError("model must be a prepared model, got one without any FakeQuantizeLayer")
    return nodes


def kept(batches: Iterable[Any]) -> Sequence[Any]:
    """The batches as a sequence, to run several times.

    Raises:
        TypeError: ``batches`` is itself a batch.
        ValueError: there are none.
    """
    several = list(iterated(batches))
    if not several:
        raise ValueError("batches must hold at least one batch, got none")
    return several


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are as before afterwards."""
    with in_evaluation(model), torch.no_grad(), random_state_kept():
        yield


def run(model: nn.Module, batch: Any) -> Any:
    """The model's result for one batch, which the model may not change.

    Raises:
        TypeError: the batch does not fit the model's forward.
    """
    args, kwargs = arguments_of(model, batch)
    return model(*copies(args), **copies(kwargs))


@contextmanager
def nodes_off(model: nn.Module) -> Iterator[None]:
    """The model in float: every node lets values pass."""
    enabled = [(node, node.fake_quantize_enabled) for node in nodes_of(model)]
    try:
        for node, _ in enabled:
            node.fake_quantize_enabled = False
        yield
    finally:
        for node, was in enabled:
            node.fake_quantize_enabled = was
