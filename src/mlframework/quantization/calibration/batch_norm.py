"""``reestimate_batch_norm``: running statistics of the quantized model, rather than of the float one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..int8.folding import BATCH_NORMS, BatchNorm
from .own_parameters import unchanged_on_error
from .runs import evaluating, kept, nodes_of, run


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replaces running means and variances by their averages over the batches, measured with quantized weights and
    activations.

    Quantization changes what a batch normalization normalizes, and most where weights have few bits; running averages
    of momentum 0.1 or 0.01 lag behind the weights, too. Every batch counts alike, and is normalized by its own
    statistics on the way, as in training: so layers see what the layers before give once these are re-estimated. All
    else is in evaluation mode: ranges, dropout. Momenta are as before. (Sun et al. 2019, "Hybrid 8-bit Floating Point
    Training and Inference"; Nagel et al. 2022, arXiv:2203.11086, section 4.3.)

    Call it last, with batches of the size of training batches: the variance of a few values is a poor estimate.

    Args:
        model: prepared, and calibrated or trained; changed in place.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Returns:
        How many layers have new statistics. Layers that no batch reaches keep theirs, and so do those that a
        :class:`QATSchedule` has frozen.

    Raises:
        TypeError: a batch does not fit the model's forward, or ``batches`` is itself a batch.
        ValueError: the model is not prepared, has no batch normalization with running statistics, or there are no
            batches. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> prepared = prepare(model, QATConfig(weight_bits=4), (torch.randn(1, 1, 8, 8),))
        >>> batches = [torch.randn(16, 1, 8, 8) for _ in range(3)]
        >>> calibrate(prepared, batches)
        >>> reestimate_batch_norm(prepared, batches)
        1
    """
    nodes_of(model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BATCH_NORMS) and module.track_running_stats and module.running_mean is not None
    ]
    if not layers:
        raise ValueError("model must have batch normalization with running statistics, got none")
    batches = kept(batches)
    with unchanged_on_error(model), evaluating(model):
        before = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
        with _averaging(layers):
            for batch in batches:
                run(model, batch)
        reached = [bool(layer.num_batches_tracked > 0) for layer in layers]  # type: ignore[operator]
        for layer, state, is_new in zip(layers, before, reached, strict=True):
            *statistics, count = state
            if not is_new:
                for buffer, value in zip(layer.buffers(), statistics, strict=False):
                    buffer.copy_(value)
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.copy_(count)
    return sum(reached)


@contextmanager
def _averaging(layers: list[BatchNorm]) -> Iterator[None]:
    """Training mode for these layers alone, with statistics that are averages from now on."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # by which PyTorch means the average of all batches
            layer.training = True
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.training = False
