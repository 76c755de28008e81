"""Transposed convolutions by the compiled kernels, as the convolution of their phases (:mod:`..subpixel`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ..epilogue import Epilogue
from ..products import Description, Product, TransposedProduct
from ..subpixel import SubpixelConvolution
from .compiled import COMPILED, CompiledLayer
from .exact_floats import EXACT_FLOATS


class PhasesLayer:
    """The packed convolution of the phases, and their shuffle into place.

    Attributes:
        packed: as of :class:`.CompiledLayer`.
    """

    def __init__(
        self, subpixel: SubpixelConvolution, layer: CompiledLayer, in_floats: Callable[[Tensor], Tensor]
    ) -> None:
        self._subpixel, self._layer, self._in_floats = subpixel, layer, in_floats
        self.packed = layer.packed

    def __call__(self, codes: Tensor) -> Tensor:
        if codes.numel() == 0:  # which has no phases to shuffle
            return self._in_floats(codes)
        return self._subpixel.shuffled(self._layer(codes))


class _Phases:
    def takes(self, description: Description) -> bool:
        if description.kind != TransposedProduct.__name__ or description.geometry is None:
            return False
        stride, _, dilation, groups = description.geometry
        has_phases = groups == 1 and set(dilation) == {1} and len(set(stride)) == 1
        # The phases' own convolution is dense and in two dimensions.
        return has_phases and COMPILED.takes(description._replace(kind="ConvolutionProduct"))

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        assert isinstance(product, TransposedProduct) and product.phases is not None
        subpixel, convolution = product.phases
        # A phase is a channel, with the bias and the multiplier of the channel that it is a phase of.
        bias, multiplier = (
            values.expand(product.weight.shape[1]).repeat_interleave(subpixel.stride**2)
            for values in (epilogue.bias, epilogue.multiplier)
        )
        epilogue_of_phases = dataclasses.replace(epilogue, bias=bias, multiplier=multiplier)
        return PhasesLayer(
            subpixel, CompiledLayer(convolution, epilogue_of_phases), EXACT_FLOATS.layer(product, epilogue)
        )


PHASES = _Phases()
