"""Exact integer products: which kernel computes them on this machine, and a fallback that is exact everywhere."""

from .capability import int_mm_is_exact, onednn_is_exact
from .integer_products import ConvolutionGeometry, PackedConvolution, PackedLinear, PackedTransposedConvolution

__all__ = [
    "ConvolutionGeometry",
    "PackedConvolution",
    "PackedLinear",
    "PackedTransposedConvolution",
    "int_mm_is_exact",
    "onednn_is_exact",
]
