"""Operations on codes: compiled where that is possible, and by the formulas of ``arithmetic`` everywhere.

Both give the same codes, bit for bit. Arguments are those of the formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arithmetic
from ..scheme import QuantizationScheme
from .native import operators, use_native


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Float values to codes; see :func:`.arithmetic.quantize_values`."""
    if values.dtype in (torch.float32, torch.bfloat16) and _are_read(scale, zero_point) and use_native(values):
        axis = scheme.resolve_channel_axis(values.dim())
        codes: Tensor = operators["quantize"](
            values,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            scheme.dtype,
            -1 if axis is None else axis,
        )
        return codes
    return arithmetic.quantize_values(values, scale, zero_point, scheme)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, channel_axis: int | None) -> Tensor:
    """Codes to float32 values; see :func:`.arithmetic.dequantize_codes`."""
    if _are_read(scale, zero_point) and use_native(codes):
        axis = -1 if channel_axis is None else channel_axis % codes.dim()
        values: Tensor = operators["dequantize"](codes, scale, zero_point, axis)
        return values
    return arithmetic.dequantize_codes(codes, scale, zero_point, channel_axis)


def _are_read(scale: Tensor, zero_point: Tensor) -> bool:
    """Whether scale and zero point are what the compiled kernels read, with no gradient to ask for."""
    return (
        scale.dtype is torch.float32
        and zero_point.dtype in (torch.float32, torch.int32)
        and not (scale.requires_grad or zero_point.requires_grad)
    )


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """The entries of a table at codes; see :func:`.arithmetic.look_up`."""
    if use_native(codes):
        entries: Tensor = operators["lookup"](codes, table)
        return entries
    return arithmetic.look_up(codes, table)


def lookup_gradient(gradient: Tensor, codes: Tensor, slopes: Tensor, gradient_clip: float | None) -> Tensor:
    """A gradient through a table: times ``slopes`` (256 float32, the lowest code first) at codes of its shape.

    Where the slope is 0 so is the result, even of a gradient that is infinite or NaN.
    """
    if gradient.dtype is torch.float32 and use_native(gradient):
        passed: Tensor = operators["lookup_gradient"](gradient, codes, slopes, gradient_clip)
        return passed
    if gradient_clip is not None:
        gradient = gradient.clamp(-gradient_clip, gradient_clip)
    slope = arithmetic.look_up(codes, slopes)
    return torch.where(slope == 0, 0.0, gradient * slope)


def occurring(codes: Tensor) -> Tensor:
    """Which of the 256 codes there are, the lowest first: uint8 of shape (256,), 1 or 0."""
    if use_native(codes):
        present: Tensor = operators["occurring"](codes)
        return present
    places = codes.flatten().to(torch.int64) - torch.iinfo(codes.dtype).min
    return torch.zeros(256, dtype=torch.uint8, device=codes.device).index_fill_(0, places, 1)


def add(
    left: Tensor,
    left_ratio: Tensor,
    right: Tensor,
    right_ratio: Tensor,
    constant: Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of two tensors of codes, which broadcast; see :func:`.arithmetic.add_codes`."""
    if isinstance(lowest, int) and isinstance(highest, int) and use_native(left):
        codes: Tensor = operators["add"](left, left_ratio, right, right_ratio, constant, lowest, highest, dtype)
        return codes
    return arithmetic.add_codes(left, left_ratio, right, right_ratio, constant, lowest, highest, dtype)


def requantize(
    sums: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    zero_point: int,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
    channel_axis: int,
) -> Tensor:
    """Sums of an integer layer to codes; see :func:`.arithmetic.requantize_accumulator`.

    Args:
        sums: exact integers, int32 or float32.
        bias: (C,); int32 makes the accumulator an int32, float32 is for sums that stay below 2**24 with it.
        multiplier: float32, (C,) or (1,).
        zero_point, lowest, highest, dtype: of the output; where it saturates.
        channel_axis: the axis of ``sums`` that ``bias`` and ``multiplier`` lie along.
    """
    if use_native(sums):
        codes: Tensor = operators["requantize"](
            sums, bias, multiplier, zero_point, lowest, highest, dtype, channel_axis
        )
        return codes
    return arithmetic.requantize_accumulator(
        with_bias(sums, bias, channel_axis),
        along_channels(multiplier, sums, channel_axis),
        zero_point,
        lowest,
        highest,
        dtype,
    )


def with_bias(sums: Tensor, bias: Tensor | None, channel_axis: int) -> Tensor:
    """The accumulator of a layer, exactly: an int32 bias makes it int32."""
    if bias is None:
        return sums
    if bias.dtype is torch.int32:
        sums = sums.to(torch.int32)
    return sums + along_channels(bias, sums, channel_axis)


def along_channels(values: Tensor, sums: Tensor, channel_axis: int) -> Tensor:
    """Values of shape (C,) or (1,), viewed to broadcast along the channels of ``sums``."""
    return arithmetic.along_axis(values, sums.dim(), channel_axis % sums.dim())


def max_pool2d(
    codes: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d` of codes, (N, C, H, W) or (C, H, W): padding never wins."""
    if codes.dim() == 4 and use_native(codes):
        kernel = _pair(kernel_size)
        pooled: Tensor = operators["max_pool2d"](
            codes, kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode
        )
        return pooled
    # PyTorch pools floats, and codes are exact in float32.
    values = F.max_pool2d(codes.to(torch.float32), kernel_size, stride, padding, dilation, ceil_mode)
    return values.to(codes.dtype)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def sum_positions(codes: Tensor) -> Tensor:
    """Sums of codes (N, C, *size) over their positions, int32 of shape (N, C)."""
    if use_native(codes):
        sums: Tensor = operators["sum_positions"](codes)
        return sums
    return codes.flatten(2).sum(dim=2, dtype=torch.int32)
