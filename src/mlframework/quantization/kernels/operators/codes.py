"""Operations on codes. Arguments are those of the formulas in :mod:`mlframework.quantization.arithmetic`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import arithmetic
from ...scheme import QuantizationScheme
from .declaration import CODES, FLOATS, is_recorded, operator
from .layout import is_dense, lie_alike


@operator(
    "quantize(Tensor values, Tensor scale, Tensor zero_point, int lowest, int highest, ScalarType dtype, int axis)"
    " -> Tensor",
    FLOATS,
)
def _quantize(
    values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, dtype: torch.dtype, axis: int
) -> Tensor:
    """``axis`` is -1 for one scale."""
    return arithmetic.quantize_to(values, scale, zero_point, lowest, highest, dtype, None if axis < 0 else axis)


@_quantize.fake
def _(
    values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, dtype: torch.dtype, axis: int
) -> Tensor:
    return torch.empty_like(values, dtype=dtype)


def quantize(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Float values to codes; see :func:`.arithmetic.quantize_values`."""
    axis = scheme.resolve_channel_axis(values.dim())
    codes: Tensor = (_quantize if _are_read(scale, zero_point) else _quantize.reference)(
        values,
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        scheme.dtype,
        -1 if axis is None else axis,
    )
    return codes


@operator(
    "dequantize(Tensor codes, Tensor scale, Tensor zero_point, int axis, ScalarType dtype) -> Tensor",
    CODES,
)
def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    return arithmetic.dequantize_codes(codes, scale, zero_point, None if axis < 0 else axis).to(dtype)


