"""Scale and zero point with the grid they belong to, and the public functions that quantize with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import arithmetic
from .scheme import QuantizationScheme


@dataclass(frozen=True, eq=False)
class QuantizationParameters:
    """Scale and zero point: two separate tensors, and the grid that they place on the real line.

    Checking the values reads them, which waits for a GPU: build these outside of a training step.

    Args:
        scale: float tensor of shape (1,) per tensor or (C,) per channel; finite and positive. May require grad.
        zero_point: integer or float tensor of the same shape and device, holding codes of the grid. May require
            grad when it is float.
        scheme: the grid.

    Raises:
        TypeError: an argument is not of its type, or ``scale`` is not floating point.
        ValueError: shapes disagree, a scale is not finite and positive, a zero point is off the grid.

    Example:
        >>> scheme = QuantizationScheme(signed=False, symmetric=False)
        >>> parameters = QuantizationParameters(torch.tensor([0.5]), torch.tensor([10]), scheme)
        >>> quantize(torch.tensor([-5.0, 0.0, 1.2]), parameters)
        tensor([ 0, 10, 12], dtype=torch.uint8)
    """

    scale: Tensor
    zero_point: Tensor
    scheme: QuantizationScheme

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, QuantizationScheme):
            raise TypeError(f"scheme must be a QuantizationScheme, got {type(self.scheme).__name__}")
        for name in ("scale", "zero_point"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not self.scale.is_floating_point():
            raise TypeError(f"scale must be a floating-point tensor, got {self.scale.dtype}")
        if self.zero_point.is_complex() or self.zero_point.dtype is torch.bool:
            raise TypeError(f"zero_point must be an integer or floating-point tensor, got {self.zero_point.dtype}")
        expected = "(1,)" if self.scheme.channel_axis is None else "(C,) with C at least 1"
        if self.scale.dim() != 1 or self.scale.numel() == 0 or (expected == "(1,)" and self.scale.numel() != 1):
            raise ValueError(f"scale must have shape {expected} for this scheme, got {tuple(self.scale.shape)}")
        if self.zero_point.shape != self.scale.shape:
            raise ValueError(
                f"zero_point must have the shape of scale, {tuple(self.scale.shape)}, "
                f"got {tuple(self.zero_point.shape)}"
            )
        if self.zero_point.device != self.scale.device:
            raise ValueError(
                f"zero_point must be on the device of scale, {self.scale.device}, got {self.zero_point.device}"
            )
        scale = self.scale.detach().to(torch.float32)  # what the arithmetic computes in
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale must be finite and positive, got {self.scale.tolist()}")
        zero_point = self.zero_point.detach().to(torch.float32)  # the ends of the grid do not fit every integer dtype
        lowest, highest = self.scheme.quant_min, self.scheme.quant_max
        on_grid = (zero_point >= lowest) & (zero_point <= highest) & (zero_point == zero_point.round())
        if not bool(on_grid.all()):
            raise ValueError(f"zero_point must hold codes from {lowest} to {highest}, got {self.zero_point.tolist()}")

    @classmethod
    def from_range(cls, minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme) -> QuantizationParameters:
        r"""The finest grid that covers a range and holds zero exactly.

        Affine: :math:`s = (max - min) / (q_{max} - q_{min})`, :math:`z = \mathrm{rne}(q_{min} - min / s)`.
        Symmetric: the smallest scale that covers both ends, zero point fixed. An all-zero range gets scale 1.

        Args:
            minimum: lower ends, shape (1,) or (C,).
            maximum: upper ends, the same shape.
            scheme: the grid.

        Raises:
            ValueError: an end is not finite, or a minimum lies above its maximum.

        Example:
            >>> QuantizationParameters.from_range(torch.tensor([-1.0]), torch.tensor([1.27]),
            ...                                   QuantizationScheme(narrow_range=True)).scale
            tensor([0.0100])
        """
        if not isinstance(scheme, QuantizationScheme):
            raise TypeError(f"scheme must be a QuantizationScheme, got {type(scheme).__name__}")
        for name, value in (("minimum", minimum), ("maximum", maximum)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite, got {value.tolist()}")
        if minimum.shape != maximum.shape:
            raise ValueError(
                f"maximum must have the shape of minimum, {tuple(minimum.shape)}, got {tuple(maximum.shape)}"
            )
        if bool((minimum > maximum).any()):
            raise ValueError(f"minimum must not exceed maximum, got {minimum.tolist()} and {maximum.tolist()}")
        return cls(*arithmetic.range_to_scale_and_zero_point(minimum, maximum, scheme), scheme)


def check_input(input: Tensor, parameters: QuantizationParameters) -> int | None:
    """Refuse what cannot be quantized; returns the channel axis, resolved."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, got {input.dtype}")
    return check_shape(input, parameters)


