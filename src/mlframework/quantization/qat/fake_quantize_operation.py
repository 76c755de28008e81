"""``fake_quantize``: the quantization noise of the grid in the forward pass, float gradients in the backward pass."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import arithmetic, kernels
from ..kernels.fake_quantization import native_fake_quantize, operands
from ..parameters import QuantizationParameters, check_input
from ..scheme import QuantizationScheme
from .native_function import apply_of
from .snapshot import snapshot
from .straight_through_estimator import StraightThroughEstimator


class _FakeQuantize(torch.autograd.Function):
    """PyTorch's operations alone: saves its input and recomputes the codes in backward."""

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
        values, scale, zero_point = operands(input, scale, zero_point, quant_min, quant_max, axis)
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
        if _passes_unchanged(ctx):
            return _clipped(gradient, ctx.options[4]), *[None] * 7
        return *_from_input(ctx, gradient), *[None] * 5


class _NativeFakeQuantize(torch.autograd.Function):
    """The compiled kernels: saves its input where scale or zero point learn, and otherwise a bit an element."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        options: tuple[int, int, int | None, bool, float | None],
        code_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        ctx.options = options
        ctx.learns = learns = scale.requires_grad or zero_point.requires_grad
        with_mask = not (learns or options[3])
        values: Tensor
        values, codes, mask, _ = native_fake_quantize(
            input, scale, zero_point, *options[:3], codes=code_dtype, mask=with_mask
        )
        if learns:
            ctx.save_for_backward(input, scale, zero_point)
        elif with_mask:
            ctx.save_for_backward(mask)
            ctx.strides = values.stride()
        if code_dtype is None:
            return values
        ctx.set_materialize_grads(False)
        if codes is not None:
            ctx.mark_non_differentiable(codes)
        return values, codes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        if ctx.learns:
            return *_from_input(ctx, gradient), None, None
        pass_saturated, gradient_clip = ctx.options[3:]
        if pass_saturated:
            return _clipped(gradient, gradient_clip), None, None, None, None
        (mask,) = ctx.saved_tensors
        return kernels.mask_gradient(gradient, mask, ctx.strides, gradient_clip), None, None, None, None


_apply = apply_of(_NativeFakeQuantize)


def _passes_unchanged(ctx: Any) -> bool:
    """Whether backward needs nothing of the forward: everything passes, and only to the input."""
    pass_saturated = ctx.options[3]
    return pass_saturated and not any(ctx.needs_input_grad[1:3])


def _clipped(gradient: Tensor, gradient_clip: float | None) -> Tensor:
    return gradient if gradient_clip is None else gradient.clamp(-gradient_clip, gradient_clip)


def _from_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    input, scale, zero_point = ctx.saved_tensors
    quant_min, quant_max, axis, pass_saturated, gradient_clip = ctx.options
    return kernels.fake_quantize_backward(
        gradient,
        input,
        scale,
        zero_point,
        quant_min,
        quant_max,
        axis,
        pass_saturated=pass_saturated,
        gradient_clip=gradient_clip,
        needs=ctx.needs_input_grad[:3],
    )


@overload
def fake_quantize_tensor(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    ste: StraightThroughEstimator,
    axis: int | None,
) -> Tensor: ...


@overload
def fake_quantize_tensor(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    ste: StraightThroughEstimator,
    axis: int | None,
    *,
    codes: Literal[True],
) -> tuple[Tensor, Tensor | None]: ...


def fake_quantize_tensor(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    ste: StraightThroughEstimator,
    axis: int | None,
    *,
    codes: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """:func:`fake_quantize` on checked arguments: what the layers call in every step.

    A scale or a zero point that does not require grad may be updated in place before backward runs.

    Args:
        codes: also return the codes, in the dtype of the scheme and without a gradient. They are None where a value is
            NaN, and where no compiled kernel runs, so that nobody asks for them.
    """
    code_dtype = scheme.dtype if codes else None
    options = (scheme.quant_min, scheme.quant_max, axis, ste.saturated == "identity", ste.gradient_clip)
    learns = scale.requires_grad or zero_point.requires_grad
    native = kernels.is_native(input, scale, zero_point) and forward_ad._current_level < 0
    if native and not (torch.is_grad_enabled() and (learns or input.requires_grad)):
        both: tuple[Tensor, Tensor | None] = native_fake_quantize(
            input, scale, zero_point, *options[:3], codes=code_dtype
        )[:2]
        return both if codes else both[0]
    if learns or not native:  # backward reads them
        scale = scale if scale.requires_grad else snapshot(scale)
        zero_point = zero_point if zero_point.requires_grad else snapshot(zero_point)
    if native:
        return _apply(input, scale, zero_point, options, code_dtype)  # type: ignore[no-any-return]
    values: Tensor = _FakeQuantize.apply(input, scale, zero_point, *options)  # type: ignore[no-untyped-call]
    return (values, None) if codes else values


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
