"""``fake_quantize``: the quantization noise of the grid in the forward pass, float gradients in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import arithmetic
from ..parameters import QuantizationParameters, check_input
from ..scheme import QuantizationScheme
from .straight_through_estimator import StraightThroughEstimator


class _FakeQuantize(torch.autograd.Function):
    """Saves its input and recomputes the codes in backward: no float copy and no mask is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        pass_saturated: bool,
        gradient_clip: float | None,
    ) -> Tensor:
        values, scale, zero_point = _operands(input, scale, zero_point, quant_min, quant_max, axis)
        codes = arithmetic.unsaturated_codes(values, scale, zero_point).clamp(quant_min, quant_max)
        return ((codes - zero_point) * scale).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, scale, zero_point, *options = inputs
        ctx.options = options
        if not _passes_unchanged(ctx):
            ctx.save_for_backward(input, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        quant_min, quant_max, axis, pass_saturated, gradient_clip = ctx.options
        needs_input, needs_scale, needs_zero_point = ctx.needs_input_grad[:3]
        if gradient_clip is not None:
            gradient = gradient.clamp(-gradient_clip, gradient_clip)
        if _passes_unchanged(ctx):
            return gradient, *[None] * 7

        input, scale, zero_point = ctx.saved_tensors
        values, step, offset = _operands(input, scale, zero_point, quant_min, quant_max, axis)
        codes = arithmetic.unsaturated_codes(values, step, offset)
        inside = (codes >= quant_min) & (codes <= quant_max)
        to_input = to_scale = to_zero_point = None
        if needs_input:
            to_input = gradient if pass_saturated else torch.where(inside, gradient, 0.0)
        if needs_scale or needs_zero_point:
            gradient = gradient.to(values.dtype) * _gradient_scale(input.numel(), scale.numel(), quant_max)
            dimensions = [dimension for dimension in range(input.dim()) if dimension != axis]
            if needs_scale:
                slope = codes.clamp(quant_min, quant_max) - offset - torch.where(inside, values / step, 0.0)
                to_scale = _sum(gradient * slope, dimensions).reshape(scale.shape).to(scale.dtype)
            if needs_zero_point:
                slope = torch.where(inside, 0.0, -step)
                to_zero_point = _sum(gradient * slope, dimensions).reshape(scale.shape).to(zero_point.dtype)
        return to_input, to_scale, to_zero_point, *[None] * 5


def _passes_unchanged(ctx: Any) -> bool:
    """Whether backward needs nothing of the forward: everything passes, and only to the input."""
    pass_saturated = ctx.options[3]
    return pass_saturated and not any(ctx.needs_input_grad[1:3])


def _operands(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, scale and zero point in the dtype of the computation, ready to broadcast."""
    dtype = arithmetic.compute_dtype(input)
    codes = torch.round(zero_point.to(dtype)).clamp(quant_min, quant_max)
    return (
        input.to(dtype),
        arithmetic.along_axis(scale.to(dtype), input.dim(), axis),
        arithmetic.along_axis(codes, input.dim(), axis),
    )


def _sum(values: Tensor, dimensions: list[int]) -> Tensor:
    return values.sum(dimensions) if dimensions else values


def _gradient_scale(elements: int, channels: int, quant_max: int) -> float:
    r""":math:`1 / \sqrt{N Q_p}`: a step shared by N elements learns at the pace of a weight (LSQ, section 2.2)."""
    return 1.0 / math.sqrt(max(elements // channels, 1) * quant_max)


def fake_quantize_tensor(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    ste: StraightThroughEstimator,
    axis: int | None,
) -> Tensor:
    """:func:`fake_quantize` on checked arguments: what the layers call in every step."""
    return _FakeQuantize.apply(  # type: ignore[no-any-return, no-untyped-call]
        input,
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        axis,
        ste.saturated == "identity",
        ste.gradient_clip,
    )


def fake_quantize(
    input: Tensor, parameters: QuantizationParameters, ste: StraightThroughEstimator | None = None
) -> Tensor:
    r"""Rounds to the grid and stays differentiable: the quantization noise that training learns to bear.

    .. math:: y = (\mathrm{clamp}(\mathrm{rne}(x / s) + z,\ q_{min},\ q_{max}) - z)\, s

    Gradients, with :math:`q = \mathrm{rne}(x / s) + z` and :math:`g = 1 / \sqrt{N Q_p}` (N elements share one scale,
    :math:`Q_p = q_{max}`):

    - input: the straight-through estimator's.
    - scale, where it requires grad (LSQ: Esser et al., 2020, arXiv:1902.08153, equations 3 and 4):
      :math:`g\,(\mathrm{rne}(x / s) - x / s)` inside the grid, :math:`g\,(q_{min} - z)` below it,
      :math:`g\,(q_{max} - z)` above.
    - zero point, where it requires grad (LSQ+: Bhalgat et al., 2020, arXiv:2004.09576, section 3.2): :math:`0` inside
      the grid, :math:`-g\,s` where the value saturated. A fractional zero point is rounded in use, straight through.

    NaN stays NaN; infinities saturate.

    Args:
        input: floating-point tensor of any shape and memory format. Half precision computes in float32.
        parameters: scale, zero point and grid.
        ste: what passes backward; the default estimator where not given.

    Returns:
        Values on the grid: shape, dtype and memory format of ``input``.

    Raises:
        TypeError: ``input`` is not floating point, or an argument is not of its type.
        ValueError: the shape does not fit ``parameters``.

    Example:
        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> parameters = QuantizationParameters(scale, torch.tensor([0]), QuantizationScheme(bits=2))
        >>> x = torch.tensor([-3.0, 0.3, 0.2], requires_grad=True)
        >>> y = fake_quantize(x, parameters)
        >>> y.detach()
        tensor([-1.0000,  0.5000,  0.0000])
        >>> y.sum().backward()
        >>> x.grad
        tensor([0., 1., 1.])
    """
    if ste is None:
        ste = StraightThroughEstimator()
    elif not isinstance(ste, StraightThroughEstimator):
        raise TypeError(f"ste must be a StraightThroughEstimator, got {type(ste).__name__}")
    axis = check_input(input, parameters)
    return fake_quantize_tensor(input, parameters.scale, parameters.zero_point, parameters.scheme, ste, axis)
