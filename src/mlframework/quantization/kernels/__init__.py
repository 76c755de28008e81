"""Arithmetic on tensors of codes: operators, the backends that run integer layers, and who runs what."""

from . import native
from .backends.capability import int_mm_is_best, int_mm_is_exact, onednn_is_exact
from .constants import constant_in_graphs
from .devices import active_path, interpreted_kernels, is_traced, reference_kernels
from .epilogue import Epilogue
from .geometry import ConvolutionGeometry
from .integer_layer import IntegerLayer
from .native import instruction_set, instruction_sets
from .operators.codes import (
    add,
    average_positions,
    dequantize,
    lookup,
    max_pool2d,
    occurring,
    pair,
    quantize,
    requantize,
    sum_positions,
)
from .operators.fake_quantization import FakeQuantized, extremes, fake_quantize
from .operators.fingerprints import fingerprints
from .operators.layout import memory_order
from .operators.moving_average import update_moving_average
from .operators.recomputation import CANNOT_RECOMPUTE, refuse_recomputation
from .operators.snapshot import snapshot
from .plan import TrainingDescription, fuses, trains_on_integers
from .products import ConvolutionProduct, LinearProduct, TransposedProduct
from .programs import is_plain, make_program, release_program, run_program, run_programs
from .subpixel import SubpixelConvolution, subpixel_convolution
from .triton_gpu import registration

__all__ = [
    "CANNOT_RECOMPUTE",
    "ConvolutionGeometry",
    "ConvolutionProduct",
    "Epilogue",
    "FakeQuantized",
    "IntegerLayer",
    "LinearProduct",
    "SubpixelConvolution",
    "TrainingDescription",
    "TransposedProduct",
    "active_path",
    "add",
    "average_positions",
    "constant_in_graphs",
    "dequantize",
    "extremes",
    "fake_quantize",
    "fingerprints",
    "fuses",
    "instruction_set",
    "instruction_sets",
    "int_mm_is_best",
    "int_mm_is_exact",
    "interpreted_kernels",
    "is_plain",
    "is_traced",
    "lookup",
    "make_program",
    "max_pool2d",
    "memory_order",
    "occurring",
    "onednn_is_exact",
    "pair",
    "quantize",
    "reference_kernels",
    "refuse_recomputation",
    "release_program",
    "requantize",
    "run_program",
    "run_programs",
    "snapshot",
    "subpixel_convolution",
    "sum_positions",
    "trains_on_integers",
    "update_moving_average",
]

registration.register()

# Now, since a compiler cannot load them while it traces. Where they are not, whoever first asks for them is told.
if native.LIBRARY.exists():
    native.is_available()
