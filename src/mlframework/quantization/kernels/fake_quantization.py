"""What training asks of a tensor that is rounded to the grid: one reading of it forward, and one backward.

Compiled where that is possible, and by the formulas of :mod:`.arithmetic` everywhere: with the same results, bit for
bit but for sums over many elements. Forward functions are not differentiable: who calls them
(``qat/fake_quantize_operation.py``) passes gradients on with the backward ones.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arithmetic
from .native import operators, use_native

UNBOUNDED = (-math.inf, math.inf)


class FakeQuantized(NamedTuple):
    """What :func:`fake_quantize` gives; None for what was not asked for.

    ``values`` and ``codes`` lie in memory as a dense input does, and ``mask`` is in that order: the element that
    comes i-th in memory has bit ``i % 8`` of byte ``i // 8``, and what is left of the last byte is zero. Where every
    gradient passes, as for weights on a grid that was made for them, the mask is empty.
    """

    values: Tensor | None
    codes: Tensor | None
    mask: Tensor | None
    extremes: Tensor | None


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    *,
    addend: Tensor | None = None,
    clip: tuple[float, float] = UNBOUNDED,
    values: bool = True,
    codes: torch.dtype | None = None,
    mask: bool = False,
    extremes: bool = False,
) -> FakeQuantized:
    r"""Rounds :math:`v = \mathrm{clip}(x + a)` to the grid.

    .. math:: q = \mathrm{rne}(v / s) + z,\qquad c = \mathrm{clamp}(q,\ q_{min},\ q_{max}),\qquad y = (c - z)\, s

    NaN stays NaN. Half precision computes in float32.

    Args:
        input: floating-point tensor of any shape and layout.
        scale: (1,), or (C,) along ``axis``.
        zero_point: the shape of ``scale``; a fractional one is rounded half to even, onto the grid.
        lowest, highest: the ends of the grid.
        axis: non-negative, or None for one scale.
        addend: added first; shape and dtype of ``input``.
        clip: the range of an activation that only clips; infinite ends clip nothing.
        values: whether to return y, in the dtype of ``input``.
        codes: the dtype to return c in, uint8 or int8. There are none where a v is NaN, which has no code.
        mask: whether to return where the gradient passes: :math:`q_{min} \le q \le q_{max}`, and x + a strictly
            within ``clip``.
        extremes: whether to return the extremes of v, as :func:`extremes` does.
    """
    if is_native(input, scale, zero_point) and (addend is None or use_native(addend)):
        return FakeQuantized._make(
            native_fake_quantize(
                _plain(input),
                _plain(scale),
                _plain(zero_point),
                lowest,
                highest,
                axis,
                None if addend is None else _plain(addend),
                clip,
                values,
                codes,
                mask,
                extremes,
            )
        )
    with torch.no_grad():
        return _fake_quantize(
            input, scale, zero_point, lowest, highest, axis, addend, clip, values, codes, mask, extremes
        )


def native_fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    addend: Tensor | None = None,
    clip: tuple[float, float] = UNBOUNDED,
    values: bool = True,
    codes: torch.dtype | None = None,
    mask: bool = False,
    extremes: bool = False,
) -> Any:
    """:func:`fake_quantize` by the compiled kernels, of tensors that they take and that autograd does not record."""
    axis = -1 if axis is None else axis
    return operators["fake_quantize"](
        input, addend, scale, zero_point, lowest, highest, axis, *clip, values, mask, extremes, codes
    )


def is_native(input: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether the compiled kernels take these."""
    return (
        input.dtype in _NATIVE_INPUTS
        and scale.dtype is torch.float32
        and zero_point.dtype in _NATIVE_ZERO_POINTS
        and use_native(input)
    )


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its history, for operators that autograd does not know."""
    return tensor.detach() if tensor.requires_grad else tensor


_NATIVE_INPUTS = (torch.float32, torch.bfloat16)
_NATIVE_ZERO_POINTS = (torch.float32, torch.int32, torch.int64, torch.uint8, torch.int8)


def _fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    addend: Tensor | None,
    clip: tuple[float, float],
    values: bool,
    codes: torch.dtype | None,
    mask: bool,
    extremes: bool,
) -> FakeQuantized:
    number, step, offset = operands(_dense(input), scale, zero_point, lowest, highest, axis)
    unclipped = number if addend is None else number + addend.to(number.dtype)
    number = unclipped if clip == UNBOUNDED else unclipped.clamp(*clip)
    unsaturated = arithmetic.unsaturated_codes(number, step, offset)
    saturated = unsaturated.clamp(lowest, highest)
    inside = (unsaturated >= lowest) & (unsaturated <= highest) & (unclipped > clip[0]) & (unclipped < clip[1])
    return FakeQuantized(
        ((saturated - offset) * step).to(input.dtype) if values else None,
        saturated.to(codes) if codes is not None and not bool(number.isnan().any()) else None,
        _packed_if_needed(inside) if mask else None,
        _extremes(number, axis) if extremes else None,
    )


def operands(
    input: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, scale and (rounded) zero point in the dtype of the computation, ready to broadcast."""
    dtype = arithmetic.compute_dtype(input)
    codes = torch.round(zero_point.to(dtype)).clamp(lowest, highest)
    return (
        input.to(dtype),
        arithmetic.along_axis(scale.to(dtype), input.dim(), axis),
        arithmetic.along_axis(codes, input.dim(), axis),
    )


