"""What training asks of a tensor that is rounded to the grid: one reading of it forward, and one backward.

Gradients are not recorded here: :mod:`..differentiable` passes them on with the backward operators. Compiled kernels
give the references' results bit for bit, but for sums over many elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import arithmetic
from ..devices import is_traced
from .declaration import FLOATS, is_recorded, operator
from .layout import dense, laid_out_like, memory_order
from .masks import pack_mask, unpack_mask

Clip = tuple[float, float]
UNBOUNDED: Clip = (-math.inf, math.inf)


class FakeQuantized(NamedTuple):
    """What :func:`fake_quantize` gives; None for what was not asked for.

    ``values`` and ``codes`` lie in memory as a dense input does, and ``mask`` is in that order: the element that
    comes i-th in memory has bit ``i % 8`` of byte ``i // 8``, and what is left of the last byte is zero.

    Attributes:
        grid: float32 of shape (2, C), there with codes: the scale that made them, and the zero point as a code. NaN has
            no code: where a channel holds one, its codes are the lowest and its scale here is NaN, so that whatever is
            computed from the codes is NaN, too.
    """

    values: Tensor | None
    codes: Tensor | None
    mask: Tensor | None
    extremes: Tensor | None
    grid: Tensor | None


_Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@operator(
    "fake_quantize(Tensor input, Tensor? addend, Tensor scale, Tensor zero_point, int lowest, int highest, int axis,"
    " float clip_low, float clip_high, bool wants_values, bool wants_mask, bool wants_extremes,"
    " ScalarType? code_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    FLOATS,
)
def _fake_quantize(
    input: Tensor,
    addend: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    clip_low: float,
    clip_high: float,
    wants_values: bool,
    wants_mask: bool,
    wants_extremes: bool,
    code_dtype: torch.dtype | None,
) -> _Results:
    channel_axis = None if axis < 0 else axis
    with torch.no_grad():
        number, step, offset = operands(dense(input), scale, zero_point, lowest, highest, channel_axis)
        unclipped = number if addend is None else number + addend.to(number.dtype)
        bounded = clip_low > -math.inf or clip_high < math.inf
        number = unclipped.clamp(clip_low, clip_high) if bounded else unclipped
        unsaturated = arithmetic.unsaturated_codes(number, step, offset)
        saturated = unsaturated.clamp(lowest, highest)
        inside = (unsaturated >= lowest) & (unsaturated <= highest) & (unclipped > clip_low) & (unclipped < clip_high)
        codes = None if code_dtype is None else saturated.nan_to_num(nan=lowest).to(code_dtype)
        return (
            ((saturated - offset) * step).to(input.dtype) if wants_values else None,
            codes,
            pack_mask(inside) if wants_mask else None,
            _extremes_of(number, channel_axis) if wants_extremes else None,
            None if codes is None else _grid(number, scale, offset.reshape(-1), channel_axis),
        )


def _grid(number: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    spoiled = holds_nan(number, axis if scale.numel() > 1 else None)
    scale = torch.where(spoiled, torch.nan, scale.to(torch.float32))
    return torch.stack([scale, zero_point.to(torch.float32)])


def holds_nan(values: Tensor, axis: int | None) -> Tensor:
    """Whether there is NaN in a tensor, or which of its channels have some: bool, of no dimensions or of shape (C,)."""
    is_nan = values.isnan()
    return is_nan.any() if axis is None else is_nan.movedim(axis, 0).unsqueeze(-1).flatten(1).any(dim=1)


@_fake_quantize.fake
def _(
    input: Tensor,
    addend: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    clip_low: float,
    clip_high: float,
    wants_values: bool,
    wants_mask: bool,
    wants_extremes: bool,
    code_dtype: torch.dtype | None,
) -> _Results:
    channels = 1 if axis < 0 else input.shape[axis]
    with_codes = code_dtype is not None
    return (
        torch.empty_like(input) if wants_values else None,
        torch.empty_like(input, dtype=code_dtype) if with_codes else None,
        input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8) if wants_mask else None,
        input.new_empty((2, channels), dtype=torch.float32) if wants_extremes else None,
        input.new_empty((2, scale.numel()), dtype=torch.float32) if with_codes else None,
    )


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    *,
    addend: Tensor | None = None,
    clip: Clip = UNBOUNDED,
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
        codes: the dtype to return c in, uint8 or int8.
        mask: whether to return where the gradient passes: :math:`q_{min} \le q \le q_{max}`, and x + a strictly
            within ``clip``.
        extremes: whether to return the extremes of v, as :func:`extremes` does.
    """
    return FakeQuantized._make(
        _fake_quantize(
            input,
            addend,
            scale,
            zero_point,
            lowest,
            highest,
            -1 if axis is None else axis,
            *clip,
            values,
            mask,
            extremes,
            codes,
        )
    )


