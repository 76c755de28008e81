"""Fake quantization with the straight-through estimator, and gradients of scale and zero point where they learn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import arithmetic
from ..devices import is_traced
from ..operators.declaration import records_gradients
from ..operators.fake_quantization import (
    fake_quantize,
    fake_quantize_backward,
    has_kernel,
    mask_gradient,
    operands,
)
from ..operators.snapshot import snapshot
from .function import call

# What the operator reads.
_ZERO_POINTS = (torch.float32, torch.int32, torch.int64, torch.uint8, torch.int8)


class Options(NamedTuple):
    """Of a grid and an estimator.

    Attributes:
        lowest, highest: the ends of the grid.
        axis: of the channels, non-negative, or None for one scale.
        pass_saturated: whether a gradient passes where the value saturated.
        gradient_clip: the largest magnitude of a gradient that passes.
    """

    lowest: int
    highest: int
    axis: int | None
    pass_saturated: bool
    gradient_clip: float | None


class _Reference(torch.autograd.Function):
    """PyTorch's operations alone: saves its input and recomputes the codes in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, scale: Tensor, zero_point: Tensor, *options: Any) -> Tensor:
        lowest, highest, axis = options[:3]
        values, scale, zero_point = operands(input, scale, zero_point, lowest, highest, axis)
        codes = arithmetic.unsaturated_codes(values, scale, zero_point).clamp(lowest, highest)
        return ((codes - zero_point) * scale).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, scale, zero_point, *options = inputs
        ctx.options = Options(*options)
        if not _passes_unchanged(ctx):
            ctx.save_for_backward(input, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if _passes_unchanged(ctx):
            return _clipped(gradient, ctx.options.gradient_clip), *[None] * 7
        return *_from_input(ctx, gradient), *[None] * 5


class _Compiled(torch.autograd.Function):
    """The operator: saves its input where scale or zero point learn, and otherwise a bit an element."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        code_dtype: torch.dtype | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | Tensor:
        ctx.options = Options(*options)
        ctx.learns = learns = scale.requires_grad or zero_point.requires_grad
        with_mask = not (learns or ctx.options.pass_saturated)
        values, codes, mask, _, grid = fake_quantize(
            input, scale, zero_point, *ctx.options[:3], codes=code_dtype, mask=with_mask
        )
        assert values is not None
        if learns:
            ctx.save_for_backward(input, scale, zero_point)
        elif with_mask:
            ctx.save_for_backward(mask)
            ctx.strides = values.stride()
        if code_dtype is None:
            return values
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes, grid)
        return values, codes, grid

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 9
        if ctx.learns:
            return *_from_input(ctx, gradient), *[None] * 6
        if ctx.options.pass_saturated:
            return _clipped(gradient, ctx.options.gradient_clip), *[None] * 8
        (mask,) = ctx.saved_tensors
        return mask_gradient(gradient, mask, ctx.strides, ctx.options.gradient_clip), *[None] * 8


def _passes_unchanged(ctx: Any) -> bool:
    """Whether backward needs nothing of the forward: everything passes, and only to the input."""
    return ctx.options.pass_saturated and not any(ctx.needs_input_grad[1:3])


def _clipped(gradient: Tensor, gradient_clip: float | None) -> Tensor:
    return gradient if gradient_clip is None else gradient.clamp(-gradient_clip, gradient_clip)


def _from_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    input, scale, zero_point = ctx.saved_tensors
    options: Options = ctx.options
    return fake_quantize_backward(
        gradient,
        input,
        scale,
        zero_point,
        *options[:3],
        pass_saturated=options.pass_saturated,
        gradient_clip=options.gradient_clip,
        needs=ctx.needs_input_grad[:3],
    )


def fake_quantize_with_codes(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    options: Options,
    code_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values on the grid, differentiable; and codes with their grid (:class:`.FakeQuantized`) where asked for.

    A scale or a zero point that does not require grad may be updated in place before backward runs. Without
    kernels there are no codes, which nobody would compute with.
    """
    learns = scale.requires_grad or zero_point.requires_grad
    compiled = (
        scale.dtype is torch.float32
        and zero_point.dtype in _ZERO_POINTS
        and has_kernel(input)
        and (is_traced() or forward_ad._current_level < 0)
    )
    if compiled and not (records_gradients() and (learns or input.requires_grad)):
        if torch.compiler.is_exporting():  # AOTInductor takes no operator that leaves some of its outputs out
            exported: Tensor = _Reference.forward(input, scale, zero_point, *options)
            return exported, None, None
        result = fake_quantize(input, scale, zero_point, *options[:3], codes=code_dtype)
        assert result.values is not None
        return result.values, result.codes, result.grid
    if learns or not compiled:  # backward reads them
        scale = scale if scale.requires_grad else snapshot(scale)
        zero_point = zero_point if zero_point.requires_grad else snapshot(zero_point)
    if not compiled:
        values: Tensor = _Reference.apply(input, scale, zero_point, *options)  # type: ignore[no-untyped-call]
        return values, None, None
    outputs = call(_Compiled, input, scale, zero_point, code_dtype, *options)
    return outputs if code_dtype is not None else (outputs, None, None)
