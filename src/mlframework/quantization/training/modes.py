"""The modes of a model while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from ..graph.modes import in_evaluation
from ..int8.folding import BATCH_NORMS
from ..qat.fake_quantize_layer import FakeQuantizeLayer


@contextmanager
def in_fine_tuning(model: nn.Module, *, regularizes: bool, batch_statistics: bool) -> Iterator[None]:
    """Nodes observe and learn; modes, and which observers run, are as before afterwards.

    Args:
        model: a prepared model.
        regularizes: training mode. Otherwise the model computes as its teacher does, in evaluation mode: dropout and
            stochastic depth would be noise that the teacher does not have.
        batch_statistics: whether batch normalization is in training mode.
    """
    nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    enabled = [node.observer.enabled for node in nodes]
    with in_evaluation(model):
        if regularizes:
            model.train()
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.train(batch_statistics)
        for node in nodes:
            node.train()
        try:
            yield
        finally:
            for node, was in zip(nodes, enabled, strict=True):
                node.observer.enabled = was


@contextmanager
def without_observers(nodes: Iterable[FakeQuantizeLayer]) -> Iterator[None]:
    """Nodes quantize and observe nothing; which observers run is as before afterwards."""
    enabled = {node: node.observer.enabled for node in nodes}
    for node in enabled:
        node.observer.enabled = False
    try:
        yield
    finally:
        for node, was in enabled.items():
            node.observer.enabled = was
