"""What follows a product in training, in one step: batch normalization, a clip, observation and fake quantization.

Each function here returns None where the model's modules have to do it one after the other: with hooks that would not
fire, or where the node has yet to see data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..graph.hooks import is_watched
from ..int8.lookup import Lookup
from ..kernels.differentiable.following import Grid, clip_and_quantize, look_up_and_quantize, normalize_and_quantize
from ..kernels.differentiable.layer import Codes, Computation
from ..kernels.operators.fake_quantization import mask_gradient
from ..kernels.operators.normalization import batch_statistics, frozen_statistics, lies_in_rows
from .activation_observer import BatchStatistics
from .attached_codes import Way, attach_codes, attached_codes
from .batch_norms import freeze_if_scheduled, plain_batch_norm, use_running_statistics
from .fake_quantize_layer import FakeQuantizeLayer
from .layer_types import Clip


def normalized_and_quantized(
    input: Tensor,
    computation: Computation | None,
    addend: Tensor | None,
    batch_norm: nn.Module,
    activation: nn.Module | None,
    clip: Clip,
    node: FakeQuantizeLayer,
) -> Tensor | None:
    """Batch normalization with what follows it, or None.

    Args:
        input: (N, C, *size).
        computation: what computes ``input`` again in backward, with ``addend`` added; None to keep ``input`` itself.
        batch_norm: in training mode, statistics are those of this batch, and running statistics are updated; otherwise
            these normalize.
        activation: the module that clips to ``clip``, if any.
        node: quantizes the result.
    """
    if not kernels.fuses(input) or not lies_in_rows(input) or input.numel() <= input.shape[1]:
        return None
    if is_watched(activation) or is_watched(batch_norm, but_for=use_running_statistics) or not _fuses(node):
        return None
    plain = plain_batch_norm(batch_norm)
    if not isinstance(plain, (nn.BatchNorm1d, nn.BatchNorm2d)) or not plain.track_running_stats:
        return None
    freeze_if_scheduled(plain)
    mean, variance = plain.running_mean, plain.running_var
    state = plain.weight, plain.bias, mean, variance
    if not all(each is None or (each.dtype is torch.float32 and each.is_contiguous()) for each in state):
        return None
    if plain.training:
        statistics = batch_statistics(input.detach(), mean, variance, _momentum(plain), plain.eps)
    elif mean is not None and variance is not None:
        statistics = frozen_statistics(mean, variance, plain.eps)
    else:
        return None
    numbers = plain.weight, plain.bias, statistics, clip, _grid(node), computation, addend
    return _observed(node, *normalize_and_quantize(input, *numbers, is_frozen=not plain.training))


def clipped_and_quantized(
    input: Tensor, addend: Tensor | None, activation: nn.Module | None, clip: Clip, node: FakeQuantizeLayer
) -> Tensor | None:
    """A tensor (plus another one of its shape), clipped and quantized, or None."""
    if not kernels.fuses(input) or is_watched(activation) or not _fuses(node):
        return None
    if addend is not None and (addend.shape != input.shape or addend.dtype != input.dtype):
        return None
    grid = _grid(node)
    kept = (None, None) if not grid.learns else (_kept_codes(input), None if addend is None else _kept_codes(addend))
    return _observed(node, *clip_and_quantize(input, addend, clip, grid, node.observes, kept))


def looked_up(
    input: Tensor, source: FakeQuantizeLayer, operation: Lookup, node: FakeQuantizeLayer, way: Way
) -> Tensor | None:
    """A function of each value on the grid of ``source``, quantized by ``node``: from a table, or None.

    ``way`` is how the input came here.
    """
    if not kernels.fuses(input) or is_watched(source, *operation.modules()) or not _fuses(node) or node.learnable:
        return None
    if kernels.is_traced():  # which takes no derivative of the function on the way
        return None
    if source.scheme.channel_axis is not None:
        return None
    codes = source.codes_on_grid(input, way)
    results, slopes = operation.values_and_slopes(arithmetic.grid_values(codes.grid[0], codes.grid[1], source.scheme))
    is_present = kernels.occurring(codes.codes).bool()
    table = kernels.fake_quantize(
        results.nan_to_num(nan=0.0),
        node.scale,
        node.zero_point,
        node.scheme.quant_min,
        node.scheme.quant_max,
        None,
        codes=node.scheme.dtype,
        mask=True,
    )
    assert table.codes is not None and table.mask is not None and table.grid is not None
    # A function may have no value at codes that do not occur; at one that does, nothing of the result is a number.
    grid = table.grid
    grid[0].masked_fill_((is_present & results.isnan()).any(), torch.nan)
    slopes = mask_gradient(slopes, table.mask, (1,))
    values, result_codes = look_up_and_quantize(
        input, codes.codes, table.codes, slopes, grid, node.estimator.gradient_clip
    )
    extremes = None
    if node.observes:
        lowest = torch.where(is_present, results, torch.inf)
        highest = torch.where(is_present, results, -torch.inf)
        both = torch.stack([-lowest.min(), highest.max()]).reshape(2, 1)
        extremes = torch.where(torch.isfinite(both), both, -torch.inf)
    return _observed(node, values, result_codes, grid, extremes)


def _kept_codes(values: Tensor) -> Codes | None:
    """The codes beside values that say the same: those of half precision are rounded once more."""
    return attached_codes(values, None) if values.dtype is torch.float32 else None


def _grid(node: FakeQuantizeLayer) -> Grid:
    return Grid(node.scale, node.zero_point, node.scheme, node.serves_integers, node.estimator.gradient_clip)


def _fuses(node: FakeQuantizeLayer) -> bool:
    """Whether a node only observes extremes and quantizes, with parameters that stay as they are in this forward."""
    if (
        type(node) is not FakeQuantizeLayer
        or is_watched(node)
        or node.estimator.saturated != "zero"
        or node.layer is not None
    ):
        return False
    if not node.quantizes or node.scheme.channel_axis is not None:
        return False
    return not node.is_observed or (node.synchronizer is not None and node.observer.measures_extremes)


def _observed(
    node: FakeQuantizeLayer, values: Tensor, codes: Tensor | None, grid: Tensor | None, extremes: Tensor | None
) -> Tensor:
    if node.observes and node.synchronizer is not None and extremes is not None:
        node.synchronizer.defer(node.synchronizer_index, BatchStatistics(extremes))
    if codes is not None and grid is not None and node.serves_integers:
        return attach_codes(values, codes, grid)
    return values


def _momentum(batch_norm: nn.BatchNorm1d | nn.BatchNorm2d) -> float:
    """Counts the batch; what it counts for among those before it."""
    momentum = batch_norm.momentum
    if batch_norm.num_batches_tracked is not None:
        batch_norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            momentum = 1.0 / float(batch_norm.num_batches_tracked)
    return 0.0 if momentum is None else momentum


def any_dropout_is_active(dropouts: Sequence[nn.Module]) -> bool:
    """Whether any of these changes values now: in training, unless its probability is known to be 0."""
    return any(module.training and getattr(module, "p", None) != 0 for module in dropouts)
