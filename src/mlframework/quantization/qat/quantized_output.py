"""What follows a product in training, in one step: batch normalization, a clip, observation and fake quantization.

One mask, a bit to a value, says for all of them whether a gradient passes. Each function here returns None where the
model's modules have to do it one after the other: without compiled kernels, with hooks that would not fire, with
learned scales, or where the node has yet to see data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..graph.hooks import is_watched
from ..int8.lookup import Lookup
from .activation_observer import BatchStatistics
from .attached_codes import attach_codes
from .batch_norms import plain_batch_norm
from .fake_quantize_layer import FakeQuantizeLayer
from .integer_product import IntegerProduct
from .layer_types import Clip
from .native_function import apply_of, refuse_gradient_of_gradient


class _NormalizeAndQuantize(torch.autograd.Function):
    """Saves the product's output, or what computes it again, and a mask."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse_deviation: Tensor,
        clip: Clip,
        node: FakeQuantizeLayer,
        recomputed: IntegerProduct | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        grid = node.scale, node.zero_point, node.scheme
        result = kernels.normalize(
            input, mean, inverse_deviation, weight, bias, clip, *grid, codes=node.serves_integers
        )
        kept: tuple[Tensor | None, ...] = (input,)
        ctx.convolves = None
        if recomputed is not None:
            kept = (recomputed.product.packed, recomputed.codes, recomputed.addend)
            ctx.convolves = recomputed.product.convolves
        ctx.save_for_backward(result.mask, mean, inverse_deviation, weight, *kept)
        ctx.gradient_clip = node.estimator.gradient_clip
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        if result.codes is not None:
            ctx.mark_non_differentiable(result.codes)
        ctx.mark_non_differentiable(result.extremes)
        return result.values, result.codes, result.extremes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 8
        mask, mean, inverse_deviation, weight, *kept = ctx.saved_tensors
        values = kept[0] if ctx.convolves is None else _computed_again(ctx.convolves, *kept)
        to_input, to_weight, to_bias = kernels.normalize_backward(
            gradient, mask, values, mean, inverse_deviation, weight, ctx.gradient_clip
        )
        return to_input, None if weight is None else to_weight, to_bias if ctx.has_bias else None, *[None] * 5


def _computed_again(convolves: bool, packed: Tensor, codes: Tensor, addend: Tensor | None) -> Tensor:
    output = kernels.TrainingProduct(packed, convolves)(codes)
    return output if addend is None else output + addend


class _ClipAndQuantize(torch.autograd.Function):
    """Of a tensor, or of the sum of two; saves a mask alone."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, addend: Tensor | None, clip: Clip, node: FakeQuantizeLayer, observes: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        scheme = node.scheme
        result = kernels.fake_quantize(
            input,
            node.scale,
            node.zero_point,
            scheme.quant_min,
            scheme.quant_max,
            None,
            addend=addend,
            clip=clip,
            codes=scheme.dtype if node.serves_integers else None,
            mask=True,
            extremes=observes,
        )
        assert result.values is not None
        ctx.save_for_backward(result.mask)
        ctx.strides = result.values.stride()
        ctx.gradient_clip = node.estimator.gradient_clip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (result.codes, result.extremes) if each is not None))
        return result.values, result.codes, result.extremes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 5
        (mask,) = ctx.saved_tensors
        passed = kernels.mask_gradient(gradient, mask, ctx.strides, ctx.gradient_clip)
        return passed, passed if ctx.needs_input_grad[1] else None, None, None, None


class _LookUp(torch.autograd.Function):
    """Saves the codes of its input, and for each of 256 the slope."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, table: Tensor, slopes: Tensor, node: FakeQuantizeLayer
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(codes, slopes)
        ctx.gradient_clip = node.estimator.gradient_clip
        ctx.set_materialize_grads(False)
        results = kernels.lookup(codes, table)
        ctx.mark_non_differentiable(results)
        return kernels.dequantize(results, node.scale, node.zero_point, None), results

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 5
        codes, slopes = ctx.saved_tensors
        return kernels.lookup_gradient(gradient, codes, slopes, ctx.gradient_clip), None, None, None, None


_normalize_and_quantize = apply_of(_NormalizeAndQuantize)
_clip_and_quantize = apply_of(_ClipAndQuantize)
_look_up = apply_of(_LookUp)


