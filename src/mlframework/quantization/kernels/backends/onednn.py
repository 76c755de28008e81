"""PyTorch's oneDNN convolution of uint8 by int8, used for its sums alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..devices import is_traced
from ..products import ConvolutionProduct, Description, Product, TransposedProduct
from .backend import SumsBackend
from .capability import onednn_is_exact
from .exact_floats import EXACT_FLOATS, exact_blocks
from .onednn_convolution import OnednnConvolution


class _Onednn(SumsBackend):
    def takes(self, description: Description) -> bool:
        if description.device != "cpu" or len(description.weight) != 4 or description.geometry is None:
            return False
        kinds = (ConvolutionProduct.__name__, TransposedProduct.__name__)
        return description.kind in kinds and onednn_is_exact()

    def sums(self, product: Product) -> Callable[[Tensor], Tensor]:
        in_floats = EXACT_FLOATS.sums(product)
        if isinstance(product, TransposedProduct):
            if product.phases is None:
                return in_floats
            subpixel, phases = product.phases
            of_phases = _convolution_sums(phases)
            if of_phases is None:
                return in_floats
            shuffled = subpixel.shuffled
            return lambda codes: in_floats(codes) if _is_left(codes) else shuffled(of_phases(codes))
        assert isinstance(product, ConvolutionProduct)
        sums = _convolution_sums(product)
        if sums is None:
            return in_floats
        return lambda codes: in_floats(codes) if _is_left(codes) else sums(codes)


def _is_left(codes: Tensor) -> bool:
    """Whether codes are none of oneDNN's: a graph that is traced, or none at all."""
    return is_traced() or codes.numel() == 0


def _convolution_sums(product: ConvolutionProduct) -> Callable[[Tensor], Tensor] | None:
    """Sums in blocks of input channels that float32, which oneDNN returns, holds exactly; None where there are none."""
    blocks = exact_blocks(product.weight, product.zero_point, product.dtype, product.bound)
    if not blocks or (len(blocks) > 1 and product.geometry.groups > 1):
        return None
    # oneDNN takes uint8 activations only; an int8 code becomes the uint8 code 128 above it.
    signed = product.dtype is torch.int8
    zero_point = product.zero_point + 128 if signed else product.zero_point
    packed = [(block, OnednnConvolution(product.weight[:, block], zero_point, product.geometry)) for block in blocks]

    def run(codes: Tensor) -> Tensor:
        unsigned = codes.view(torch.uint8) ^ 128 if signed else codes
        if len(packed) == 1:
            return packed[0][1](unsigned)
        sums = [convolution(unsigned[:, block]).to(torch.int32) for block, convolution in packed]
        return torch.stack(sums).sum(dim=0, dtype=torch.int32)

    return run


ONEDNN = _Onednn()
