"""What follows a product in training, in one step: batch normalization, a clip, observation and fake quantization.

One mask, a bit to a value, says for all of them whether a gradient passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scheme import QuantizationScheme
from ..operators.codes import dequantize, lookup, lookup_gradient
from ..operators.fake_quantization import Clip, fake_quantize, mask_gradient
from ..operators.learned_grids import Summand, learned_clip_backward, learned_normalize_backward
from ..operators.normalization import normalize, normalize_backward
from .function import call, refuse_gradient_of_gradient
from .layer import Codes, Computation


class Grid(NamedTuple):
    """Of what is quantized, per tensor.

    Attributes:
        codes: whether codes are asked for.
        gradient_clip: the largest magnitude of a gradient that passes.
    """

    scale: Tensor
    zero_point: Tensor
    scheme: QuantizationScheme
    codes: bool
    gradient_clip: float | None

    @property
    def learns(self) -> bool:
        """Whether scale or zero point require grad."""
        return self.scale.requires_grad or self.zero_point.requires_grad


class Quantized(NamedTuple):
    """Values on the grid; codes, with their own grid (:class:`.FakeQuantized`), and extremes where asked for."""

    values: Tensor
    codes: Tensor | None
    grid: Tensor | None
    extremes: Tensor | None


class _Normalize(torch.autograd.Function):
    """Saves its input, or what computes it again, and a mask. Scale and zero point are those of ``grid``, which may
    require grad."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse_deviation: Tensor,
        clip: Clip,
        grid: Grid,
        computation: Computation | None,
        addend: Tensor | None,
        is_frozen: bool,
        scale: Tensor,
        zero_point: Tensor,
    ) -> tuple[Tensor | None, ...]:
        values, codes, mask, extremes, own_grid = normalize(
            input, mean, inverse_deviation, weight, bias, clip, scale, zero_point, grid.scheme, codes=grid.codes
        )
        ctx.learned = (clip, grid.scheme) if grid.learns else None
        learned = (bias, scale, zero_point) if grid.learns else ()
        kept: tuple[Tensor | None, ...] = (input,)
        ctx.computed = None
        if computation is not None:
            kept = (*computation[:5], addend)
            ctx.computed = computation[5:]
        ctx.save_for_backward(mask, mean, inverse_deviation, weight, *learned, *kept)
        ctx.gradient_clip = grid.gradient_clip
        ctx.has_bias = bias is not None
        ctx.is_frozen = is_frozen
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (codes, own_grid, extremes) if each is not None))
        return values, codes, own_grid, extremes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 12
        mask, mean, inverse_deviation, weight, *kept = ctx.saved_tensors
        if ctx.learned is not None:
            bias, scale, zero_point, *kept = kept
        if ctx.computed is None:
            (values,) = kept
        else:
            *tensors, addend = kept
            values = Computation(*tensors, *ctx.computed)()
            values = values if addend is None else values + addend
        to_scale = to_zero_point = None
        if ctx.learned is None:
            to_input, to_weight, to_bias = normalize_backward(
                gradient, mask, values, mean, inverse_deviation, weight, ctx.gradient_clip, is_frozen=ctx.is_frozen
            )
        else:
            clip, scheme = ctx.learned
            affine = mean, inverse_deviation, weight, bias
            grid = scale, zero_point, scheme
            to_input, to_weight, to_bias, *to_grid = learned_normalize_backward(
                gradient, mask, values, *affine, clip, *grid, ctx.gradient_clip, is_frozen=ctx.is_frozen
            )
            to_scale, to_zero_point = _needed(to_grid, ctx.needs_input_grad[-2:])
        to_affine = None if weight is None else to_weight, to_bias if ctx.has_bias else None
        return to_input, *to_affine, *[None] * 7, to_scale, to_zero_point


