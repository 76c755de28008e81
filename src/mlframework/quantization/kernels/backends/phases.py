"""Transposed convolutions by kernels for convolutions, as the convolution of their phases (:mod:`..subpixel`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ..epilogue import Epilogue
from ..products import ConvolutionProduct, Description, Product, TransposedProduct
from ..subpixel import SubpixelConvolution
from .backend import Backend
from .compiled import COMPILED
from .exact_floats import EXACT_FLOATS
from .triton_gpu import TRITON_GPU

_CONVOLUTIONS: tuple[Backend, ...] = (COMPILED, TRITON_GPU)


class PhasesLayer:
    """The convolution of the phases, and their shuffle into place.

    Attributes:
        packed: as of :class:`.CompiledLayer`; None where that does not run it.
    """

    def __init__(
        self,
        subpixel: SubpixelConvolution,
        convolution: Callable[[Tensor], Tensor],
        in_floats: Callable[[Tensor], Tensor],
    ) -> None:
        self._subpixel, self._convolution, self._in_floats = subpixel, convolution, in_floats
        self.packed: Tensor | None = getattr(convolution, "packed", None)

    def __call__(self, codes: Tensor) -> Tensor:
        if codes.numel() == 0:  # which has no phases to shuffle
            return self._in_floats(codes)
        return self._subpixel.shuffled(self._convolution(codes))


class _Phases:
    def takes(self, description: Description) -> bool:
        if description.kind != TransposedProduct.__name__ or description.geometry is None:
            return False
        stride, _, dilation, groups = description.geometry
        has_phases = groups == 1 and set(dilation) == {1} and len(set(stride)) == 1
        # The phases' own convolution is dense and in two dimensions.
        convolution = description._replace(kind=ConvolutionProduct.__name__)
        return has_phases and any(backend.takes(convolution) for backend in _CONVOLUTIONS)

    def layer(self, product: Product, epilogue: Epilogue) -> Callable[[Tensor], Tensor]:
        assert isinstance(product, TransposedProduct) and product.phases is not None
        subpixel, convolution = product.phases
        # A phase is a channel, with the bias and the multiplier of the channel that it is a phase of.
        bias, multiplier = (
            values.expand(product.weight.shape[1]).repeat_interleave(subpixel.stride**2)
            for values in (epilogue.bias, epilogue.multiplier)
        )
        epilogue_of_phases = dataclasses.replace(epilogue, bias=bias, multiplier=multiplier)
        backend = next(each for each in _CONVOLUTIONS if each.takes(convolution.description))
        return PhasesLayer(
            subpixel, backend.layer(convolution, epilogue_of_phases), EXACT_FLOATS.layer(product, epilogue)
        )


PHASES = _Phases()