def normalized_and_quantized(
    product: IntegerProduct | None,
    input: Tensor,
    batch_norm: nn.Module,
    activation: nn.Module | None,
    clip: Clip,
    node: FakeQuantizeLayer,
) -> Tensor | None:
    """Batch normalization in training mode with what follows it, or None.

    Args:
        product: what computes ``input`` again in backward; None to keep ``input`` itself.
        input: (N, C, *size), float32.
        batch_norm: statistics are those of this batch; running statistics are updated.
        activation: the module that clips to ``clip``, if any.
        node: quantizes the result.
    """
    if not kernels.can_normalize(input) or input.numel() <= input.shape[1]:
        return None
    if is_watched(batch_norm, activation) or not _fuses(node):
        return None
    plain = plain_batch_norm(batch_norm)
    if not isinstance(plain, (nn.BatchNorm1d, nn.BatchNorm2d)) or not (plain.training and plain.track_running_stats):
        return None
    state = plain.weight, plain.bias, plain.running_mean, plain.running_var
    if not all(each is None or (each.dtype is torch.float32 and each.is_contiguous()) for each in state):
        return None
    mean, inverse_deviation = kernels.batch_statistics(
        input.detach(), plain.running_mean, plain.running_var, _momentum(plain), plain.eps
    )
    values, codes, extremes = _normalize_and_quantize(
        input, plain.weight, plain.bias, mean, inverse_deviation, clip, node, product
    )
    return _observed(node, values, codes, extremes)


def clipped_and_quantized(
    input: Tensor, addend: Tensor | None, activation: nn.Module | None, clip: Clip, node: FakeQuantizeLayer
) -> Tensor | None:
    """A tensor (plus another one of its shape), clipped and quantized, or None."""
    if not kernels.use_native(input) or input.numel() == 0 or is_watched(activation) or not _fuses(node):
        return None
    if input.dtype is not torch.float32 or (
        addend is not None and (addend.shape != input.shape or addend.dtype != input.dtype)
    ):
        return None
    values, codes, extremes = _clip_and_quantize(input, addend, clip, node, node.observes)
    return _observed(node, values, codes, extremes)


def looked_up(input: Tensor, source: FakeQuantizeLayer, operation: Lookup, node: FakeQuantizeLayer) -> Tensor | None:
    """A function of each value on the grid of ``source``, quantized by ``node``: from a table, or None."""
    if (
        not kernels.use_native(input)
        or input.numel() == 0
        or is_watched(source, *operation.modules())
        or not _fuses(node)
    ):
        return None
    codes = source.codes_on_grid(input) if input.dtype is torch.float32 else None
    if codes is None or codes.scale.numel() > 1:
        return None
    results, slopes = operation.values_and_slopes(arithmetic.grid_values(codes.scale, codes.zero_point, source.scheme))
    table = kernels.fake_quantize(
        results,
        node.scale,
        node.zero_point,
        node.scheme.quant_min,
        node.scheme.quant_max,
        None,
        codes=node.scheme.dtype,
        mask=True,
    )
    if table.codes is None or table.mask is None:
        return None
    slopes = kernels.mask_gradient(slopes, table.mask, (1,))
    values, result_codes = _look_up(input, codes.codes, table.codes, slopes, node)
    extremes = None
    if node.observes:
        extremes = kernels.extremes(results[kernels.occurring(codes.codes).bool()], None)
    return _observed(node, values, result_codes, extremes)


def _fuses(node: FakeQuantizeLayer) -> bool:
    """Whether a node only observes extremes and quantizes, with parameters that stay as they are in this forward."""
    if (
        type(node) is not FakeQuantizeLayer
        or is_watched(node)
        or node.learnable
        or node.estimator.saturated != "zero"
        or node.layer is not None
    ):
        return False
    if not node.quantizes or node.scheme.channel_axis is not None:
        return False
    return not node.is_observed or (node.synchronizer is not None and node.observer.measures_extremes)


def _observed(node: FakeQuantizeLayer, values: Tensor, codes: Tensor | None, extremes: Tensor | None) -> Tensor:
    if node.observes and node.synchronizer is not None and extremes is not None:
        node.synchronizer.defer(node.synchronizer_index, BatchStatistics(extremes))
    if codes is not None and node.serves_integers:
        attach_codes(values, codes, node.scale, node.zero_point, node.scheme)
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
