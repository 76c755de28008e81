"""The kernels in Triton: a whole layer in one call, its weight packed for the tensor cores of a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..devices import kernels_for, kernels_on
from ..epilogue import Epilogue
from ..geometry import ConvolutionGeometry
from ..operators.integer_layers import fold_zero_point, folded_layer
from ..operators.layer_sums import geometry_arguments
from ..products import ConvolutionProduct, Description, LinearProduct, Product
from .exact_floats import EXACT_FLOATS

_KINDS = (LinearProduct.__name__, ConvolutionProduct.__name__)


class TritonLayer:
    """A layer as the kernels read it.

    Attributes:
        arguments: what the operator takes besides the codes.
    """

    def __init__(self, product: Product, epilogue: Epilogue) -> None:
        self._in_floats = EXACT_FLOATS.layer(product, epilogue)
        geometry: ConvolutionGeometry | None = getattr(product, "geometry", None)
        self.arguments = (
            product.zero_point,
            *fold_zero_point(product.weight, epilogue.bias, product.zero_point, product.dtype),
            epilogue.multiplier,
            epilogue.zero_point,
            epilogue.lowest,
            epilogue.highest,
            epilogue.dtype,
            *geometry_arguments(geometry),
        )

    def __call__(self, codes: Tensor) -> Tensor:
        if kernels_for(codes) != "triton":  # a tensor that only stands for one
            return self._in_floats(codes)
        output: Tensor = folded_layer(codes, *self.arguments)
        return output


class _TritonGpu:
    def takes(self, description: Description) -> bool:
        if kernels_on(description.device) != "triton":
            return False
        return description.kind in _KINDS and len(description.weight) <= 4

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        return TritonLayer(product, epilogue)


TRITON_GPU = _TritonGpu()