def has_kernel(input: Tensor) -> bool:
    """Whether kernels compute :func:`fake_quantize` of this tensor."""
    return _fake_quantize.has_kernel(input)


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


@operator("mask_gradient(Tensor gradient, Tensor mask, int[] strides, float? gradient_clip) -> Tensor", FLOATS)
def _mask_gradient(gradient: Tensor, mask: Tensor, strides: tuple[int, ...], gradient_clip: float | None) -> Tensor:
    if gradient_clip is not None:
        gradient = gradient.clamp(-gradient_clip, gradient_clip)
    return torch.where(unpack_mask(mask, gradient.shape, strides), gradient, 0.0)


@_mask_gradient.fake
def _(gradient: Tensor, mask: Tensor, strides: tuple[int, ...], gradient_clip: float | None) -> Tensor:
    return gradient.new_empty_strided(gradient.shape, strides)


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
    if is_recorded(gradient):
        recorded: Tensor = _mask_gradient.reference(gradient, mask, strides, gradient_clip)
        return recorded
    largest = None if gradient_clip is None else _representable(gradient_clip, gradient.dtype)
    masked: Tensor = _mask_gradient(gradient, mask, strides, largest)
    return masked


@operator(
    "fake_quantize_backward(Tensor gradient, Tensor input, Tensor scale, Tensor zero_point, int lowest,"
    " int highest, int axis, bool pass_saturated, float? gradient_clip, bool needs_input)"
    " -> (Tensor, Tensor, Tensor)",
    FLOATS,
)
def _fake_quantize_backward(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    pass_saturated: bool,
    gradient_clip: float | None,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    channel_axis = None if axis < 0 else axis
    values, step, offset = operands(input, scale, zero_point, lowest, highest, channel_axis)
    if gradient_clip is not None:
        gradient = gradient.clamp(-gradient_clip, gradient_clip)
    codes = arithmetic.unsaturated_codes(values, step, offset)
    inside = (codes >= lowest) & (codes <= highest)
    to_input = None
    if needs_input:
        # A copy of what passes whole: an operator returns no argument of its own.
        to_input = gradient * 1 if pass_saturated else torch.where(inside, gradient, 0.0)
        to_input = laid_out_like(to_input, input)
    passed = gradient.to(values.dtype)
    dimensions = [dimension for dimension in range(input.dim()) if dimension != channel_axis]
    to_scale = passed * (codes.clamp(lowest, highest) - offset - torch.where(inside, values / step, 0.0))
    to_zero_point = passed * torch.where(inside, 0.0, -step)
    factor = gradient_scale(input, scale, highest)
    to_scale, to_zero_point = (_sum(each, dimensions).reshape(-1) * factor for each in (to_scale, to_zero_point))
    return to_input, to_scale, to_zero_point


@_fake_quantize_backward.fake
def _(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    pass_saturated: bool,
    gradient_clip: float | None,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    sums = input.new_empty(scale.numel(), dtype=torch.float32)
    return torch.empty_like(input) if needs_input else None, sums, torch.empty_like(sums)


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
    if gradient_clip is not None:
        gradient_clip = _representable(gradient_clip, gradient.dtype)
    compute = _fake_quantize_backward
    takes_reference = is_recorded(gradient, input, scale, zero_point) or gradient.dtype is not input.dtype
    to_input, to_scale, to_zero_point = (compute.reference if takes_reference else compute)(
        gradient,
        input,
        scale,
        zero_point,
        lowest,
        highest,
        -1 if axis is None else axis,
        pass_saturated,
        gradient_clip,
        needs[0],
    )
    return (
        to_input,
        to_scale.reshape(scale.shape).to(scale.dtype) if needs[1] else None,
        to_zero_point.reshape(scale.shape).to(zero_point.dtype) if needs[2] else None,
    )


@operator(
    "mask_weight_gradient(Tensor(a!) gradient, Tensor weight, Tensor scale, Tensor zero_point, int lowest, int highest,"
    " int axis, bool pass_saturated, float? gradient_clip) -> Tensor",
    FLOATS,
)
def _mask_weight_gradient(
    gradient: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    pass_saturated: bool,
    gradient_clip: float | None,
) -> Tensor:
    options = lowest, highest, axis, pass_saturated, gradient_clip, True
    to_weight, to_scale, _ = _fake_quantize_backward.reference(gradient, weight, scale, zero_point, *options)
    gradient.copy_(to_weight)
    return to_scale  # type: ignore[no-any-return]


@_mask_weight_gradient.fake
def _(gradient: Tensor, weight: Tensor, scale: Tensor, *others: object) -> Tensor:
    return weight.new_empty(scale.numel(), dtype=torch.float32)


def weight_gradients(
    gradient: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int | None,
    *,
    pass_saturated: bool,
    gradient_clip: float | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`fake_quantize_backward` of a weight and its scale, which may use up the gradient: what passes is written
    over it where compiled kernels run, in the order of its elements.

    Args:
        gradient: of the rounded weight, which nobody else has.
    """
    compute = _mask_weight_gradient
    is_alone = gradient.dtype is weight.dtype and not is_recorded(gradient, weight, scale)
    if is_alone and not is_traced() and compute.has_kernel(gradient):
        largest = None if gradient_clip is None else _representable(gradient_clip, gradient.dtype)
        channels = -1 if axis is None else axis
        to_scale = compute(gradient, weight, scale, zero_point, lowest, highest, channels, pass_saturated, largest)
        return gradient if needs[0] else None, to_scale.reshape(scale.shape) if needs[1] else None
    to_weight, to_scale, _ = fake_quantize_backward(
        gradient,
        weight,
        scale,
        zero_point,
        lowest,
        highest,
        axis,
        pass_saturated=pass_saturated,
        gradient_clip=gradient_clip,
        needs=(*needs, False),
    )
    return to_weight, to_scale


def fake_quantize_sums(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    gradient_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize_backward` of one scale and zero point, each of shape (1,), without the input's gradient."""
    ends = lowest, highest, -1
    _, to_scale, to_zero_point = _fake_quantize_backward.reference(
        gradient, input, scale, zero_point, *ends, False, gradient_clip, False
    )
    return to_scale, to_zero_point


def gradient_scale(input: Tensor, scale: Tensor, highest: int) -> float:
    r""":math:`1 / \sqrt{N q_{max}}`: a scale of N elements learns at the pace of a weight (LSQ, section 2.2).

    No argument of an operator: it is made of sizes, which may be symbols while a compiler traces; an argument would fix
    them, and every batch size would be compiled anew.
    """
    return 1.0 / math.sqrt(max(input.numel() // max(scale.numel(), 1), 1) * highest)


def _sum(values: Tensor, dimensions: list[int]) -> Tensor:
    return values.sum(dimensions) if dimensions else values


def _representable(number: float, dtype: torch.dtype) -> float:
    """The number as ``torch.clamp`` takes it for a tensor of that dtype."""
    return number if dtype is torch.float32 else float(torch.tensor(number, dtype=dtype))


@operator("extremes(Tensor input, int axis) -> Tensor", FLOATS)
def _extremes(input: Tensor, axis: int) -> Tensor:
    with torch.no_grad():
        return _extremes_of(input, None if axis < 0 else axis)


@_extremes.fake
def _(input: Tensor, axis: int) -> Tensor:
    return input.new_empty((2, 1 if axis < 0 else input.shape[axis]), dtype=torch.float32)


def extremes(input: Tensor, axis: int | None) -> Tensor:
    """``[-minimum, maximum]`` of a tensor, float32 of shape (2, C); minus infinity where an end is not finite.

    An end is not finite where a value is infinite, where one is NaN (both ends), and where there are no values.
    """
    both: Tensor = _extremes(input, -1 if axis is None else axis)
    return both


def _extremes_of(input: Tensor, axis: int | None) -> Tensor:
    channels = 1 if axis is None else input.shape[axis]
    if input.numel() == 0:
        return torch.full((2, channels), -torch.inf, device=input.device)
    if axis is None:
        minimum, maximum = torch.aminmax(memory_order(input))
    else:
        minimum, maximum = torch.aminmax(input.movedim(axis, 0).reshape(channels, -1), dim=1)
    both = torch.stack([-minimum, maximum]).to(torch.float32).reshape(2, channels)
    return torch.where(torch.isfinite(both), both, -torch.inf)
