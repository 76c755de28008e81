"""Ranges of activations: what the observers see of a model that computes in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..preparation.batches import arguments_of, iterated
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.sharding import reshard
from ..qat.weight_range import searching
from .runs import evaluating, nodes_of


def measure_ranges(model: nn.Module, batches: Iterable[Any]) -> None:
    """Sets every node's scale and zero point from what its observer sees of the batches; earlier statistics are
    forgotten. The scale of a weight whose observer is switched off is held.

    Raises:
        TypeError, ValueError: as :func:`.calibrate`.
    """
    nodes = [node for node in nodes_of(model) if node.reduces_over_ranks or node.observer.enabled]
    with _calibrating(nodes), searching(nodes), evaluating(model):
        for node in nodes:
            node.observer.reset()
        seen = 0
        for batch in iterated(batches):
            args, kwargs = arguments_of(model, batch)
            model(*args, **kwargs)
            seen += 1
        if seen == 0:
            raise ValueError("batches must hold at least one batch, got none")
        reshard(model, nodes)
        for node in nodes:
            if bool(node.observer.batches > 0):
                node.update_parameters()


@contextmanager
def _calibrating(nodes: Sequence[FakeQuantizeLayer]) -> Iterator[None]:
    """The nodes with the observers that calibration uses; their own go on from what those have found."""
    own = [node.observer for node in nodes]
    for node in nodes:
        node.calibrating = True
        if node.calibration_observer is not None:
            node.observer = node.calibration_observer().to(node.scale.device)
    try:
        yield
        for node, observer in zip(nodes, own, strict=True):
            if node.observer is observer:
                continue
            if bool(node.observer.batches > 0):
                observer.start_from(*node.observer.range(node.scheme))
            else:
                observer.reset()
    finally:
        for node, observer in zip(nodes, own, strict=True):
            node.observer = observer
            node.calibrating = False
