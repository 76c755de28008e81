"""The compiled kernels: a whole layer in one call, packed for this processor's microkernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..devices import kernels_for, kernels_on
from ..epilogue import Epilogue
from ..geometry import ConvolutionGeometry
from ..operators.integer_layers import OutputGrid, integer_layer, pack_layer, packed_layer
from ..operators.layer_sums import geometry_arguments
from ..products import ConvolutionProduct, Description, LinearProduct, Product
from .exact_floats import EXACT_FLOATS

_KINDS = (LinearProduct.__name__, ConvolutionProduct.__name__)


class CompiledLayer:
    """A packed layer.

    Attributes:
        packed: uint8, as the kernels of this processor read it.
        arguments: what the operator takes besides the codes.
    """

    def __init__(self, product: Product, epilogue: Epilogue) -> None:
        self._product, self._epilogue = product, epilogue
        convolution = product.as_convolution()
        assert convolution is not None
        weight, (stride, padding, dilation, groups) = convolution
        dtype = torch.float32 if epilogue.dtype.is_floating_point else epilogue.dtype
        self.packed: Tensor = pack_layer(
            weight,
            epilogue.bias,
            epilogue.multiplier,
            stride,
            padding,
            dilation,
            groups,
            product.zero_point,
            product.dtype,
            epilogue.zero_point,
            epilogue.lowest,
            epilogue.highest,
            dtype,
        )
        geometry: ConvolutionGeometry | None = getattr(product, "geometry", None)
        shape = tuple(product.weight.shape)
        self.arguments = (self.packed, shape[0], shape[2:], *geometry_arguments(geometry), dtype)

    def __call__(self, codes: Tensor) -> Tensor:
        if kernels_for(codes) != "compiled":  # a tensor that only stands for one
            return self._in_floats(codes)
        if torch.compiler.is_exporting():  # for other processors, too
            return self._unpacked(codes)
        output: Tensor = packed_layer.overload(codes, *self.arguments)
        return output

    @functools.cached_property
    def _in_floats(self) -> Callable[[Tensor], Tensor]:
        """The layer in PyTorch's operations. Few need it, and what is made of the weight for it takes its time."""
        with _disable_current_modes():  # which may have tensors stand for others
            return EXACT_FLOATS.layer(self._product, self._epilogue)

    def _unpacked(self, codes: Tensor) -> Tensor:
        product, epilogue = self._product, self._epilogue
        output = None
        if not epilogue.dtype.is_floating_point:
            ends = (epilogue.zero_point, int(epilogue.lowest), int(epilogue.highest))
            zero_point, lowest, highest = (torch.tensor([end]) for end in ends)
            output = OutputGrid(zero_point, lowest, highest, epilogue.dtype)
        return integer_layer(
            codes,
            torch.tensor([product.zero_point]),
            product.weight,
            epilogue.bias,
            epilogue.multiplier,
            output,
            (epilogue.lowest, epilogue.highest),
            getattr(product, "geometry", None),
        )


class _Compiled:
    def takes(self, description: Description) -> bool:
        if kernels_on(description.device) != "compiled":
            return False
        return description.kind in _KINDS and len(description.weight) <= 4 and description.is_dense_or_depthwise

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        return CompiledLayer(product, epilogue)


COMPILED = _Compiled()