def check_shape(input: Tensor, parameters: QuantizationParameters) -> int | None:
    """Refuse a tensor whose shape the parameters do not fit; returns the channel axis, resolved."""
    if not isinstance(parameters, QuantizationParameters):
        raise TypeError(f"parameters must be QuantizationParameters, got {type(parameters).__name__}")
    axis = parameters.scheme.resolve_channel_axis(input.dim())
    channels = parameters.scale.numel()
    if axis is not None and input.shape[axis] != channels:
        raise ValueError(
            f"input must have {channels} channels along axis {axis}, as many as scale has, "
            f"got shape {tuple(input.shape)}"
        )
    return axis


def quantize(input: Tensor, parameters: QuantizationParameters, *, check_finite: bool = False) -> Tensor:
    r"""Float values to integer codes: :math:`q = \mathrm{clamp}(\mathrm{rne}(x / s) + z, q_{min}, q_{max})`.

    The division is that of ONNX's ``QuantizeLinear`` and of PyTorch's documented formula; half-precision inputs
    compute in float32. Infinities saturate. NaN has no code: pass ``check_finite=True`` to be told.

    Args:
        input: floating-point tensor of any shape and memory format.
        parameters: scale, zero point and grid.
        check_finite: raise where ``input`` holds NaN or an infinity (reads the values: waits for a GPU).

    Returns:
        Codes, shape of ``input``, dtype ``parameters.scheme.dtype``.

    Raises:
        TypeError: ``input`` is not floating point.
        ValueError: the shape does not fit ``parameters``, or a value is not finite and ``check_finite`` is set.
    """
    check_input(input, parameters)
    if check_finite and not bool(torch.isfinite(input).all()):
        raise ValueError("input must be finite, got NaN or infinity among its values (check_finite=True)")
    zero_point = arithmetic.grid_zero_point(parameters.zero_point, parameters.scheme)
    return arithmetic.quantize_values(input, parameters.scale, zero_point, parameters.scheme)


def dequantize(codes: Tensor, parameters: QuantizationParameters) -> Tensor:
    r"""Integer codes to float32 values: :math:`x = (q - z)\, s`.

    Raises:
        TypeError: ``codes`` is not of the scheme's dtype.
        ValueError: the shape does not fit ``parameters``.

    Example:
        >>> parameters = QuantizationParameters(torch.tensor([0.25]), torch.tensor([0]), QuantizationScheme())
        >>> dequantize(torch.tensor([-4, 3], dtype=torch.int8), parameters)
        tensor([-1.0000,  0.7500])
    """
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a tensor, got {type(codes).__name__}")
    axis = check_shape(codes, parameters)
    if codes.dtype is not parameters.scheme.dtype:
        raise TypeError(f"codes must have dtype {parameters.scheme.dtype}, got {codes.dtype}")
    zero_point = arithmetic.grid_zero_point(parameters.zero_point, parameters.scheme)
    return arithmetic.dequantize_codes(codes, parameters.scale, zero_point, axis)


def requantize(accumulator: Tensor, accumulator_scale: Tensor, parameters: QuantizationParameters) -> Tensor:
    r"""An int32 accumulator (bias included) to codes of the output grid, as ONNX Runtime's ``QLinearConv`` does.

    .. math:: q_y = \mathrm{rne}(\mathrm{clamp}(a \cdot (s_a / s_y),\ q_{min} - z_y,\ q_{max} - z_y)) + z_y

    Args:
        accumulator: int32 tensor, exact sums of products.
        accumulator_scale: ``sx * sw``, float32; broadcasts against ``accumulator``.
        parameters: the output's scale, zero point and grid, per tensor.

    Raises:
        TypeError: ``accumulator`` is not int32, or another argument is not of its type.
        ValueError: ``parameters`` are per channel.
    """
    if not isinstance(accumulator, Tensor) or accumulator.dtype is not torch.int32:
        raise TypeError(f"accumulator must be an int32 tensor, got {getattr(accumulator, 'dtype', type(accumulator))}")
    if not isinstance(accumulator_scale, Tensor):
        raise TypeError(f"accumulator_scale must be a tensor, got {type(accumulator_scale).__name__}")
    if not isinstance(parameters, QuantizationParameters):
        raise TypeError(f"parameters must be QuantizationParameters, got {type(parameters).__name__}")
    scheme = parameters.scheme
    if scheme.channel_axis is not None:
        raise ValueError(f"parameters must be per tensor, got channel_axis {scheme.channel_axis}")
    return arithmetic.requantize_accumulator(
        accumulator,
        accumulator_scale.to(torch.float32) / parameters.scale.to(torch.float32),
        int(parameters.zero_point),
        scheme.quant_min,
        scheme.quant_max,
        scheme.dtype,
    )