@_dequantize.fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    channel_axis: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes to values, computed in float32 and rounded to ``dtype``; see :func:`.arithmetic.dequantize_codes`."""
    axis = -1 if channel_axis is None else channel_axis % codes.dim()
    compute = _dequantize if _are_read(scale, zero_point) else _dequantize.reference
    values: Tensor = compute(codes, scale, zero_point, axis, dtype)
    return values


def _are_read(scale: Tensor, zero_point: Tensor) -> bool:
    """Whether scale and zero point are what the compiled kernels read, with no gradient to ask for."""
    return (
        scale.dtype is torch.float32
        and zero_point.dtype in (torch.float32, torch.int32)
        and not is_recorded(scale, zero_point)
    )


@operator("lookup(Tensor codes, Tensor table) -> Tensor", CODES)
def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """The entries of a table at codes; see :func:`.arithmetic.look_up`."""
    return arithmetic.look_up(codes, table)


@lookup.fake
def _(codes: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=table.dtype)


@operator(
    "lookup_gradient(Tensor gradient, Tensor codes, Tensor slopes, float? gradient_clip) -> Tensor", (torch.float32,)
)
def lookup_gradient(gradient: Tensor, codes: Tensor, slopes: Tensor, gradient_clip: float | None) -> Tensor:
    """A gradient through a table: times ``slopes`` (256 float32, the lowest code first) at codes of its shape.

    Where the slope is 0 so is the result, even of a gradient that is infinite or NaN. A gradient in half precision is
    clipped and multiplied in float32.
    """
    passed = gradient.to(arithmetic.compute_dtype(gradient))
    if gradient_clip is not None:
        passed = passed.clamp(-gradient_clip, gradient_clip)
    slope = arithmetic.look_up(codes, slopes)
    return torch.where(slope == 0, 0.0, passed * slope).to(gradient.dtype)


@lookup_gradient.fake
def _(gradient: Tensor, codes: Tensor, slopes: Tensor, gradient_clip: float | None) -> Tensor:
    return torch.empty_like(codes, dtype=gradient.dtype)


@operator("occurring(Tensor codes) -> Tensor", CODES)
def occurring(codes: Tensor) -> Tensor:
    """Which of the 256 codes there are, the lowest first: uint8 of shape (256,), 1 or 0."""
    places = codes.flatten().to(torch.int64) - torch.iinfo(codes.dtype).min
    return torch.zeros(256, dtype=torch.uint8, device=codes.device).index_fill_(0, places, 1)


@occurring.fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(256, dtype=torch.uint8)


@operator(
    "add(Tensor left, Tensor left_ratio, Tensor right, Tensor right_ratio, Tensor constant, int lowest, int highest,"
    " ScalarType dtype) -> Tensor",
    CODES,
)
def _add(
    left: Tensor,
    left_ratio: Tensor,
    right: Tensor,
    right_ratio: Tensor,
    constant: Tensor,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
) -> Tensor:
    codes = arithmetic.add_codes(left, left_ratio, right, right_ratio, constant, lowest, highest, dtype)
    return codes if lie_alike(left, right) else codes.contiguous()


@_add.fake
def _(left: Tensor, left_ratio: Tensor, right: Tensor, *others: object) -> Tensor:
    dtype = others[-1]
    assert isinstance(dtype, torch.dtype)
    if lie_alike(left, right):
        return torch.empty_like(left, dtype=dtype)
    return left.new_empty(torch.broadcast_shapes(left.shape, right.shape), dtype=dtype)  # type: ignore[no-untyped-call]


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
    operands = left, left_ratio, right, right_ratio, constant
    if isinstance(lowest, int) and isinstance(highest, int):
        codes: Tensor = _add(*operands, lowest, highest, dtype)
        return codes
    return arithmetic.add_codes(*operands, lowest, highest, dtype)


@operator(
    "requantize(Tensor sums, Tensor? bias, Tensor multiplier, int zero_point, int lowest, int highest,"
    " ScalarType dtype, int channel_axis) -> Tensor",
    (torch.float32, torch.int32),
)
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
    accumulator = with_bias(sums, bias, channel_axis)
    codes = arithmetic.requantize_accumulator(
        accumulator, along_channels(multiplier, sums, channel_axis), zero_point, lowest, highest, dtype
    )
    return codes if _keeps_layout(sums, bias, channel_axis) else codes.contiguous()


@requantize.fake
def _(
    sums: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    zero_point: int,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
    channel_axis: int,
) -> Tensor:
    if _keeps_layout(sums, bias, channel_axis):
        return torch.empty_like(sums, dtype=dtype)
    return sums.new_empty(sums.shape, dtype=dtype)


def _keeps_layout(sums: Tensor, bias: Tensor | None, channel_axis: int) -> bool:
    """Whether codes lie as the sums do, which they do where channels are innermost; otherwise they are contiguous."""
    if sums.is_floating_point() and bias is not None and not bias.is_floating_point():
        sums = sums.to(torch.int32)  # which makes them dense
    return is_dense(sums) and (sums.shape[channel_axis] == 1 or sums.stride(channel_axis) == 1)


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


@operator(
    "max_pool2d(Tensor codes, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    CODES,
)
def _max_pool2d(
    codes: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    # PyTorch pools floats, and codes are exact in float32.
    values = F.max_pool2d(codes.to(torch.float32), kernel, stride, padding, dilation, ceil_mode)
    return values.to(codes.dtype)


@_max_pool2d.fake
def _(
    codes: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    # On the device without memory: kernels allocate their output with this, and nothing shall be pooled twice.
    values = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.float32, device="meta")
    pooled = F.max_pool2d(values, kernel, stride, padding, dilation, ceil_mode)
    return torch.empty_like(pooled, dtype=codes.dtype, device=codes.device)


def max_pool2d(
    codes: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d` of codes, (N, C, H, W) or (C, H, W): padding never wins."""
    kernel = pair(kernel_size)
    geometry = kernel, pair(stride) if stride else kernel, pair(padding), pair(dilation), ceil_mode
    pooled: Tensor = _max_pool2d(codes, *geometry) if codes.dim() == 4 else _max_pool2d(codes[None], *geometry)[0]
    return pooled


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A size along both axes of an image."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@operator("sum_positions(Tensor codes) -> Tensor", CODES)
def sum_positions(codes: Tensor) -> Tensor:
    """Sums of codes (N, C, *size) over their positions, int32 of shape (N, C)."""
    return codes.flatten(2).sum(dim=2, dtype=torch.int32)


@sum_positions.fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[:2], dtype=torch.int32)


@operator(
    "average_positions(Tensor codes, Tensor zero_point, Tensor scale, Tensor output_scale, Tensor output_zero_point,"
    " int lowest, int highest, ScalarType dtype) -> Tensor",
    CODES,
)
def _average_positions(
    codes: Tensor,
    zero_point: Tensor,
    scale: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    count = math.prod(codes.shape[2:])
    sums = sum_positions(codes) - zero_point * count
    multiplier = arithmetic.average_multiplier(scale, output_scale, torch.full_like(scale, count))
    return arithmetic.requantize_accumulator(sums, multiplier, output_zero_point, lowest, highest, dtype)


@_average_positions.fake
def _(codes: Tensor, *others: object) -> Tensor:
    dtype = others[-1]
    assert isinstance(dtype, torch.dtype)
    return codes.new_empty(codes.shape[:2], dtype=dtype)


def average_positions(
    codes: Tensor,
    zero_point: Tensor,
    scale: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Codes (N, C) of the averages of codes (N, C, *size) over their positions.

    See :func:`.arithmetic.average_multiplier` and :func:`.arithmetic.requantize_accumulator`.

    Args:
        zero_point, scale: of the codes.
    """
    are_known = isinstance(lowest, int) and isinstance(highest, int)
    compute = _average_positions if are_known else _average_positions.reference
    averages: Tensor = compute(codes, zero_point, scale, output_scale, output_zero_point, lowest, highest, dtype)
    return averages
