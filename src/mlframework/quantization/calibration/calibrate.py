"""``calibrate``: statistics without training (post-training quantization)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.modes import in_evaluation
from ..preparation.batches import arguments_of, iterated
from ..preparation.report import PreparationReport
from ..qat.fake_quantize_layer import FakeQuantizeLayer


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Runs batches through the model in float, observes every node, and sets the scales from what was seen.

    Earlier statistics are forgotten. The model computes in evaluation mode, without gradients and without
    quantization; its modes are restored. Where ``torch.distributed`` runs, every rank must bring as many batches. If
    a batch fails, scales and statistics are as they were before the call.

    Args:
        model: from :func:`prepare` (or any module that holds :class:`FakeQuantizeLayer`).
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: there are no nodes in the model (it is not prepared, or nothing in it could be quantized), or no
            batches.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(16, 4) for _ in range(3)])
        >>> with torch.no_grad():
        ...     prepared.eval()(torch.randn(1, 4)).shape  # computed on integers
        torch.Size([1, 2])
    """
    layers = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    if not layers:
        if isinstance(getattr(model, "preparation_report", None), PreparationReport):
            raise ValueError("model holds nothing to calibrate: prepare() found no layer to quantize in it")
        raise ValueError("model must be a prepared model, got one without any FakeQuantizeLayer")
    with _unchanged_on_error(layers), _calibrating(model, layers), torch.no_grad():
        for layer in layers:
            layer.observer.reset()
        seen = 0
        for batch in iterated(batches):
            args, kwargs = arguments_of(model, batch)
            model(*args, **kwargs)
            seen += 1
        if seen == 0:
            raise ValueError("batches must hold at least one batch, got none")
        for layer in layers:
            if bool(layer.observer.batches > 0):
                layer.update_parameters()


@contextmanager
def _calibrating(model: nn.Module, layers: list[FakeQuantizeLayer]) -> Iterator[None]:
    for layer in layers:
        layer.calibrating = True
    try:
        with in_evaluation(model):
            yield
    finally:
        for layer in layers:
            layer.calibrating = False


@contextmanager
def _unchanged_on_error(layers: list[FakeQuantizeLayer]) -> Iterator[None]:
    saved: list[dict[str, Tensor]] = [
        {name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers
    ]
    try:
        yield
    except BaseException:  # an interruption is no reason for half a calibration either
        for layer, state in zip(layers, saved, strict=True):
            layer.load_state_dict(state)
        raise