class _Clip(torch.autograd.Function):
    """Of a tensor, or of the sum of two; saves a mask and, where scale or zero point learn, its operands: as codes
    where there are some, a byte to a value."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        addend: Tensor | None,
        operands: tuple[Codes | None, Codes | None],
        clip: Clip,
        grid: Grid,
        observes: bool,
        scale: Tensor,
        zero_point: Tensor,
    ) -> tuple[Tensor | None, ...]:
        scheme = grid.scheme
        result = fake_quantize(
            input,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            None,
            addend=addend,
            clip=clip,
            codes=scheme.dtype if grid.codes else None,
            mask=True,
            extremes=observes,
        )
        values, codes, mask, extremes, own_grid = result
        assert values is not None
        ctx.learned = ctx.has_addend = None
        if grid.learns:
            ctx.learned = clip, scheme
            ctx.has_addend = addend is not None
            left = (input, None) if operands[0] is None else operands[0]
            right = (addend, None) if operands[1] is None else operands[1]
            ctx.save_for_backward(mask, *left, *right, scale, zero_point)
        else:
            ctx.save_for_backward(mask)
        ctx.strides = values.stride()
        ctx.gradient_clip = grid.gradient_clip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (codes, own_grid, extremes) if each is not None))
        return values, codes, own_grid, extremes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 8
        mask, *kept = ctx.saved_tensors
        to_scale = to_zero_point = None
        if ctx.learned is None:
            passed = mask_gradient(gradient, mask, ctx.strides, ctx.gradient_clip)
        else:
            clip, scheme = ctx.learned
            scale, zero_point = kept[4:]
            summands = Summand(*kept[:2]), Summand(*kept[2:4]) if ctx.has_addend else None
            passed, *to_grid = learned_clip_backward(
                gradient, mask, *summands, clip, scale, zero_point, scheme, ctx.gradient_clip
            )
            to_scale, to_zero_point = _needed(to_grid, ctx.needs_input_grad[-2:])
        return passed, passed if ctx.needs_input_grad[1] else None, *[None] * 4, to_scale, to_zero_point


def _needed(gradients: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


class _LookUp(torch.autograd.Function):
    """Saves the codes of its input, and for each of 256 the slope."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, table: Tensor, slopes: Tensor, grid: Tensor, gradient_clip: float | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(codes, slopes)
        ctx.gradient_clip = gradient_clip
        ctx.set_materialize_grads(False)
        results: Tensor = lookup(codes, table)
        ctx.mark_non_differentiable(results)
        return dequantize(results, grid[0], grid[1], None, input.dtype), results

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 6
        codes, slopes = ctx.saved_tensors
        return lookup_gradient(gradient, codes, slopes, ctx.gradient_clip), *[None] * 5


def normalize_and_quantize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    clip: Clip,
    grid: Grid,
    computation: Computation | None,
    addend: Tensor | None,
    *,
    is_frozen: bool,
) -> Quantized:
    """Batch normalization by the statistics of :func:`.batch_statistics` or, where they are frozen, of
    :func:`.frozen_statistics`, a clip, and fake quantization.

    Args:
        input: (N, C, *size), its channels innermost in memory.
        weight, bias: (C,).
        computation: what computes ``input`` again in backward, with ``addend`` added; None to keep ``input`` itself.
    """
    numbers = grid.scale, grid.zero_point
    options = clip, grid, computation, addend, is_frozen
    return Quantized(*call(_Normalize, input, weight, bias, *statistics, *options, *numbers))


def clip_and_quantize(
    input: Tensor,
    addend: Tensor | None,
    clip: Clip,
    grid: Grid,
    observes: bool,
    operands: tuple[Codes | None, Codes | None] = (None, None),
) -> Quantized:
    """A tensor (plus another of its shape), clipped and quantized.

    Args:
        operands: the codes of both, to keep for the gradients of a grid that learns; None for what has none.
    """
    return Quantized(*call(_Clip, input, addend, operands, clip, grid, observes, grid.scale, grid.zero_point))


def look_up_and_quantize(
    input: Tensor, codes: Tensor, table: Tensor, slopes: Tensor, grid: Tensor, gradient_clip: float | None
) -> tuple[Tensor, Tensor]:
    """A function of each value from a table of codes, whose ``grid`` is float32 (2, 1); the values, and their codes.

    Args:
        input: the values that ``codes`` stand for.
        slopes: of the function at the 256 codes, 0 where no gradient passes.
    """
    values, results = call(_LookUp, input, codes, table, slopes, grid, gradient_clip)
    return values, results
