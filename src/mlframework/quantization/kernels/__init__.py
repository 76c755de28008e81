"""Integer arithmetic on tensors: which kernel computes it on this machine, and a fallback that is exact everywhere."""

from .capability import int_mm_is_best, int_mm_is_exact, onednn_is_exact
from .fake_quantization import (
    FakeQuantized,
    extremes,
    fake_quantize,
    fake_quantize_backward,
    is_native,
    mask_gradient,
    memory_order,
)
from .fingerprints import fingerprints
from .integer_layer import Epilogue, IntegerLayer
from .integer_products import PackedConvolution, PackedLinear
from .moving_average import update_moving_average
from .native import active_path, has_integer_layers, instruction_set, reference_kernels, use_native
from .normalization import batch_statistics, can_normalize, normalize, normalize_backward
from .onednn import ConvolutionGeometry
from .operations import (
    add,
    dequantize,
    lookup,
    lookup_gradient,
    max_pool2d,
    occurring,
    quantize,
    requantize,
    sum_positions,
)
from .subpixel import SubpixelConvolution, subpixel_convolution
from .training_product import (
    TrainedWeight,
    TrainingProduct,
    pack_training_product,
    takes_training_product,
    train_weight,
)
from .transposed_convolution import PackedTransposedConvolution, TransposedLayer

__all__ = [
    "ConvolutionGeometry",
    "Epilogue",
    "FakeQuantized",
    "IntegerLayer",
    "PackedConvolution",
    "PackedLinear",
    "PackedTransposedConvolution",
    "SubpixelConvolution",
    "TrainedWeight",
    "TrainingProduct",
    "TransposedLayer",
    "active_path",
    "add",
    "batch_statistics",
    "can_normalize",
    "dequantize",
    "extremes",
    "fake_quantize",
    "fake_quantize_backward",
    "fingerprints",
    "has_integer_layers",
    "instruction_set",
    "int_mm_is_best",
    "int_mm_is_exact",
    "is_native",
    "lookup",
    "lookup_gradient",
    "mask_gradient",
    "max_pool2d",
    "memory_order",
    "normalize",
    "normalize_backward",
    "occurring",
    "onednn_is_exact",
    "pack_training_product",
    "quantize",
    "reference_kernels",
    "requantize",
    "subpixel_convolution",
    "sum_positions",
    "takes_training_product",
    "train_weight",
    "update_moving_average",
    "use_native",
]