def mask_gradient(
    gradient: Tensor, mask: Tensor, strides: tuple[int, ...], gradient_clip: float | None = None
) -> Tensor:
    """The gradient where the mask's bit is set, and 0 elsewhere, even if it is NaN or infinite there.

    Differentiable in ``gradient``, as backward is asked to be for a gradient of a gradient.

    Args:
        gradient: of any layout.
        mask: what :func:`fake_quantize` returned for a tensor of this shape.
        strides: of what :func:`fake_quantize` returned: the layout of the mask, and of what it is applied to.
        gradient_clip: the largest magnitude that passes.
    """
    passes_all = mask.numel() == 0
    if not passes_all and gradient.dtype in _NATIVE_INPUTS and not _is_recorded(gradient) and use_native(gradient):
        largest = None if gradient_clip is None else _representable(gradient_clip, gradient.dtype)
        masked: Tensor = operators["mask_gradient"](gradient, mask, strides, largest)
        return masked
    if gradient_clip is not None:
        gradient = gradient.clamp(-gradient_clip, gradient_clip)
    return gradient if passes_all else torch.where(unpack_mask(mask, gradient.shape, strides), gradient, 0.0)


def fake_quantize_backward(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    *,
    pass_saturated: bool,
    gradient_clip: float | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    r"""Gradients of the input, the scale and the zero point of :func:`fake_quantize`, from its input.

    With the gradient clipped, and :math:`g = 1 / \sqrt{N q_{max}}` where N elements share a scale:

    - input: the gradient, where the mask of :func:`fake_quantize` is set, or everywhere (``pass_saturated``).
    - scale: the sum of :math:`g\,(\mathrm{rne}(x / s) - x / s)` inside the grid and of :math:`g\,(c - z)` outside,
      times the gradient (LSQ, equations 3 and 4).
    - zero point: the sum of :math:`-g\,s`, times the gradient, where the value saturated (LSQ+, section 3.2).

    The formulas are differentiable themselves where autograd records. Sums of the compiled kernels are of floats and,
    above 32 of them, of doubles, in an order that does not depend on the number of threads.

    Args:
        gradient: of what :func:`fake_quantize` returned.
        input, scale, zero_point, lowest, highest, axis: as there.
        needs: which of the three gradients to return; None stands for the others.
    """
    if (
        is_native(input, scale, zero_point)
        and gradient.dtype is input.dtype
        and not _is_recorded(gradient, input, scale, zero_point)
        and use_native(gradient)
    ):
        to_input, to_scale, to_zero_point = operators["fake_quantize_backward"](
            gradient,
            _plain(input),
            _plain(scale),
            _plain(zero_point),
            lowest,
            highest,
            -1 if axis is None else axis,
            pass_saturated,
            None if gradient_clip is None else _representable(gradient_clip, gradient.dtype),
            gradient_scale(input, scale, highest),
            needs[0],
        )
        return (
            to_input,
            to_scale.reshape(scale.shape) if needs[1] else None,
            to_zero_point.reshape(scale.shape).to(zero_point.dtype) if needs[2] else None,
        )
    values, step, offset = operands(input, scale, zero_point, lowest, highest, axis)
    if gradient_clip is not None:
        gradient = gradient.clamp(-gradient_clip, gradient_clip)
    codes = arithmetic.unsaturated_codes(values, step, offset)
    inside = (codes >= lowest) & (codes <= highest)
    to_input = to_scale = to_zero_point = None
    if needs[0]:
        to_input = gradient if pass_saturated else torch.where(inside, gradient, 0.0)
    if needs[1] or needs[2]:
        gradient = gradient.to(values.dtype) * gradient_scale(input, scale, highest)
        dimensions = [dimension for dimension in range(input.dim()) if dimension != axis]
        if needs[1]:
            slope = codes.clamp(lowest, highest) - offset - torch.where(inside, values / step, 0.0)
            to_scale = _sum(gradient * slope, dimensions).reshape(scale.shape).to(scale.dtype)
        if needs[2]:
            slope = torch.where(inside, 0.0, -step)
            to_zero_point = _sum(gradient * slope, dimensions).reshape(scale.shape).to(zero_point.dtype)
    return to_input, to_scale, to_zero_point


def gradient_scale(input: Tensor, scale: Tensor, highest: int) -> float:
    r""":math:`1 / \sqrt{N q_{max}}`: a scale of N elements learns at the pace of a weight (LSQ, section 2.2)."""
    return 1.0 / math.sqrt(max(input.numel() // max(scale.numel(), 1), 1) * highest)


def _sum(values: Tensor, dimensions: list[int]) -> Tensor:
    return values.sum(dimensions) if dimensions else values


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _representable(number: float, dtype: torch.dtype) -> float:
    """The number as ``torch.clamp`` takes it for a tensor of that dtype."""
    return number if dtype is torch.float32 else float(torch.tensor(number, dtype=dtype))


def extremes(input: Tensor, axis: int | None) -> Tensor:
    """``[-minimum, maximum]`` of a tensor, float32 of shape (2, C); minus infinity where an end is not finite.

    An end is not finite where a value is infinite, where one is NaN (both ends), and where there are no values.
    """
    if input.dtype in _NATIVE_INPUTS and use_native(input):
        both: Tensor = operators["extremes"](_plain(input), -1 if axis is None else axis)
        return both
    with torch.no_grad():
        return _extremes(input, axis)


def _extremes(input: Tensor, axis: int | None) -> Tensor:
    channels = 1 if axis is None else input.shape[axis]
    if input.numel() == 0:
        return torch.full((2, channels), -torch.inf, device=input.device)
    if axis is None:
        minimum, maximum = torch.aminmax(memory_order(input))
    else:
        minimum, maximum = torch.aminmax(input.movedim(axis, 0).reshape(channels, -1), dim=1)
    both = torch.stack([-minimum, maximum]).to(torch.float32).reshape(2, channels)
    return torch.where(torch.isfinite(both), both, -torch.inf)


def memory_order(input: Tensor) -> Tensor:
    """The elements as a vector in the order in which they lie: a view of any dense tensor, channels-last included."""
    if input.is_contiguous() or torch.compiler.is_compiling():
        return input.reshape(-1)
    order = sorted(range(input.dim()), key=input.stride, reverse=True)
    return input.permute(order).reshape(-1)


def _dense(input: Tensor) -> Tensor:
    """The tensor, copied if its elements do not fill one block of memory."""
    return input if memory_order(input).data_ptr() == input.data_ptr() else input.clone()


def pack_mask(flags: Tensor) -> Tensor:
    """A bool tensor as one bit an element, in the order in which its elements lie: uint8, (ceil(N / 8),)."""
    ordered = memory_order(flags)
    padded = torch.nn.functional.pad(ordered.to(torch.uint8), (0, -ordered.numel() % 8))
    return (padded.reshape(-1, 8) * _bits(flags.device)).sum(1, dtype=torch.uint8)


def _packed_if_needed(flags: Tensor) -> Tensor:
    return flags.new_empty(0, dtype=torch.uint8) if bool(flags.all()) else pack_mask(flags)


def unpack_mask(mask: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The bool tensor that :func:`pack_mask` packed, of which those are the shape and the strides."""
    flags = (mask[:, None] & _bits(mask.device)).reshape(-1) != 0
    return flags.as_strided(shape, strides)


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
