"""Integer layers: codes in, exact int32 sums, codes (or float) out.

Each holds int8 weights, an int32 bias and the scales, and nothing in floating point besides. What it derives from
them (packed weights, multipliers) is made by :meth:`Int8Layer.pack`, at the first call at the latest, and remade when
its tensors are loaded or moved.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arithmetic
from ..kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    Epilogue,
    IntegerLayer,
    LinearProduct,
    TransposedProduct,
)
from ..kernels.geometry import is_dense_or_depthwise
from ..parameters import QuantizationParameters
from ..scheme import QuantizationScheme
from .folding import IntegerWeights
from .instruction import FLOATS, Instruction
from .integer_module import IntegerModule, PackedModule

FLOAT_HINT = ": of a converted model, only the forward is converted, not other methods that call its layers"

Product = LinearProduct | ConvolutionProduct | TransposedProduct


class Int8Layer(PackedModule[IntegerLayer]):
    """A linear operation on codes with the epilogue of :mod:`mlframework.quantization.arithmetic`.

    Args:
        weights: integer weights, batch normalization folded in.
        input: the input's parameters, per tensor.
        output: the output's parameters, per tensor; None leaves the output float32.
        clip: the range of the activation that follows, (0, inf) for a ReLU; infinite ends for none.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self,
        weights: IntegerWeights,
        input: QuantizationParameters,
        output: QuantizationParameters | None,
        clip: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        super().__init__()
        self.input_scheme = input.scheme
        self.output_scheme = None if output is None else output.scheme
        self.weight_scheme = weights.scheme
        self.clip = clip
        self.register_buffer("weight", weights.codes.contiguous())
        self.register_buffer("weight_scale", weights.scale)
        self.register_buffer("bias", weights.bias)
        self.register_grid("input_", input)
        self.register_grid("output_", output)

    def _product(self, zero_point: int) -> Product:
        """The operation's exact sums."""
        raise NotImplementedError

    def _make_plan(self) -> IntegerLayer:
        return IntegerLayer(self._product(int(self.input_zero_point)), self._epilogue())

    def _epilogue(self) -> Epilogue:
        accumulator_scale = self.input_scale * self.weight_scale
        if self.output_scheme is None:
            return Epilogue(
                self.bias, accumulator_scale, lowest=self.clip[0], highest=self.clip[1], dtype=self.float_dtype
            )
        assert self.output_scale is not None and self.output_zero_point is not None
        lowest, highest = arithmetic.codes_of_clip(
            self.clip, self.output_scale, self.output_zero_point, self.output_scheme
        )
        return Epilogue(
            self.bias,
            accumulator_scale / self.output_scale,
            int(self.output_zero_point),
            int(lowest),
            int(highest),
            self.output_scheme.dtype,
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's grid, or to float32.

        Raises:
            TypeError: the codes are not of the input scheme's dtype.
            OverflowError: the layer is so wide that a sum may exceed int32.
        """
        if codes.dtype is not self.input_scheme.dtype:
            raise TypeError(
                f"codes must have dtype {self.input_scheme.dtype}, got {codes.dtype}"
                f"{FLOAT_HINT if codes.is_floating_point() else ''}"
            )
        output = self.pack()(codes)
        return output.to(self.float_dtype) if self.output_scheme is None else output

    def instruction(self) -> Instruction | None:
        packed = self.pack().packed
        if packed is None or self.instruction_name is None:
            return None
        numbers = 0 if self.output_scheme is not None else FLOATS[self.float_dtype], *self._numbers()
        return Instruction(self.instruction_name, (packed,), numbers)

    def _numbers(self) -> tuple[int, ...]:
        """What the instruction takes besides the dtype of values."""
        return ()

    def extra_repr(self) -> str:
        output = "float32" if self.output_scheme is None else str(self.output_scheme)
        clip = "" if self.clip == (-math.inf, math.inf) else f", clip={self.clip}"
        return f"weight={tuple(self.weight.shape)}, {self.input_scheme} -> {output}{clip}"


class Int8Linear(Int8Layer):
    """``nn.Linear`` on codes: (*, in_features) to (*, out_features)."""

    def _product(self, zero_point: int) -> Product:
        return LinearProduct(self.weight, zero_point, self.input_scheme.dtype)

    @property
    def instruction_name(self) -> str | None:
        return "linear"


class Int8Convolution(Int8Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` on codes: (N, I, *size) or (I, *size) to (..., O, *size').

    Args:
        padding_mode: of the convolution; everything but ``"zeros"`` pads the codes before the product.
        padding: for every spatial dimension, last first, what to add before and after, as :func:`F.pad` takes it;
            used where the product's own symmetric zero padding cannot serve.
    """

    def __init__(
        self,
        weights: IntegerWeights,
        input: QuantizationParameters,
        output: QuantizationParameters | None,
        clip: tuple[float, float],
        geometry: ConvolutionGeometry,
        padding: tuple[int, ...] = (),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(weights, input, output, clip)
        self.geometry = geometry
        self.padding = padding
        self.padding_mode = padding_mode

    def _product(self, zero_point: int) -> Product:
        return ConvolutionProduct(self.weight, zero_point, self.input_scheme.dtype, self.geometry)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes, or to float32."""
        if self.padding:
            codes = self._pad(codes)
        if codes.dim() == len(self.geometry.stride) + 1:
            return super().forward(codes.unsqueeze(0)).squeeze(0)
        return super().forward(codes)

    @property
    def instruction_name(self) -> str | None:
        is_compiled = is_dense_or_depthwise(self.weight.shape, self.geometry.groups) and not self.padding
        return "convolution" if len(self.geometry.stride) < 3 and is_compiled else None

    def _numbers(self) -> tuple[int, ...]:
        return (len(self.geometry.stride),)

    def _pad(self, codes: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return F.pad(codes, self.padding, value=int(self.input_zero_point))
        return padded(codes, self.input_zero_point, self.padding, self.padding_mode)


def padded(codes: Tensor, zero_point: Tensor, padding: tuple[int, ...], mode: str) -> Tensor:
    """Codes with more of them around, as :func:`F.pad` adds values."""
    # Padding by reflection and the like is not implemented for integers; codes are exact in float32.
    values = F.pad(codes.to(torch.float32) - zero_point, padding, mode="constant" if mode == "zeros" else mode)
    return (values + zero_point).to(codes.dtype)


class Int8ConvTranspose2d(Int8Layer):
    """``nn.ConvTranspose2d`` on codes: (N, I, H, W) or (I, H, W) to (..., O, H', W')."""

    def __init__(
        self,
        weights: IntegerWeights,
        input: QuantizationParameters,
        output: QuantizationParameters | None,
        clip: tuple[float, float],
        geometry: ConvolutionGeometry,
        output_padding: tuple[int, ...],
    ) -> None:
        super().__init__(weights, input, output, clip)
        self.geometry = geometry
        self.output_padding = output_padding

    def _product(self, zero_point: int) -> Product:
        return TransposedProduct(self.weight, zero_point, self.input_scheme.dtype, self.geometry, self.output_padding)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes, or to float32."""
        if codes.dim() == 3:
            return super().forward(codes.unsqueeze(0)).squeeze(0)
        return super().forward(codes)

    @property
    def instruction_name(self) -> str | None:
        stride, _, dilation, groups = self.geometry
        return "subpixel" if groups == 1 and set(dilation) == {1} and len(set(stride)) == 1 else None

    def _numbers(self) -> tuple[int, ...]:
        product = self.pack().product
        assert isinstance(product, TransposedProduct) and product.phases is not None
        return product.phases[0].stride, *product.phases[0].crop


class Int8Embedding(IntegerModule):
    """``nn.Embedding`` with an int8 table: indices to float rows on the table's grid.

    Args:
        weight: codes (num_embeddings, embedding_dim), int8.
        scale: float32, (1,) or (num_embeddings,).
        scheme: the grid of the codes.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, scheme: QuantizationScheme | None = None) -> None:
        super().__init__()
        self.weight_scheme = QuantizationScheme() if scheme is None else scheme
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices (*) to rows (*, embedding_dim)."""
        rows = F.embedding(indices, self.weight).to(torch.float32)
        scale = self.weight_scale if self.weight_scale.numel() == 1 else self.weight_scale[indices].unsqueeze(-1)
        return (rows * scale).to(self.float_dtype)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}"
